"""SAR against the published implementation and against its equations written out by hand."""

import copy
import math
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from tests.networks import golden_network, head_of, make_batches, make_network, sharp_network
from tta_lightning.errors import InputError
from tta_lightning.methods.sar import SAR
from tta_lightning.rules import SGD

GOLDEN = Path(__file__).parents[1] / "golden" / "reference_methods.pt"
KEY = "sar_sgd1e-3_m0.9_rho0.05_margin0.4lnK_gn"
KINDS = ("weight", "bias")
NORMS = (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)
LR, MOMENTUM, RHO = 0.02, 0.9, 0.05


def batches_of(count=5):
    return [images.double() for images in make_batches(count)]


def make_sar(network, **options):
    return SAR(network, SGD(lr=LR, momentum=MOMENTUM), **options)


def forward_by_hand(network, images):
    """Logits [B, C], entropies [B] in nats and the input of the head [B, D]."""
    seen = []
    handle = head_of(network).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    logits = network(images)
    handle.remove()
    p = logits.exp() / logits.exp().sum(1, keepdim=True)
    return logits, -(p * p.log()).sum(1), seen[0]


class SARByHand:
    """The equations of the paper in a plain loop, with torch's SGD and Python's numbers."""

    def __init__(self, network, margin, rho=RHO, e0=0.2, keeps_average=False, term=0.0):
        self.network = network.train()  # no dropout in there: only batch normalisation minds
        self.moving = [p for m in network.modules() if isinstance(m, NORMS) for p in m.parameters()]
        self.source = [p.detach().clone() for p in self.moving]
        self.margin, self.rho, self.e0 = margin, rho, e0
        self.keeps_average, self.term = keeps_average, term
        self.average, self.kept, self.resets = None, [], 0
        self.optimizer = self.new_optimizer()

    def new_optimizer(self):
        return torch.optim.SGD(self.moving, lr=LR, momentum=MOMENTUM)

    def objective(self, entropies, features, ids):
        loss = sum(entropies[i] for i in ids) / len(ids)
        return loss + self.term * sum(features[i].square().mean() for i in ids) / len(ids)

    def step(self, images):
        logits, entropies, features = forward_by_hand(self.network, images)
        first = [i for i, h in enumerate(entropies.tolist()) if h < self.margin]
        self.kept.append([len(first), 0])
        if not first:
            return logits.detach()
        grads = torch.autograd.grad(self.objective(entropies, features, first), self.moving)
        length = math.sqrt(sum((g**2).sum().item() for g in grads))
        before = [p.detach().clone() for p in self.moving]
        for p, g in zip(self.moving, grads, strict=True):
            p.data = p.data + self.rho * g / length
        _, entropies, features = forward_by_hand(self.network, images)
        second = [i for i in first if entropies[i].item() < self.margin]
        self.kept[-1][1] = len(second)
        if second:
            grads = torch.autograd.grad(self.objective(entropies, features, second), self.moving)
        for p, g, old in zip(self.moving, grads, before, strict=True):
            p.data, p.grad = old, g
        if second:
            self.optimizer.step()
            self.watch(sum(entropies[i].item() for i in second) / len(second))
        return logits.detach()

    def watch(self, value):
        self.average = value if self.average is None else 0.9 * self.average + 0.1 * value
        if self.average < self.e0:
            self.resets += 1
            for p, source in zip(self.moving, self.source, strict=True):
                p.data = source.clone()
            self.optimizer = self.new_optimizer()
            self.average = self.average if self.keeps_average else None


def assert_equal_streams(adapter, by_hand, batches):
    for images in batches:
        expected = by_hand.step(images)
        torch.testing.assert_close(adapter.adapt_step(images), expected, rtol=0, atol=1e-9)
    pairs = zip(adapter.network.named_parameters(), by_hand.network.parameters(), strict=True)
    for (name, p), q in pairs:
        torch.testing.assert_close(p, q, rtol=0, atol=1e-10, msg=name)
    average = adapter.memory.get("entropy")
    assert (average is None) == (by_hand.average is None)
    assert average is None or average.item() == pytest.approx(by_hand.average, abs=1e-10)


def features_of_kept(out, head):
    """A term that is easy to write by hand."""
    return 3.0 * out.features[out.selected].square().mean()


def test_equals_the_published_implementation():
    golden = torch.load(GOLDEN, weights_only=True)
    network = golden_network("gn")
    network.load_state_dict(golden[KEY]["init"])
    adapter = SAR(network, SGD(lr=1e-3, momentum=0.9), legacy=True)
    # Logits reach 6.5 and the source model alone rounds differently on another processor; measured
    # here: 3e-7 of the largest logit.
    tolerance = 1e-6 * golden[KEY]["logits"].abs().max().item()
    for images, logits in zip(golden["batches"], golden[KEY]["logits"], strict=True):
        torch.testing.assert_close(adapter.adapt_step(images), logits, rtol=0, atol=tolerance)
    final = network.state_dict()
    for name, tensor in golden[KEY]["final"].items():
        torch.testing.assert_close(final[name], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("norm", "factor", "margin", "rho", "first"),
    [
        ("bn", 20, 1.2, 0.05, [8, 6]),
        ("gn", 10, 1.2, 0.05, [6, 3]),
        ("gn", 10, 1.2, 0.3, [6, 0]),  # the ascent takes all samples over the margin
        ("gn", 10, 0.8, 0.05, [0, 0]),  # none is below it
        ("bn", 20, 0.8, 0.0, [1, 1]),  # without ascent, and the fifth batch has none
        ("ln", 10, None, 0.05, [15, 14]),
    ],
)
@pytest.mark.parametrize("term", [0.0, 3.0])
def test_equals_the_equations_written_by_hand(norm, factor, margin, rho, first, term):
    default = 0.4 * math.log(10)
    by_hand = SARByHand(
        sharp_network(norm, factor), default if margin is None else margin, rho, term=term
    )
    adapter = make_sar(sharp_network(norm, factor), margin_e0=margin, rho=rho)
    if term:
        adapter.terms.append(features_of_kept)
    assert_equal_streams(adapter, by_hand, batches_of())
    if not term:
        assert by_hand.kept[0] == first  # the case is the one it is meant to be


@pytest.mark.parametrize(
    ("norm", "factor", "margin", "rho", "options", "resets"),
    [
        ("ln", 20, 0.8, 0.05, {}, 1),
        ("ln", 20, 0.8, 0.05, {"legacy": True}, 1),  # what is kept of the average differs
        ("bn", 100, 0.8, 0.3, {}, 4),
        ("bn", 100, 0.8, 0.3, {"legacy": True}, 8),  # after every batch
        ("ln", 20, 1.2, 0.05, {"reset_constant": 0.26}, 1),
        ("ln", 20, 1.2, 0.05, {"reset_constant": 0.0}, 0),
    ],
)
def test_recovery_equals_the_equations_written_by_hand(norm, factor, margin, rho, options, resets):
    by_hand = SARByHand(
        sharp_network(norm, factor),
        margin,
        rho,
        options.get("reset_constant", 0.2),
        keeps_average=options.get("legacy", False),
    )
    adapter = make_sar(sharp_network(norm, factor), margin_e0=margin, rho=rho, **options)
    reasons = []
    for images in batches_of(8):
        assert_equal_streams(adapter, by_hand, [images])
        reasons.append(adapter.report.reason)
    assert by_hand.resets == resets
    assert sum("reset to the source" in reason for reason in reasons) == resets


def test_terms_do_not_hold_off_the_recovery():
    adapter = make_sar(sharp_network("bn", 100), margin_e0=0.8, rho=0.3)
    adapter.terms.append(lambda out, head: 10.0 + 0.0 * out.logits.sum())
    adapter.adapt_step(batches_of(1)[0])
    assert "reset to the source" in adapter.report.reason
    assert adapter.report.reset
    assert adapter.report.loss > 10
    assert adapter.memory == {}


def test_a_reset_from_outside_forgets_the_average_also_in_legacy():
    adapter = make_sar(sharp_network("bn", 100), margin_e0=0.8, rho=0.3, legacy=True)
    adapter.adapt_step(batches_of(1)[0])
    assert adapter.memory["entropy"] < 0.2
    adapter.reset()
    assert adapter.memory == {}


def test_terms_see_the_samples_of_their_own_pass():
    adapter = make_sar(sharp_network("bn", 20), margin_e0=1.2)
    seen = []

    def term(out, head):
        seen.append((out.logits.detach(), out.selected))
        return out.logits.sum() * 0

    adapter.terms.append(term)
    images = batches_of(1)[0]
    adapter.adapt_step(images)
    (before, first), (there, second) = seen
    assert torch.equal(before, forward_by_hand(sharp_network("bn", 20).train(), images)[0])
    assert not torch.equal(before, there)
    assert (first.sum().item(), second.sum().item()) == (8, 6)
    assert not (second & ~first).any()


@pytest.mark.parametrize("legacy", [False, True])
def test_nothing_kept_moves_neither_state_nor_average(legacy):
    adapter = make_sar(sharp_network("gn", 10), margin_e0=1.2, legacy=legacy)
    adapter.adapt_step(batches_of(1)[0])
    state = copy.deepcopy((adapter.network.state_dict(), adapter.rule_state, adapter.memory))
    for margin, rho in ((0.1, 0.05), (1.2, 0.3)):  # in the first pass, in the second
        adapter.margin_e0, adapter.rho = margin, rho
        adapter.adapt_step(batches_of(1)[0])
        assert not adapter.report.updated
        assert adapter.report.finite
        assert "sure" in adapter.report.reason
        now = (adapter.network.state_dict(), adapter.rule_state, adapter.memory)
        leaves = torch.utils._pytree.tree_leaves
        assert all(map(torch.equal, leaves(state), leaves(now)))


@pytest.mark.parametrize("fault", ["raises", "not finite"])
@pytest.mark.parametrize("forward", [0, 1])
def test_no_ascent_is_left_behind(fault, forward):
    adapter = make_sar(sharp_network("gn", 10), margin_e0=1.2)
    adapter.ready()
    source = copy.deepcopy(adapter.network.state_dict())
    weights = []

    def term(out, head):
        weights.append(adapter.network[1].weight.detach().clone())
        if len(weights) <= forward:
            return out.logits.sum() * 0
        if fault == "raises":
            raise RuntimeError("of the user's")
        return out.logits.sum() * math.nan

    adapter.terms.append(term)
    if fault == "raises":
        with pytest.raises(RuntimeError, match="of the user's"):
            adapter.adapt_step(batches_of(1)[0])
    else:
        with pytest.warns(UserWarning, match="not finite"):
            adapter.adapt_step(batches_of(1)[0])
        assert not adapter.report.finite
    assert torch.equal(weights[-1], source["1.weight"]) == (forward == 0)
    assert all(torch.equal(t, source[n]) for n, t in adapter.network.state_dict().items())
    assert adapter.memory == {}


def test_the_default_margin_counts_the_classes_that_are_left():
    images, classes = batches_of(1)[0], [7, 2, 5]
    adapter = make_sar(sharp_network("bn", 40))
    adapter.restrict_classes(classes)
    adapter.ready()
    out = adapter.outputs(images)
    adapter.loss(out, images)
    p = sharp_network("bn", 40).train()(images)[:, classes].softmax(1)
    kept = -(p * p.log()).sum(1) < 0.4 * math.log(3)
    assert 0 < kept.sum() < 16
    assert torch.equal(out.selected, kept)


@pytest.mark.parametrize("skip_top", [True, False])
def test_the_last_quarter_stays_fixed(skip_top):
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "depth": 4, "embed_dim": 48, "num_heads": 3}
    network = timm.create_model("vit_tiny_patch16_224", num_classes=5, **sizes)
    adapter = make_sar(network, margin_e0=5.0, skip_top=skip_top)
    moved = [f"blocks.{i}.norm{j}.{kind}" for i in range(3) for j in (1, 2) for kind in KINDS]
    top = [
        f"{name}.{kind}" for name in ("blocks.3.norm1", "blocks.3.norm2", "norm") for kind in KINDS
    ]
    assert list(adapter.adapted_parameters) == (moved if skip_top else moved + top)
    source = copy.deepcopy(network.state_dict())
    adapter.adapt_step(make_batches(1)[0])
    changed = {n for n, t in network.state_dict().items() if not torch.equal(t, source[n])}
    assert changed == set(adapter.adapted_parameters)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"margin_e0": -0.1}, "margin_e0 = -0.1"),
        ({"margin_e0": math.nan}, "margin_e0 = nan"),
        ({"rho": -1.0}, "rho = -1.0"),
        ({"reset_constant": -0.2}, "reset_constant = -0.2"),
        ({"reset_constant": 0.3, "legacy": True}, "no effect with legacy=True"),
    ],
)
def test_wrong_hyper_parameters(options, message):
    with pytest.raises(InputError, match=message):
        SAR(make_network("gn"), **options)


def test_describes_itself():
    assert SAR(make_network("gn")).describe()["hyper_parameters"] == {
        "margin_e0": None,
        "rho": 0.05,
        "reset_constant": 0.2,
        "legacy": False,
        "skip_top": True,
    }
