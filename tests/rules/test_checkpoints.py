"""Files with learned rules or feature statistics: the published ones, ours, and wrong ones."""

import os
import re
from pathlib import Path

import pytest
import torch

from tests.networks import make_network
from tta_lightning.errors import InputError
from tta_lightning.meta import MGGPretraining
from tta_lightning.methods import MGTTA
from tta_lightning.models.loading import checkpoint_record
from tta_lightning.rules import MGG, GradientMemoryLayer
from tta_lightning.rules.checkpoints import (
    STATISTICS,
    WEIGHTS,
    learned_rule_record,
    read_learned_rule,
    read_statistics,
)

SHARED = os.environ.get("TTA_SHARED")
needs_published_files = pytest.mark.skipif(
    SHARED is None, reason="TTA_SHARED names no folder with the published files"
)
BACKBONE = {"name": "a.Network", "weights_sha256": "0123abcd"}
NO_RULE = "holds no learned rule: it is of another kind. Expected a checkpoint that `tta fit` wrote"
NO_STATISTICS = r"holds no feature statistics. Expected a pair of tensors \(std, mean\), or a check"


@pytest.fixture
def save(tmp_path):
    def write(content, name="file.pt"):
        torch.save(content, tmp_path / name)
        return str(tmp_path / name)

    return write


def published(**changes):
    """Random weights under the names of the published file; None leaves one out."""
    weights = {**GradientMemoryLayer().state_dict(), **changes}
    named = {f"seq_modeling_block.{n}": w for n, w in weights.items() if w is not None}
    return {"model_state_dict": named}


def ours(rule, statistics=None, backbone=BACKBONE, **record):
    """What pre-training keeps of a rule, beside other things."""
    state = {WEIGHTS + name: weight for name, weight in rule.state_dict().items()}
    std, mean = statistics or (torch.empty(0), torch.empty(0))
    state |= {STATISTICS + "std": std, STATISTICS + "mean": mean}
    state |= {"method.network.0.bias": torch.ones(2), "method._extra_state": {"rule_state": {}}}
    marked = {**learned_rule_record(rule.options(), backbone), **record}
    return {"state_dict": state, "epoch": 3, "tta_lightning": marked}


def unusual_rule():
    return MGG(lr=0.02, form="extended", hidden=5, betas=(0.8, 0.95), bias_correction="exact")


# The published file -----------------------------------------------------------------------------


def test_published_names_load(save):
    content = published()
    rule = MGG.from_checkpoint(save(content))
    weights = rule.memory.state_dict()
    assert len(weights) == 13
    for name, weight in weights.items():
        assert torch.equal(weight, content["model_state_dict"][f"seq_modeling_block.{name}"])
    assert rule.options() == MGG().options()
    assert rule.learned.statistics is None
    assert rule.learned.backbone == {}


def test_published_names_load_with_another_width(save):
    layer = GradientMemoryLayer(hidden=5)
    rule = MGG(save(published(**layer.state_dict())))
    assert rule.hidden == 5
    assert torch.equal(rule.memory.W1, layer.W1)


def test_published_weights_of_another_precision_become_float32(save):
    layer = GradientMemoryLayer().double()
    path = save(published(**layer.state_dict()))
    for weights in (read_learned_rule(path).weights, MGG(path).state_dict()):
        assert all(weight.dtype == torch.float32 for weight in weights.values())
        assert torch.equal(weights["memory.W1"], layer.W1.float())


@needs_published_files
def test_the_published_checkpoint_loads():
    rule = MGG.from_checkpoint(str(Path(SHARED) / "weights" / "mgg_ckpt.pth"), lr=0.5)
    assert sum(weight.numel() for weight in rule.parameters()) == 164
    assert all(weight.device.type == "cpu" for weight in rule.parameters())
    assert rule.memory.learnable_token_idx.item() == pytest.approx(1.27, abs=5e-3)
    assert rule.memory.learnable_ttt_lr_bias.item() == pytest.approx(1.27, abs=5e-3)
    assert rule.lr == 0.5


# Ours -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [MGG, unusual_rule])
def test_our_file_gives_the_same_rule_again(save, make):
    rule = make()
    again = MGG(save(ours(rule)))
    assert again.options() == rule.options()
    assert again.state_dict().keys() == rule.state_dict().keys()
    for name, weight in rule.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight)
    params, grads = {"a": torch.zeros(3)}, {"a": torch.tensor([1.0, -2.0, 0.5])}
    updates = [r.update(grads, r.init(params), params)[0]["a"] for r in (rule, again)]
    assert torch.equal(*updates)


def test_our_file_says_what_belongs_to_the_rule(save):
    std, mean = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([-1.0, 0.0, 1.0])
    path = save(ours(unusual_rule(), (std, mean)))
    learned = read_learned_rule(path)
    assert learned.origin == path
    assert learned.options == {
        "lr": 0.02,
        "form": "extended",
        "hidden": 5,
        "betas": [0.8, 0.95],
        "bias_correction": "exact",
    }
    assert learned.backbone == BACKBONE
    assert torch.equal(learned.statistics[0], std)
    assert torch.equal(learned.statistics[1], mean)
    assert learned.weights.keys() == unusual_rule().state_dict().keys()
    assert MGG(path).learned.backbone == BACKBONE


def test_names_are_those_that_pre_training_writes():
    module = MGGPretraining(MGTTA(make_network("gn"), unusual_rule()))
    written = {n for n in module.state_dict() if not n.startswith(("method.network.", "method._"))}
    assert written == {
        *(WEIGHTS + name for name in unusual_rule().state_dict()),
        STATISTICS + "std",
        STATISTICS + "mean",
    }


@pytest.mark.parametrize("left_out", [False, True])
def test_our_file_need_not_hold_statistics(save, left_out):
    content = ours(MGG())
    if left_out:
        del content["state_dict"][STATISTICS + "std"], content["state_dict"][STATISTICS + "mean"]
    assert read_learned_rule(save(content)).statistics is None


def test_explicit_arguments_override_those_of_the_file(save):
    path = save(ours(unusual_rule()))
    rule = MGG(
        path, lr=0.3, betas=(0.5, 0.6), bias_correction="published", mask_zero_gradients=False
    )
    assert (rule.lr, rule.betas, rule.bias_correction) == (0.3, (0.5, 0.6), "published")
    assert (rule.form, rule.hidden, rule.mask_zero_gradients) == ("extended", 5, False)
    assert MGG(path, lr=0.0).lr == 0.0
    assert MGG(path, form="extended", hidden=5).lr == 0.02


# What is wrong with a file ----------------------------------------------------------------------


def without(content, *names):
    for name in names:
        del content["state_dict"][WEIGHTS + name]
    return content


@pytest.mark.parametrize(
    ("content", "differences"),
    [
        (published(**{"q_proj.weight": None}), ["1 diff", "missing memory.q_proj.weight"]),
        (published(W1=None), ["1 diff", "missing memory.W1"]),
        (published(gate=torch.ones(2)), ["1 diff", "unexpected memory.gate"]),
        (
            published(**{"k_proj.weight": torch.ones(8, 3)}),
            ["1 diff", "shape of memory.k_proj.weight is [8, 3], not [8, 2]"],
        ),
        (
            published(W1=torch.ones(1, 4, 4)),
            ["9 diff", "shape of memory.q_proj.weight is [8, 2], not [4, 2]"],
        ),
        (
            without(ours(unusual_rule()), "log_scale", "memory.b1"),
            ["2 diff", "missing log_scale", "missing memory.b1"],
        ),
    ],
)
def test_weights_with_other_names_or_sizes(save, content, differences):
    path = save(content)
    with pytest.raises(InputError, match=re.escape(path)) as caught:
        MGG(path)
    for words in differences:
        assert words in str(caught.value)


def test_a_form_that_contradicts_the_file(save):
    path = save(ours(MGG()))
    with pytest.raises(InputError, match=r"has form = published, .* Leave form out") as caught:
        MGG(path, form="extended")
    assert path in str(caught.value)
    path = save(ours(MGG(form="extended")))
    with pytest.raises(InputError, match=r"has form = extended, .* Leave form out") as caught:
        MGG(path, form="published")
    assert path in str(caught.value)


def test_a_width_that_contradicts_the_file(save):
    path = save(ours(MGG()))
    with pytest.raises(InputError, match=r"has hidden = 8, but hidden = 4 .* Leave hidden out"):
        MGG(path, hidden=4)


@pytest.mark.parametrize("lacking", ["state_dict", "rule", "backbone"])
def test_a_record_that_lacks_something(save, lacking):
    content = ours(MGG())
    content = {name: value for name, value in content.items() if name != lacking}
    content["tta_lightning"].pop(lacking, None)
    with pytest.raises(InputError, match=f"is damaged or incomplete .*{lacking}"):
        MGG(save(content))


@pytest.mark.parametrize("w1", [torch.tensor(1.0), "words"], ids=["scalar", "text"])
def test_published_names_with_something_else_below_them(save, w1):
    with pytest.raises(InputError, match="is damaged or incomplete"):
        MGG(save(published(W1=w1)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"tta_lightning": 3}, "is of another kind"),
        ({"tta_lightning": {}}, "is of another kind"),
        ({"weight": torch.ones(2)}, NO_RULE),
        ({"model_state_dict": {"layer.weight": torch.ones(2)}}, NO_RULE),
        ([1, 2], NO_RULE),
        (torch.ones(3), NO_RULE),
        (ours(MGG(), format=2), "has format 2; this version reads format 1. Update tta_lightning"),
        (ours(MGG(), format=None), "has format None; this version reads format 1"),
    ],
)
def test_a_file_without_a_rule_of_ours(save, content, message):
    path = save(content)
    with pytest.raises(InputError, match=message) as caught:
        MGG.from_checkpoint(path)
    assert path in str(caught.value)


def test_a_checkpoint_of_source_training(save):
    network = make_network("bn")
    state = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
    path = save({"state_dict": state, "tta_lightning": checkpoint_record(network)})
    message = "holds no learned rule: it is of kind 'source'. Expected a checkpoint"
    with pytest.raises(InputError, match=message):
        MGG(path)


@pytest.mark.parametrize("read", [MGG, read_learned_rule, read_statistics])
def test_a_file_that_cannot_be_read(save, tmp_path, read):
    with pytest.raises(InputError, match=r"There is no weight file .*nowhere.pth'. Give the"):
        read(str(tmp_path / "nowhere.pth"))
    damaged = Path(save(published(), "damaged.pth"))
    damaged.write_bytes(damaged.read_bytes()[:2000])
    with pytest.raises(InputError, match=r"damaged.pth' cannot be read .* it is damaged"):
        read(str(damaged))


def test_options_of_the_file_out_of_range(save):
    content = ours(MGG())
    content["tta_lightning"]["rule"]["form"] = "simplified"
    with pytest.raises(InputError, match="Unknown form of MGG 'simplified'"):
        MGG(save(content))


# Feature statistics -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [tuple, list])
def test_statistics_of_a_pair(save, kind):
    std, mean = torch.tensor([0.5, 2.0]), torch.tensor([-1.0, 3.0])
    found = read_statistics(save(kind((std, mean))))
    assert torch.equal(found[0], std)
    assert torch.equal(found[1], mean)


def test_statistics_of_our_checkpoint(save):
    std, mean = torch.tensor([0.5, 2.0]), torch.tensor([-1.0, 3.0])
    found = read_statistics(save(ours(MGG(), (std, mean))))
    assert torch.equal(found[0], std)
    assert torch.equal(found[1], mean)


@needs_published_files
def test_statistics_of_the_published_file():
    std, mean = read_statistics(Path(SHARED) / "weights" / "train_info.pt")
    assert std.shape == mean.shape == (9216,)
    assert std.min() > 0 > mean.min()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ((torch.ones(2),) * 3, NO_STATISTICS),
        ((torch.ones(2), 1.0), NO_STATISTICS),
        ({"std": torch.ones(2), "mean": torch.ones(2)}, NO_STATISTICS),
        (torch.ones(2, 5), NO_STATISTICS),
        (ours(MGG()), NO_STATISTICS),
        (published(), NO_STATISTICS),
        ({"tta_lightning": {"kind": "source"}}, "it is of kind 'source'"),
    ],
)
def test_a_file_without_statistics(save, content, message):
    path = save(content)
    with pytest.raises(InputError, match=message) as caught:
        read_statistics(path)
    assert path in str(caught.value)
