"""STAG on the loop: every host, many networks, refusals, what it logs and what it leaves."""

import copy
import csv
from types import SimpleNamespace

import pytest
import timm
import torch
import torchvision
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from tests.conftest import read_csv, read_json
from tests.loops.test_adaptation import Logits, quiet
from tests.methods.test_stag import naive_anchor, naive_cosines
from tests.networks import make_batches, make_network
from tests.streams import make_source, make_stream
from tests.test_cli import digits_adapt
from tta_lightning.callbacks import STAG, AdaptCallback
from tta_lightning.errors import InputError
from tta_lightning.methods import EATA, MGTTA, SAR, BNStats, CoTTA, DeYO, Source, Tent
from tta_lightning.methods.stag import StagTerm
from tta_lightning.models.anchors import unit_anchors
from tta_lightning.models.heads import find_head
from tta_lightning.rules import MGG, SGD, Adam

OPTIONS = {"space": "feature", "anchors": "input", "scope": "host", "unit": "cosine"}
BATCHES = 6  # of the stream: 5, 5 and 2 images of each of two corruptions


def stag(weight=1.0, **options):
    return STAG(weight, **{**OPTIONS, **options})


def sharp_network(norm="gn"):
    """Entropies around 1 nat, on both sides of MARGIN."""
    network = make_network(norm)
    with torch.no_grad():
        find_head(network).module.weight.mul_(10)
    return network


def slow():
    return SGD(lr=0.01, momentum=0.9)


class NothingSelected(Tent):
    def loss(self, out, images):
        out.selected = torch.zeros(len(images), dtype=torch.bool)
        return super().loss(out, images)


class EverySecond(Tent):
    """Learns from the batches 0, 2 and 4, from all but the first of their samples."""

    batch = -1

    def loss(self, out, images):
        self.batch += 1
        out.selected = torch.arange(len(images)) > 0
        return super().loss(out, images) if self.batch % 2 == 0 else None


MARGIN = 1.03
ETA = {"d_margin": 2.0, "fisher_alpha": 0.0}
DRAWN = {"plpd_threshold": -1.0}
HOSTS = {  # the margin is that of the entropy in nats, where a host filters by it
    "tent-sgd": lambda net, _=0: Tent(net, slow()),
    "tent-adam": lambda net, _=0: Tent(net, Adam(lr=0.01)),
    "mgtta": lambda net, _=0: MGTTA(net, seeded_mgg()),
    "eata": lambda net, e=MARGIN: EATA(net, slow(), e_margin=e, d_margin=2.0, fisher_alpha=1.0),
    "sar": lambda net, e=MARGIN: SAR(net, slow(), margin_e0=e, rho=1e-3, reset_constant=0.0),
    "deyo": lambda net, e=MARGIN: DeYO(net, slow(), deyo_margin=e, **DRAWN),
    "cotta": lambda net, _=0: CoTTA(net, slow(), n_augmentations=2),
}
IDLE = {
    "tent": lambda net: NothingSelected(net, Adam(lr=0.01)),
    "eata": lambda net: EATA(net, slow(), e_margin=0.0, **ETA),
    "sar": lambda net: SAR(net, slow(), margin_e0=0.0),
    "deyo": lambda net: DeYO(net, slow(), deyo_margin=0.0),
}
every_host = pytest.mark.parametrize("make", HOSTS.values(), ids=HOSTS)


def seeded_mgg():
    torch.manual_seed(3)
    return MGG(lr=0.01)


def run(adapter, *callbacks, **options):
    """Adapt to the stream; logits [24, C], everything that may have moved, and the figures."""
    kept = Logits()
    stream = make_stream(clean=make_source(seed=9))
    results = quiet(kept, *callbacks, **options).adapt(adapter, datamodule=stream)
    held = (adapter.network.state_dict(), adapter.rule_state, adapter.memory)
    return kept.stacked(), torch.utils._pytree.tree_leaves(held), results


def are_equal(first, second):
    (logits, state, _), (others, other_state, _) = first, second
    pairs = zip([logits, *state], [others, *other_state], strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


def counts(results):
    return tuple(results["cost"][f"{what}_per_batch"] for what in ("forwards", "backwards"))


@pytest.fixture
def calls(monkeypatch):
    """What each call of a term was given, and the alignment it found."""
    seen, original = [], StagTerm.__call__

    def spy(self, out, head):
        loss = original(self, out, head)
        given = {"features": out.features, "logits": out.logits, "anchors": self.anchors}
        given |= {"selected": out.selected, "weight": head.weight, "bias": head.bias}
        copies = {k: None if t is None else t.detach().clone() for k, t in given.items()}
        seen.append(SimpleNamespace(**copies, alignment=self.alignment, loss=loss))
        return loss

    monkeypatch.setattr(StagTerm, "__call__", spy)
    return seen


def alignment_of(call, source):
    """The mean cosine of the selected samples in the space `feature`, written out naively."""
    kept = slice(None) if call.selected is None else call.selected
    features, logits = call.features[kept].double(), call.logits[kept].double()
    anchor = naive_anchor(source.double(), "input")
    return naive_cosines(features, logits, call.weight.double(), anchor, "feature").mean().item()


# Hosts --------------------------------------------------------------------------------------------


@every_host
def test_a_weight_of_zero_leaves_the_host_as_it_is(make):
    host = run(make(sharp_network()))
    assert are_equal(run(make(sharp_network()), stag(0.0)), host)
    assert not are_equal(run(make(sharp_network()), stag(1.0)), host)


def test_a_weight_of_zero_asks_for_no_head_and_no_loss():
    for make in (lambda: Source(sharp_network()), REFUSED["norm behind"][0]):
        host, ours = run(make()), run(make(), stag(0.0))
        assert are_equal(ours, host)
        assert ours[2]["stag"] == {"alignment": None}


@pytest.mark.parametrize("make", IDLE.values(), ids=IDLE)
def test_a_host_that_selects_nothing_is_left_as_it_is(make):
    host, callback = run(make(sharp_network())), stag(100.0)
    ours = run(make(sharp_network()), callback)
    assert are_equal(ours, host)
    assert counts(ours[2]) == counts(host[2])
    assert ours[2]["stag"]["alignment"] is None


@every_host
def test_no_forward_and_no_backward_is_added(make, monkeypatch):
    found, original, backwards = [], torch.autograd.grad, []
    monkeypatch.setattr(
        torch.autograd, "grad", lambda *a, **kw: backwards.append(0) or original(*a, **kw)
    )
    for callbacks in ([], [stag()]):
        backwards.clear()
        results = run(make(sharp_network(), 9.0), *callbacks)[2]  # 9: all samples are kept
        found.append((*counts(results), len(backwards)))
    assert found[0] == found[1]
    assert found[1][1] == (2 if make is HOSTS["sar"] else 1)


@every_host
def test_a_term_gets_the_features_that_make_the_logits(make, calls):
    source = find_head(sharp_network()).weight
    results = run(make(sharp_network()), stag(0.01))[2]
    assert len(calls) >= 3
    for call in calls:
        rebuilt = F.linear(call.features, call.weight, call.bias)
        torch.testing.assert_close(call.logits, rebuilt, rtol=0, atol=1e-5)
        assert call.alignment.item() == pytest.approx(alignment_of(call, source), abs=1e-5)
    assert results["stag"]["classes"] == 10
    assert results["stag"]["reversed_classes"] == 0


def test_both_passes_of_sar_get_the_term_with_their_own_features(calls):
    adapter = SAR(sharp_network(), slow(), margin_e0=9.0, reset_constant=0.0)
    logits, _, results = run(adapter, stag())
    assert len(calls) == 2 * BATCHES
    before, there = calls[::2], calls[1::2]
    assert torch.equal(torch.cat([call.logits for call in before]), logits)
    for first, second in zip(before, there, strict=True):
        assert first.features.shape == second.features.shape
        assert not torch.equal(first.features, second.features)
    mean = sum(call.alignment.item() for call in there) / BATCHES  # the last pass counts
    assert results["stag"]["alignment"] == pytest.approx(mean, abs=1e-6)


def test_deyo_aligns_the_original_images(calls):
    adapter = DeYO(sharp_network(), slow(), deyo_margin=9.0, **DRAWN)
    logits, _, results = run(adapter, stag())
    assert counts(results) == (2, 1)  # the second forward sees the destroyed images
    assert torch.equal(torch.cat([call.logits for call in calls]), logits)


def test_only_the_samples_that_the_host_selects_count(calls):
    run(EATA(sharp_network(), slow(), e_margin=MARGIN, **ETA), stag(0.01))
    assert {bool(chosen) for call in calls for chosen in call.selected} == {True, False}


def test_anchors_stay_those_of_the_source_where_the_head_moves(calls):
    source = find_head(sharp_network()).weight.clone()
    run(CoTTA(sharp_network(), slow(), n_augmentations=2), stag())
    expected = unit_anchors(source, kind="input").directions.float()
    assert len(calls) == BATCHES
    assert all(torch.equal(call.anchors, expected) for call in calls)
    assert not torch.equal(calls[-1].weight, source)  # the student's, after two steps
    assert torch.equal(calls[3].weight, source)  # reset between the two corruptions


# Networks -----------------------------------------------------------------------------------------


def convolution_head():
    body = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*body, nn.Conv2d(8, 10, 1), nn.Flatten())


NETWORKS = {
    "batch norm": lambda: make_network("bn"),
    "group norm": lambda: make_network("gn"),
    "layer norm": lambda: make_network("ln"),
    "convolution": convolution_head,
    "timm resnet": lambda: timm.create_model("resnet18", num_classes=10),
    "timm vit": lambda: timm.create_model(
        "vit_tiny_patch16_224", num_classes=10, img_size=32, depth=2
    ),
    "torchvision": lambda: torchvision.models.mobilenet_v3_small(num_classes=10),
}


@pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS)
def test_networks_and_heads(build, calls):
    torch.manual_seed(0)
    network = build()
    source = find_head(network).weight.clone()
    copy.deepcopy(network)
    results = run(Tent(network, SGD(lr=1e-3)), stag())[2]
    assert len(calls) == BATCHES
    assert torch.equal(calls[-1].anchors, unit_anchors(source, kind="input").directions.float())
    mean = sum(alignment_of(call, source) for call in calls) / BATCHES
    assert results["stag"]["alignment"] == pytest.approx(mean, abs=1e-4)
    entropy = unit_anchors(source, kind="self").entropy.mean().item()
    assert results["stag"]["self_structural_entropy"] == pytest.approx(entropy)
    copy.deepcopy(network)
    assert not find_head(network).module._forward_pre_hooks


def test_a_subset_of_the_classes_has_anchors_of_its_own(calls):
    adapter = Tent(sharp_network(), slow())
    adapter.restrict_classes([7, 2, 5])
    source = find_head(adapter.network).weight[[7, 2, 5]].clone()
    loader = DataLoader(torch.cat(make_batches(2)), batch_size=16)
    results = quiet(stag()).adapt(adapter, dataloaders=loader)
    assert results["stag"]["classes"] == 3
    anchors = unit_anchors(source, kind="input").directions.float()
    for call in calls:
        assert torch.equal(call.anchors, anchors)
        call.weight = call.weight[[7, 2, 5]]
    mean = sum(alignment_of(call, source) for call in calls) / 2
    assert results["stag"]["alignment"] == pytest.approx(mean, abs=1e-5)


def test_reversed_classes_are_warned_of_and_counted():
    network = sharp_network()
    weight = find_head(network).module.weight
    weight.data[2], weight.data[6] = 0.5 * weight.data[4], 0.9 * weight.data[8]
    twin = copy.deepcopy(network)
    with pytest.warns(UserWarning, match=r"2 of 10 classes .* own row of '8' \(class 2, 6\)"):
        results = run(Tent(network, slow()), stag(space="row", anchors="self"))[2]
    assert results["stag"]["reversed_classes"] == 2
    run(Tent(twin, slow()), stag(row_normalize=True, temperature=2.0))  # no warning


REFUSED = {
    "source": (lambda: Source(sharp_network()), "to the loss of a method, but Source moves no"),
    "statistics": (lambda: BNStats(make_network("bn")), "but BNStats moves no parameter.*Tent"),
    "no head": (
        lambda: Tent(timm.create_model("resnet18", num_classes=0)),
        "no single linear head: found Identity",
    ),
    "two heads": (
        lambda: Tent(timm.create_model("deit_tiny_distilled_patch16_224", depth=1)),
        r"no single linear head: found 2 heads \(Linear, Linear\)",
    ),
    "norm behind": (
        lambda: Tent(nn.Sequential(make_network("gn"), nn.BatchNorm1d(10))),
        "no single linear head: found a? ?BatchNorm1d",
    ),
}


@pytest.mark.parametrize("why", REFUSED)
def test_methods_and_networks_that_are_refused(why):
    make, message = REFUSED[why]
    adapter = make()
    with pytest.raises(InputError, match=message):
        run(adapter, stag())
    assert adapter.terms == []


# The run ------------------------------------------------------------------------------------------


class Watch(AdaptCallback):
    """Keeps the terms and their anchors at every batch, and breaks off after some of them."""

    def __init__(self, stop=None):
        self.stop, self.terms, self.anchors = stop, [], []

    def on_adapt_batch_end(self, trainer, adapter, logits, batch, batch_idx):
        self.terms.append(list(adapter.terms))
        self.anchors.append(adapter.terms[-1].anchors.clone())
        if batch_idx == self.stop:
            raise RuntimeError("enough")


@pytest.mark.parametrize("stop", [None, 1])
def test_the_term_is_attached_during_the_run_alone(stop):
    def other(out, head):
        return out.logits.new_zeros(())

    adapter, watch = Tent(sharp_network(), slow()), Watch(stop)
    adapter.terms.append(other)
    if stop is None:
        run(adapter, stag(), watch)
    else:
        with pytest.raises(RuntimeError, match="enough"):
            run(adapter, stag(), watch)
    assert adapter.terms == [other]
    assert len(watch.terms) == (BATCHES if stop is None else 2)
    for first, second in watch.terms:
        assert first is other
        assert isinstance(second, StagTerm)
    expected = unit_anchors(find_head(sharp_network()).weight, kind="input").directions.float()
    assert all(torch.equal(anchors, expected) for anchors in watch.anchors)


def test_a_callback_runs_again_as_if_it_were_new():
    callback = stag()
    first = run(Tent(sharp_network(), slow()), callback)
    other = run(Tent(make_network("ln"), slow()), callback)
    again = run(Tent(sharp_network(), slow()), callback)
    assert are_equal(first, again)
    assert first[2]["stag"] == again[2]["stag"] != other[2]["stag"]


def test_batches_without_an_alignment_are_left_out_of_the_mean(calls, tmp_path):
    source = find_head(sharp_network()).weight
    logger = CSVLogger(tmp_path, name="logs", version="")
    results = run(EverySecond(sharp_network(), slow()), stag(), logger=[logger])[2]
    found = [alignment_of(call, source) for call in calls]
    assert results["stag"]["alignment"] == pytest.approx(sum(found) / 3, abs=1e-6)
    rows = list(csv.DictReader((tmp_path / "logs" / "metrics.csv").read_text().splitlines()))
    for name, batches, mean in (
        ("contrast-3", 3, sum(found[:2]) / 2),
        ("gaussian_noise-3", 6, found[2]),
    ):
        (row,) = (row for row in rows if row[f"{name}/stag_alignment"])
        assert int(row["step"]) == batches
        assert float(row[f"{name}/stag_alignment"]) == pytest.approx(mean, abs=1e-6)


def test_the_command_line_turns_it_on_with_one_flag(tta, digits_checkpoint, tmp_path):
    flags = [f"--trainer.callbacks.{name}={value}" for name, value in OPTIONS.items()]
    given = ("--trainer.callbacks+=STAG", "--trainer.callbacks.weight=1", *flags)
    outcome = tta(
        tmp_path, *digits_adapt("tent", digits_checkpoint, *given, "--trainer.run_dir", "run")
    )
    assert (outcome.code, outcome.err) == (0, "")
    manifest, metrics = (read_json(tmp_path / "run" / f"{n}.json") for n in ("manifest", "metrics"))
    plain = {"row_normalize": False, "temperature": 1.0, "use_bias": False}
    assert manifest["callbacks"]["STAG"] == {"weight": 1.0, **OPTIONS, **plain}
    assert (metrics["stag"]["classes"], metrics["stag"]["reversed_classes"]) == (10, 0)
    rows = read_csv(tmp_path / "run" / "logs" / "metrics.csv")
    segments = [
        float(row[key])
        for key in ("none/stag_alignment", "contrast-3/stag_alignment")
        for row in rows
        if row[key]
    ]
    assert len(segments) == 2  # of three batches each
    assert metrics["stag"]["alignment"] == pytest.approx(sum(segments) / 2, abs=1e-6)
    assert -1 <= metrics["stag"]["alignment"] <= 1
