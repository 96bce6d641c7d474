"""EATA and ETA against the published implementation and against a loop written by hand."""

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.networks import (
    are_equal,
    coloured_squares,
    golden_network,
    make_batches,
    make_network,
    sharp_network,
    tensors_of,
)
from tta_lightning.errors import InputError
from tta_lightning.methods.eata import EATA
from tta_lightning.rules import SGD, Adam

GOLDEN = Path(__file__).parents[1] / "golden" / "reference_methods.pt"
ETA_KEY = "eta_sgd2.5e-3_m0.9_emargin0.4lnK_dmargin0.97_bn"
EATA_KEY = "eata_fisheralpha2000_sgd2.5e-3_m0.9_emargin0.4lnK_dmargin0.97_bn"
MARGIN = 0.6 * math.log(10)  # nats; about half of the samples below are surer


def never_read():
    raise AssertionError("clean images were read")
    yield


def moving_parameters(network):
    kinds = (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)
    return {
        f"{name}.{kind}": parameter
        for name, module in network.named_modules()
        if isinstance(module, kinds)
        for kind, parameter in module.named_parameters()
    }


def fisher_by_hand(network, batches):
    """Squared gradients of the cross-entropy against the predicted classes, batch by batch."""
    moving = moving_parameters(network)
    sums = [torch.zeros_like(parameter) for parameter in moving.values()]
    for images in batches:
        logits = network(images)
        cross_entropy = sum(row.logsumexp(0) - row.max() for row in logits) / len(images)
        grads = torch.autograd.grad(cross_entropy, list(moving.values()))
        sums = [total + grad * grad for total, grad in zip(sums, grads, strict=True)]
    return {name: total / len(batches) for name, total in zip(moving, sums, strict=True)}


class ByHand:
    """The equations, one sample at a time. Counts what the filters did."""

    def __init__(self, network, e_margin, d_margin, alpha=0.0, fisher=None, term=None):
        network.train()  # no dropout in there: this only affects batch normalisation
        self.network, self.term = network, term
        self.e_margin, self.d_margin = e_margin, d_margin
        self.alpha, self.fisher = alpha, fisher or {}
        self.moving = moving_parameters(network)
        self.source = {name: p.detach().clone() for name, p in self.moving.items()}
        self.optimizer = torch.optim.SGD(self.moving.values(), lr=0.01, momentum=0.9)
        self.average = None
        self.unsure, self.redundant = [], []

    def keeps(self, p):
        if -(p * p.log()).sum() >= self.e_margin:
            self.unsure[-1] += 1
            return False
        if self.average is None:
            return True
        cosine = (p @ self.average) / (p.norm() * self.average.norm())
        if abs(cosine) >= self.d_margin:
            self.redundant[-1] += 1
            return False
        return True

    def step(self, images):
        logits = self.network(images)
        probabilities = logits.softmax(1)
        self.unsure.append(0)
        self.redundant.append(0)
        self.kept = [i for i, p in enumerate(probabilities) if self.keeps(p.detach())]
        if not self.kept:
            return logits.detach(), None
        loss = 0.0
        for i in self.kept:
            p = probabilities[i]
            entropy = -(p * p.log()).sum()
            loss = loss + math.exp(self.e_margin - entropy.item()) * entropy / len(self.kept)
        for name, values in self.fisher.items():
            moved = self.moving[name] - self.source[name]
            loss = loss + self.alpha * (values * moved * moved).sum()
        if self.term is not None:
            loss = loss + self.term(self.network, images, self.kept)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        mean = torch.stack([probabilities[i].detach() for i in self.kept]).mean(0)
        self.average = mean if self.average is None else 0.9 * self.average + 0.1 * mean
        return logits.detach(), loss.detach()


@pytest.mark.parametrize("key", [ETA_KEY, EATA_KEY])
def test_equals_the_published_implementation(key):
    golden = torch.load(GOLDEN, weights_only=True)
    network = golden_network()
    network.load_state_dict(golden[key]["init"])
    adapter = EATA(network, SGD(lr=2.5e-3, momentum=0.9), d_margin=0.97)
    if key == ETA_KEY:
        adapter.fisher_alpha = 0.0
    else:
        adapter.fisher = golden["eata_fishers"]
    # See the test of Tent for the tolerance.
    tolerance = 1e-6 * golden[key]["logits"].abs().max().item()
    for images, logits in zip(golden["batches"], golden[key]["logits"], strict=True):
        torch.testing.assert_close(adapter.adapt_step(images), logits, rtol=0, atol=tolerance)
    final = network.state_dict()
    for name, tensor in golden[key]["final"].items():
        torch.testing.assert_close(final[name], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("norm", "e_margin", "d_margin"),
    [
        ("bn", MARGIN, 0.85),
        ("gn", MARGIN, 0.85),
        ("gn", MARGIN, 0.7),  # keeps nothing of some batches
        ("ln", 0.3 * math.log(10), 0.99),
    ],
)
@pytest.mark.parametrize("alpha", [0.0, 50.0])
def test_equals_a_loop_written_by_hand(norm, e_margin, d_margin, alpha):
    clean = coloured_squares(3, seed=9)
    network = sharp_network(norm)
    fisher = fisher_by_hand(sharp_network(norm).train(), [*clean[:2], clean[2][:8]])
    fisher = fisher if alpha else None
    reference = ByHand(sharp_network(norm), e_margin, d_margin, alpha, fisher)
    rule = SGD(lr=0.01, momentum=0.9)
    adapter = EATA(network, rule, e_margin, d_margin, alpha, fisher_samples=40)
    adapter.prepare(clean)
    kept = []
    for images in coloured_squares():
        logits, loss = reference.step(images)
        ours = adapter.adapt_step(images)
        kept.append(len(reference.kept))
        torch.testing.assert_close(ours, logits, rtol=0, atol=1e-11)
        assert adapter.report.updated == (kept[-1] > 0)
        if kept[-1]:
            assert adapter.report.loss.item() == pytest.approx(loss.item(), abs=1e-11)
        torch.testing.assert_close(
            adapter.memory["probabilities"], reference.average, rtol=0, atol=1e-12
        )
    assert sum(reference.unsure) > 5  # both filters had work to do
    assert sum(reference.redundant) > 5
    assert sum(kept[1:]) > 0
    assert d_margin != 0.7 or 0 in kept
    other = reference.network.state_dict()
    for name, tensor in network.state_dict().items():
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(tensor, other[name], rtol=0, atol=1e-11, msg=name)


def test_only_affine_parameters_move():
    network = sharp_network("bn")
    before = copy.deepcopy(network.state_dict())
    adapter = EATA(network, SGD(lr=0.1), MARGIN, 2.0, fisher_alpha=0)
    adapter.adapt_step(coloured_squares(1)[0])
    moved = {n for n, t in network.state_dict().items() if not torch.equal(t, before[n])}
    assert moved == {"1.weight", "1.bias", "4.weight", "4.bias"}


def test_the_default_margin_follows_the_classes_of_the_stream():
    network = make_network("gn")
    classes, images = [7, 2, 5], make_batches(1)[0]
    with torch.no_grad():  # to have some on each side of 0.4 ln 3
        network[8].weight.mul_(40)
    logits = network(images)[:, classes]
    entropies = -(logits.softmax(1) * logits.log_softmax(1)).sum(1)
    kept = entropies[entropies < 0.4 * math.log(3)]
    assert 0 < len(kept) < len(images)
    adapter = EATA(network, SGD(lr=0.0), fisher_alpha=0)
    adapter.restrict_classes(classes)
    adapter.adapt_step(images)
    expected = ((0.4 * math.log(3) - kept).exp() * kept).mean().item()
    assert adapter.report.loss.item() == pytest.approx(expected, rel=1e-4)


class TestFilters:
    def test_nothing_moves_where_no_sample_is_sure(self):
        adapter = EATA(sharp_network("gn"), Adam(lr=0.1), e_margin=1e-6, fisher_alpha=0)
        adapter.terms.append(lambda out, head: pytest.fail("a term without samples"))
        before = tensors_of(adapter)
        adapter.adapt_step(coloured_squares(1)[0])
        assert are_equal(tensors_of(adapter), before)
        assert adapter.memory == {}
        assert not adapter.report.updated
        assert adapter.rule_state["step"] == 0

    def test_nothing_moves_where_all_are_redundant(self):
        adapter = EATA(sharp_network("gn"), Adam(lr=0.01), MARGIN, d_margin=1e-3)
        adapter.prepare(coloured_squares(1, seed=9))
        first, second = coloured_squares(2)
        adapter.adapt_step(first)  # nothing to compare with yet
        assert adapter.report.updated
        weights, state, memory = tensors_of(adapter), adapter.rule_state, adapter.memory
        adapter.adapt_step(second)
        assert not adapter.report.updated  # the penalty alone is no reason to move
        assert are_equal([tensors_of(adapter), adapter.rule_state], [weights, state])
        assert are_equal(adapter.memory, memory)

    def test_the_first_batch_keeps_all_that_are_sure(self):
        reference = ByHand(sharp_network("gn"), MARGIN, 1e-3)
        images = coloured_squares(1)[0]
        reference.step(images)
        adapter = EATA(sharp_network("gn"), SGD(lr=0.1), MARGIN, 1e-3, fisher_alpha=0)
        adapter.ready()
        out = adapter.outputs(images)
        adapter.loss(out, images)
        assert out.selected.nonzero().flatten().tolist() == reference.kept
        assert 0 < len(reference.kept) < len(images)

    def test_reset_forgets_the_average(self):
        adapter = EATA(sharp_network("gn"), SGD(lr=0.1), MARGIN, 1e-3, fisher_alpha=0)
        for _ in range(2):
            adapter.adapt_step(coloured_squares(1)[0])
            assert adapter.report.updated
            adapter.reset()
            assert adapter.memory == {}

    def test_one_nan_among_images_changes_nothing(self):
        adapter = EATA(sharp_network("gn"), SGD(lr=0.01), MARGIN, 0.7, fisher_alpha=0)
        first, second = coloured_squares(2)
        adapter.adapt_step(first)
        before = [tensors_of(adapter), adapter.memory]
        second[3] = torch.nan
        with pytest.warns(UserWarning, match="not finite"):
            adapter.adapt_step(second)
        assert are_equal([tensors_of(adapter), adapter.memory], before)

    def test_other_classes_need_a_reset(self):
        adapter = EATA(sharp_network("gn"), SGD(lr=0.01), MARGIN, 0.7, fisher_alpha=0)
        images = coloured_squares(1)[0]
        adapter.adapt_step(images)
        adapter.restrict_classes([1, 2, 3])
        with pytest.raises(InputError, match=r"10 classes then and are 3 now.*reset"):
            adapter.adapt_step(images)
        adapter.reset()
        assert adapter.adapt_step(images).shape == (16, 3)


class TestTerms:
    def test_a_term_sees_what_both_filters_kept(self):
        def by_hand(network, images, kept):
            return 0.3 * network[:8](images)[kept].square().mean()

        seen = []

        def term(out, head):
            seen.append(out.selected.nonzero().flatten().tolist())
            return 0.3 * out.features[out.selected].square().mean()

        fisher = fisher_by_hand(sharp_network("gn"), coloured_squares(1, seed=9))
        reference = ByHand(sharp_network("gn"), MARGIN, 0.85, 50.0, fisher, by_hand)
        adapter = EATA(sharp_network("gn"), SGD(lr=0.01, momentum=0.9), MARGIN, 0.85, 50.0)
        adapter.prepare(coloured_squares(1, seed=9))
        adapter.terms.append(term)
        for step, images in enumerate(coloured_squares(4)):
            logits, loss = reference.step(images)
            ours = adapter.adapt_step(images)
            assert seen[step] == reference.kept
            torch.testing.assert_close(ours, logits, rtol=0, atol=1e-11)
            assert adapter.report.loss.item() == pytest.approx(loss.item(), abs=1e-11)
        assert sum(reference.redundant) > 3


class TestFisher:
    def test_equals_squared_gradients_by_hand(self):
        clean = coloured_squares(3, seed=9)
        adapter = EATA(sharp_network("bn"), fisher_samples=1000)
        adapter.prepare(iter(clean))
        expected = fisher_by_hand(sharp_network("bn").train(), clean)
        assert (
            list(adapter.fisher) == list(expected) == ["1.weight", "1.bias", "4.weight", "4.bias"]
        )
        for name, values in expected.items():
            torch.testing.assert_close(adapter.fisher[name], values, rtol=1e-9, atol=0)

    def test_the_network_stays_as_it_is(self):
        adapter = EATA(sharp_network("bn"))
        before = tensors_of(adapter)
        adapter.prepare(coloured_squares(2))
        assert are_equal(tensors_of(adapter), before)
        assert adapter.memory == {}
        assert all(parameter.grad is None for parameter in adapter.parameters())

    @pytest.mark.parametrize(("samples", "read"), [(1, 1), (16, 1), (17, 2), (40, 3)])
    def test_reads_no_further_than_it_needs(self, samples, read):
        def reader():
            for number, images in enumerate(coloured_squares(4)):
                numbers.append(number)
                yield images

        numbers = []
        EATA(sharp_network("gn"), fisher_samples=samples).prepare(reader())
        assert len(numbers) == read

    def test_without_a_penalty_nothing_is_read(self):
        adapter = EATA(sharp_network("gn"), e_margin=MARGIN, fisher_alpha=0)
        adapter.prepare(never_read())
        adapter.adapt_step(coloured_squares(1)[0])
        assert adapter.report.updated

    def test_an_empty_batch_counts_for_nothing(self):
        images = coloured_squares(1)[0]
        one, other = EATA(sharp_network("gn")), EATA(sharp_network("gn"))
        one.prepare([images])
        other.prepare([images[:0], images])
        assert are_equal(one.fisher, other.fisher)

    @pytest.mark.parametrize("samples", [17, 33, 1000])
    def test_a_rest_of_one_image_is_left_out(self, samples):
        clean = [*coloured_squares(2), coloured_squares(3)[2][:1]]  # 33 images
        adapter = EATA(sharp_network("bn"), fisher_samples=samples)
        adapter.prepare(clean)  # no advice to take larger batches
        expected = fisher_by_hand(sharp_network("bn").train(), clean[: min(samples // 16, 2)])
        for name, values in expected.items():
            torch.testing.assert_close(adapter.fisher[name], values, rtol=1e-9, atol=0)

    def test_single_images_count_where_there_is_nothing_larger(self):
        images = [image[None] for image in coloured_squares(1, 3)[0]]
        adapter = EATA(sharp_network("gn"))
        adapter.prepare(images)
        expected = fisher_by_hand(sharp_network("gn"), images)
        for name, values in expected.items():
            torch.testing.assert_close(adapter.fisher[name], values, rtol=1e-9, atol=0)

    def test_outlives_a_change_to_double(self):
        adapter = EATA(make_network("gn"), SGD(lr=0.01), e_margin=5.0, d_margin=2.0)
        adapter.prepare(make_batches(1))
        adapter.adapt_step(make_batches(1)[0])
        adapter.double()
        assert adapter.adapt_step(make_batches(1)[0].double()).dtype == torch.float64
        assert adapter.report.updated

    def test_works_whatever_grad_mode_surrounds_it(self):
        expected = EATA(sharp_network("gn"))
        expected.prepare(coloured_squares(2))
        for mode in (torch.no_grad, torch.inference_mode):
            adapter = EATA(sharp_network("gn"))
            with mode():
                adapter.prepare(coloured_squares(2))
            assert are_equal(adapter.fisher, expected.fisher)

    def test_survives_a_reset_and_travels_with_the_state(self):
        adapter = EATA(sharp_network("gn"), SGD(lr=0.01), MARGIN, 0.7)
        adapter.prepare(coloured_squares(1, seed=9))
        measured = copy.deepcopy(adapter.fisher)
        batches = coloured_squares(5)
        for images in batches[:2]:
            adapter.adapt_step(images)
        saved = copy.deepcopy(adapter.state_dict())
        expected = [adapter.adapt_step(images) for images in batches[2:]]
        adapter.reset()
        assert are_equal(adapter.fisher, measured)
        other = EATA(sharp_network("gn"), SGD(lr=0.01), MARGIN, 0.7)
        other.load_state_dict(saved)
        assert are_equal(other.fisher, measured)
        assert are_equal([other.adapt_step(images) for images in batches[2:]], expected)

    def test_keeps_its_precision_and_takes_half_networks(self):
        adapter = EATA(make_network("gn"), SGD(lr=0.1), e_margin=5.0)
        adapter.prepare(make_batches(1))
        adapter.bfloat16()
        assert {values.dtype for values in adapter.fisher.values()} == {torch.float32}
        other = EATA(make_network("gn").bfloat16(), SGD(lr=0.1), e_margin=5.0)
        other.prepare([make_batches(1)[0].bfloat16()])
        assert {values.dtype for values in other.fisher.values()} == {torch.float32}
        for each in (adapter, other):
            each.adapt_step(make_batches(1)[0].bfloat16())
            assert each.report.updated

    def test_is_needed_for_a_penalty(self):
        with pytest.raises(InputError, match=r"prepare\(clean\).*fisher_alpha=0"):
            EATA(make_network("gn")).adapt_step(make_batches(1)[0])

    @pytest.mark.parametrize("clean", [[], [torch.rand(0, 3, 32, 32)]])
    def test_no_clean_image(self, clean):
        with pytest.raises(InputError, match="got none"):
            EATA(make_network("gn")).prepare(clean)

    def test_a_clean_image_with_nan(self):
        adapter = EATA(make_network("gn"))
        with pytest.raises(InputError, match="clean images gave"):
            adapter.prepare([*make_batches(1), torch.full((2, 3, 32, 32), torch.nan)])
        assert adapter.fisher == {}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("e_margin", -0.1),
        ("e_margin", math.nan),
        ("d_margin", -0.1),
        ("fisher_alpha", -1.0),
        ("fisher_alpha", math.inf),
        ("fisher_samples", 0),
    ],
)
def test_hyper_parameters_out_of_range(name, value):
    with pytest.raises(InputError, match=f"{name} = .* out of range"):
        EATA(make_network("gn"), **{name: value})


def test_describes_its_hyper_parameters():
    described = EATA(make_network("gn"), d_margin=0.4, fisher_alpha=1.0).describe()
    assert described["hyper_parameters"] == {
        "e_margin": None,
        "d_margin": 0.4,
        "fisher_alpha": 1.0,
        "fisher_samples": 2000,
    }
