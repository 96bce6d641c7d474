"""ROID against its equations written out by hand."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn

from tests.networks import (
    are_equal,
    coloured_squares,
    make_batches,
    make_network,
    sharp_network,
    tensors_of,
)
from tta_lightning.errors import InputError
from tta_lightning.methods import roid
from tta_lightning.methods.augment import augment
from tta_lightning.methods.roid import ROID
from tta_lightning.rules import SGD, Adam

LR, MOMENTUM = 0.001, 0.9
NORMS = ["bn", "gn", "ln"]


def network_of(norm):
    """Some predictions are surer than 0.99, some are not."""
    return sharp_network(norm, 15 if norm == "ln" else 30)


def make_roid(network, **options):
    return ROID(network, SGD(lr=LR, momentum=MOMENTUM), **options)


def plain_roid(network, **options):
    """With none of the three parts."""
    off = {"weighting": False, "consistency": False, "prior_correction": False}
    return make_roid(network, **{**off, **options})


def is_affine(module):
    return isinstance(module, nn.BatchNorm2d | nn.GroupNorm | nn.LayerNorm)


def softmax(row):
    powers = [math.exp(x - max(row)) for x in row]
    return [x / sum(powers) for x in powers]


def scaled(values):
    low, high = min(values), max(values)
    return [0.0 if high == low else (x - low) / (high - low) for x in values]


class ROIDByHand:
    """The equations, one sample and one class at a time; a view is x^1.5, x^2, x^2.5, ..."""

    def __init__(self, network, tau=1 / 3, alpha=0.99, beta=0.9, off=(), term=0.0):
        self.network = network.train()  # no dropout in there: only batch normalisation minds
        self.tau, self.alpha, self.beta, self.off, self.term = tau, alpha, beta, off, term
        self.moving = [p for m in network.modules() if is_affine(m) for p in m.parameters()]
        self.source = [p.detach().clone() for p in self.moving]
        self.optimizer = torch.optim.SGD(self.moving, lr=LR, momentum=MOMENTUM)
        self.average = [0.1] * 10
        self.steps = 0
        self.clipped = 0

    def weights(self, rows):
        """w_i, None where a sample is dropped."""
        if "weighting" in self.off:
            return [1.0] * len(rows)
        diversity, certainty = [], []
        for row in rows:
            p = softmax(row)
            dot = sum(m * q for m, q in zip(self.average, p, strict=True))
            lengths = math.hypot(*self.average) * math.hypot(*p)
            diversity.append(1 - dot / lengths)
            certainty.append(sum(q * math.log(q) for q in p))
        diversity, certainty = scaled(diversity), scaled(certainty)
        mean = sum(diversity) / len(rows)
        pairs = zip(diversity, certainty, strict=True)
        return [None if d < mean else math.exp(d * c / self.tau) for d, c in pairs]

    def slr(self, logits):
        total = 0.0
        for p in logits.softmax(0):
            self.clipped += p.item() > 0.99
            p = p if p.item() <= 0.99 else torch.tensor(0.99, dtype=p.dtype)
            total = total - p * torch.log(p / (1 - p) + 1e-5)
        return total

    def sce(self, one, other):
        p, q = one.softmax(0), other.softmax(0)
        return sum(-0.5 * a * b.log() - 0.5 * b * a.log() for a, b in zip(p, q, strict=True))

    def corrected(self, logits):
        if "prior_correction" in self.off:
            return logits
        columns = zip(*[softmax(row) for row in logits.tolist()], strict=True)
        prior = [sum(column) / len(logits) for column in columns]
        smooth = max(1 / len(logits), 1 / 10) / max(prior)
        factors = [(r + smooth) / (1 + smooth * 10) for r in prior]
        return torch.tensor(
            [[x * r for x, r in zip(row, factors, strict=True)] for row in logits.tolist()],
            dtype=logits.dtype,
        )

    def step(self, images):
        logits = self.network(images)
        rows = logits.tolist()
        weights = self.weights(rows)
        self.kept = [i for i, w in enumerate(weights) if w is not None]
        if "consistency" not in self.off:
            views = self.network(images[self.kept] ** (1.5 + self.steps / 2))
        loss = 0.0
        for place, i in enumerate(self.kept):
            one = self.slr(logits[i])
            if "consistency" not in self.off:
                one = one + self.sce(logits[i], views[place])
            loss = loss + weights[i] * one / len(images)
        loss = loss + self.term * logits[self.kept].square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        for parameter, source in zip(self.moving, self.source, strict=True):
            parameter.data = self.alpha * parameter.data + (1 - self.alpha) * source
        mean = [sum(c) / len(rows) for c in zip(*map(softmax, rows), strict=True)]
        pairs = zip(self.average, mean, strict=True)
        self.average = [self.beta * m + (1 - self.beta) * r for m, r in pairs]
        self.steps += 1
        return self.corrected(logits), loss.detach()


@pytest.fixture
def powers(monkeypatch):
    """Replace the augmentation: in the n-th step a view is x^(1 + n / 2).

    A plain factor would not do: batch normalisation takes it out again.
    """
    numbers = {}

    def view(images, generator, padding, blur_and_noise):
        assert (padding, blur_and_noise) == ("reflect", False)
        step = numbers.setdefault(generator.initial_seed(), len(numbers))
        return images ** (1.5 + step / 2)

    monkeypatch.setattr(roid, "augment", view)


@pytest.mark.usefixtures("powers")
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("off", "term", "numbers"),
    [
        ((), 0.0, (1 / 3, 0.99, 0.9)),
        ((), 0.5, (0.5, 0.7, 0.6)),
        (("weighting",), 0.0, (1 / 3, 0.9, 0.9)),
        (("consistency",), 0.0, (0.7, 0.9, 0.6)),
        (("prior_correction",), 0.0, (0.5, 0.9, 0.9)),
        (("weighting", "consistency", "prior_correction"), 0.0, (1 / 3, 1.0, 0.9)),
    ],
)
def test_equals_the_equations_written_by_hand(norm, off, term, numbers):
    by_hand = ROIDByHand(network_of(norm), *numbers, off, term)
    names = ("temperature", "momentum_src", "momentum_probs")
    options = dict(zip(names, numbers, strict=True)) | dict.fromkeys(off, False)
    adapter = make_roid(network_of(norm), **options)
    seen = []

    def square(out, head):
        seen.append(out.selected.nonzero().flatten().tolist())
        return term * out.logits[out.selected].square().mean()

    adapter.terms.append(square)
    kept = []
    for number, images in enumerate(coloured_squares(4)):
        images = images[:7] if number == 2 else images  # a short one
        expected, loss = by_hand.step(images)
        torch.testing.assert_close(adapter.adapt_step(images), expected, rtol=0, atol=1e-10)
        assert adapter.report.loss.item() == pytest.approx(loss.item(), abs=1e-10)
        assert seen[-1] == by_hand.kept
        kept.append(len(by_hand.kept))
        if "weighting" not in off:
            average = torch.tensor(by_hand.average, dtype=torch.float64)
            torch.testing.assert_close(adapter.memory["probabilities"], average, rtol=0, atol=1e-12)
    assert by_hand.clipped or norm == "ln"
    assert sum(kept) == 55 if "weighting" in off else 5 < sum(kept) < 50
    pairs = zip(by_hand.moving, by_hand.source, strict=True)
    assert max((ours - source).abs().max().item() for ours, source in pairs) > 1e-3
    for name, parameter in by_hand.network.named_parameters():
        ours = adapter.network.get_parameter(name)
        torch.testing.assert_close(ours, parameter, rtol=0, atol=1e-10, msg=name)


class Readout(nn.Module):
    """Logits are the first pixels of the first channel; there is a norm that could move."""

    def __init__(self, classes=2):
        super().__init__()
        self.norm = nn.LayerNorm(1, dtype=torch.float64)
        self.classes = classes

    def forward(self, images):
        return images[:, 0, 0, : self.classes] + self.norm.bias.sum()


def images_of(logits):
    images = torch.zeros(len(logits), 3, 8, 8, dtype=torch.float64)
    images[:, 0, 0, : len(logits[0])] = torch.tensor(logits, dtype=torch.float64)
    return images


class TestPriorCorrection:
    def test_of_two_images_by_hand(self):
        # p = (1/4, 3/4), (1/2, 1/2); r = (3/8, 5/8); g = (1/2) / (5/8) = 0.8;
        # r' = (1.175, 1.425) / 2.6
        adapter = ROID(Readout(), consistency=False)
        logits = adapter.adapt_step(images_of([[0, math.log(3)], [2, 2]]))
        expected = [[0, math.log(3) * 1.425 / 2.6], [2 * 1.175 / 2.6, 2 * 1.425 / 2.6]]
        assert logits.tolist() == [pytest.approx(row) for row in expected]

    def test_more_images_than_classes_are_smoothed_by_the_classes(self):
        # four times p = (1/4, 3/4): g = (1/2) / (3/4) = 2/3, r' = (11/12, 17/12) / (7/3)
        logits = ROID(Readout(), consistency=False)(images_of([[-1, math.log(3) - 1]] * 4))
        assert logits[2].tolist() == pytest.approx([-11 / 28, (math.log(3) - 1) * 17 / 28])

    def test_an_image_that_is_not_finite_does_not_count(self):
        adapter = make_roid(network_of("gn"))
        images = coloured_squares(1)[0]
        expected = adapter(images[:-1])
        images[-1] = torch.nan
        with pytest.warns(UserWarning, match="not finite"):
            logits = adapter.adapt_step(images)
        torch.testing.assert_close(logits[:-1], expected, rtol=0, atol=1e-12)
        assert logits[-1].isnan().all()

    def test_the_classes_of_the_stream_have_a_prior_of_their_own(self):
        images, classes = coloured_squares(1)[0][:2], [7, 2, 5]
        adapter = make_roid(network_of("gn"))
        adapter.restrict_classes(classes)
        with torch.no_grad():
            logits = network_of("gn")(images)[:, classes]
        prior = logits.softmax(1).mean(0)
        smooth = 0.5 / prior.max()
        expected = logits * (prior + smooth) / (1 + smooth * 3)
        torch.testing.assert_close(adapter.adapt_step(images), expected, rtol=0, atol=1e-12)

    def test_the_logits_keep_their_precision(self):
        adapter = ROID(make_network("gn").bfloat16())
        assert adapter.adapt_step(make_batches(1)[0].bfloat16()).dtype == torch.bfloat16


class TestWeighting:
    def test_of_two_images_by_hand(self):
        # The first is the more diverse and the surer one: weight e^3; the other is dropped.
        # Its SLR is -(1/4 ln(1/3 + 1e-5) + 3/4 ln(3 + 1e-5)) = -0.5493161.
        adapter = make_roid(Readout(), consistency=False)
        adapter.adapt_step(images_of([[0, math.log(3)], [0, 0]]))
        assert adapter.report.loss.item() == pytest.approx(math.exp(3) * -0.5493161 / 2, rel=1e-6)
        # 0.9 * 1/2 + 0.1 * (3/8, 5/8): dropped samples count as well
        assert adapter.memory["probabilities"].tolist() == pytest.approx([0.4875, 0.5125])

    @pytest.mark.parametrize("logits", [[[0, 1]], [[0, 1]] * 4, [[0, 0]] * 3])
    def test_samples_that_are_all_alike_are_all_kept_with_weight_1(self, logits):
        adapter = make_roid(Readout(), consistency=False)
        adapter.ready()
        out = adapter.outputs(images_of(logits))
        adapter.loss(out, images_of(logits))
        assert out.selected.tolist() == [True] * len(logits)
        adapter.adapt_step(images_of(logits))
        p = softmax(logits[0])
        slr = -sum(q * math.log(q / (1 - q) + 1e-5) for q in p)
        assert adapter.report.loss.item() == pytest.approx(slr, abs=1e-12)
        assert adapter.report.updated

    def test_samples_of_one_certainty_are_told_apart_by_diversity_alone(self):
        adapter = make_roid(Readout(), consistency=False)
        adapter.adapt_step(images_of([[0, 1]] * 3))  # class 1 is common now
        adapter.adapt_step(images_of([[1, 0], [0, 1]]))
        p = softmax([0, 1])
        slr = -sum(q * math.log(q / (1 - q) + 1e-5) for q in p)
        assert adapter.report.loss.item() == pytest.approx(slr / 2)  # one is kept: weight 1

    def test_other_classes_need_a_reset(self):
        adapter = make_roid(network_of("gn"))
        images = coloured_squares(1)[0]
        adapter.adapt_step(images)
        adapter.restrict_classes([1, 2, 3])
        with pytest.raises(InputError, match=r"10 classes then and are 3 now.*reset"):
            adapter.adapt_step(images)
        adapter.reset()
        assert adapter.adapt_step(images).shape == (16, 3)

    def test_without_it_there_is_no_average(self):
        adapter = make_roid(network_of("gn"), weighting=False)
        adapter.adapt_step(coloured_squares(1)[0])
        assert set(adapter.memory) == {"step"}


class TestParts:
    def test_the_likelihood_ratio_of_sure_predictions(self):
        # p = (0.001, 0.999), the second clipped: -(0.99 ln(99) + 0.001 ln(1/999)), offset 1e-5
        logits = torch.tensor([[0.0, math.log(999)]], dtype=torch.float64, requires_grad=True)
        found = roid.soft_likelihood_ratio(logits)
        expected = 0.99 * math.log(99 + 1e-5) + 0.001 * math.log(0.001 / 0.999 + 1e-5)
        assert found.item() == pytest.approx(-expected, abs=1e-12)
        found.sum().backward()  # through the first class alone: the second is clipped
        slope = math.log(0.001 / 0.999 + 1e-5) + (0.001 / (0.001 / 0.999 + 1e-5)) / 0.999**2
        assert logits.grad[0, 0].item() == pytest.approx(-slope * 0.001 * 0.999, rel=1e-9)

    def test_the_cross_entropy_has_a_gradient_on_both_sides(self):
        # p = (1/4, 3/4), q = (1/2, 1/2)
        one = torch.tensor([[0.0, math.log(3)]], dtype=torch.float64, requires_grad=True)
        other = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
        found = roid.symmetric_cross_entropy(one, other)
        there, back = math.log(2), -0.5 * math.log(3 / 16)
        assert found.item() == pytest.approx((there + back) / 2)
        found.sum().backward()
        # d/dz_2 of H(p, q) is 0, of H(q, p) it is p_2 - q_2 = 1/4; and on the other side
        # q_2 - p_2 = -1/4 of H(p, q), and of H(q, p) -ln 3 / 4
        assert one.grad[0, 1].item() == pytest.approx(1 / 8)
        assert other.grad[0, 1].item() == pytest.approx((-1 / 4 - math.log(3) / 4) / 2)


class TestConsistency:
    def views_of(self, monkeypatch, adapter, batches):
        """The views that an adapter draws."""
        drawn = []

        def spy(*args, **options):
            drawn.append(augment(*args, **options))
            return drawn[-1]

        monkeypatch.setattr(roid, "augment", spy)
        for images in batches:
            adapter.adapt_step(images)
        return drawn

    def test_the_view_is_of_the_kept_images_reflected_and_sharp(self, monkeypatch):
        selected = []
        adapter = make_roid(network_of("gn"), seed=5)
        adapter.terms.append(lambda out, head: selected.append(out.selected) or 0 * head.bias.sum())
        images = coloured_squares(1)[0]
        (drawn,) = self.views_of(monkeypatch, adapter, [images])
        generator = torch.Generator().manual_seed(5)  # the first step: the seed itself
        expected = augment(images[selected[0]], generator, padding="reflect", blur_and_noise=False)
        assert torch.equal(drawn, expected)
        assert 0 < len(drawn) < 16

    def test_each_step_and_each_seed_has_its_own(self, monkeypatch):
        batches = [coloured_squares(1)[0]] * 2
        drawn = [
            self.views_of(
                monkeypatch, plain_roid(network_of("gn"), consistency=True, seed=s), batches
            )
            for s in (4, 4, 5)
        ]
        assert are_equal(drawn[0], drawn[1])
        assert not torch.equal(drawn[0][0], drawn[0][1])
        assert not torch.equal(drawn[0][0], drawn[2][0])
        assert not torch.equal(drawn[0][1], drawn[2][0])

    def test_the_global_generator_is_left_alone(self):
        adapter = make_roid(network_of("gn"))
        torch.manual_seed(3)
        state = torch.get_rng_state()
        adapter.adapt_step(coloured_squares(1)[0])
        assert torch.equal(torch.get_rng_state(), state)

    def test_without_it_there_is_one_forward_pass(self):
        passes = []
        for consistency in (True, False):
            network = network_of("gn")
            count = []
            network.register_forward_hook(lambda *args, count=count: count.append(1))
            make_roid(network, consistency=consistency).adapt_step(coloured_squares(1)[0])
            passes.append(len(count))
        assert passes == [2, 1]

    def test_a_sample_kept_alone_is_no_reason_for_advice(self):
        adapter = make_roid(network_of("bn"))
        kept = []
        adapter.terms.append(lambda out, head: kept.append(out.selected) or 0 * head.bias.sum())
        two = coloured_squares(1)[0][:2]
        adapter.adapt_step(two)  # a warning is an error
        assert kept[0].sum() == 1
        assert adapter.report.updated
        with pytest.warns(UserWarning, match="single image"):
            adapter.adapt_step(two[:1])


class TestEnsembling:
    @pytest.mark.parametrize("norm", NORMS)
    def test_without_a_step_of_the_rule_the_weights_stay_bit_for_bit(self, norm):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            network = make_network(norm).to(dtype)
            with torch.no_grad():  # numbers that are not round
                for module in filter(is_affine, network.modules()):
                    module.weight.uniform_(0.1, 3, generator=torch.Generator().manual_seed(2))
            adapter = ROID(network, SGD(lr=0.0), momentum_src=0.37)
            source = tensors_of(adapter)
            for images in make_batches(3):
                expected = adapter(images.to(dtype))
                assert torch.equal(adapter.adapt_step(images.to(dtype)), expected)
                assert adapter.report.updated
            assert are_equal(tensors_of(adapter), source)

    def test_from_all_to_nothing(self):
        images = coloured_squares(1)[0]
        weights = []
        for momentum_src in (1.0, 0.75, 0.0):
            adapter = make_roid(network_of("gn"), momentum_src=momentum_src)
            adapter.adapt_step(images)
            weights.append(adapter.network[1].weight.detach())
        free, between, pulled = weights
        source = network_of("gn")[1].weight.detach()
        assert torch.equal(pulled, source)
        assert (free - source).abs().max() > 1e-3
        torch.testing.assert_close(between, 0.75 * free + 0.25 * source, rtol=0, atol=1e-14)

    def test_it_pulls_to_the_source_model_after_a_state_was_loaded(self):
        first, second = coloured_squares(2)
        adapter = make_roid(network_of("gn"))
        adapter.adapt_step(first)
        other = make_roid(network_of("gn"), momentum_src=0.0)
        other.load_state_dict(adapter.state_dict())
        other.adapt_step(second)
        assert are_equal(tensors_of(other), dict(network_of("gn").state_dict()))


class TestContract:
    @pytest.mark.parametrize("norm", NORMS)
    def test_forward_predicts_what_the_next_step_returns(self, norm):
        adapter = make_roid(network_of(norm))
        adapter.ready()
        for images in coloured_squares(3):
            before = copy.deepcopy(adapter.state_dict())
            expected = adapter(images)
            assert are_equal(adapter.state_dict(), before)
            logits = adapter.adapt_step(images)
            assert torch.equal(logits, expected)
            assert not logits.requires_grad

    @pytest.mark.parametrize("norm", NORMS)
    def test_reset_and_a_loaded_state_replay(self, norm):
        batches = coloured_squares()
        adapter = make_roid(network_of(norm))
        source = tensors_of(adapter)
        for images in batches[:2]:
            adapter.adapt_step(images)
        moved = {n for n, t in tensors_of(adapter).items() if not torch.equal(t, source[n])}
        assert {f"network.{name}" for name in moved} == set(adapter.moving_tensors())
        saved = copy.deepcopy(adapter.state_dict())
        expected = [adapter.adapt_step(images) for images in batches[2:]]
        other = make_roid(network_of(norm))
        other.load_state_dict(saved)
        twin = copy.deepcopy(other)
        for each in (other, twin):
            assert are_equal([each.adapt_step(images) for images in batches[2:]], expected)
        for each in (adapter, other):
            each.reset()
            assert each.memory == {}
            assert are_equal(tensors_of(each), source)
            assert are_equal([each.adapt_step(images) for images in batches][2:], expected)

    @pytest.mark.parametrize("norm", NORMS)
    @pytest.mark.parametrize("weighting", [True, False])
    def test_a_batch_that_is_not_finite_changes_nothing(self, norm, weighting):
        adapter = ROID(make_network(norm), Adam(lr=0.01), weighting=weighting)
        batches = make_batches(3)
        adapter.adapt_step(batches[0])
        kept = copy.deepcopy(adapter.state_dict())
        batches[1][3] = torch.nan
        for spoilt in (batches[1], torch.full_like(batches[1], torch.nan)):
            with pytest.warns(UserWarning, match="not finite"):
                adapter.adapt_step(spoilt)
            assert not adapter.report.finite
            assert adapter.report.loss.isnan()  # no sample was dropped
            assert not adapter.report.updated
            assert are_equal(kept, adapter.state_dict())
        other = ROID(make_network(norm), Adam(lr=0.01), weighting=weighting)
        other.adapt_step(batches[0])
        assert torch.equal(adapter.adapt_step(batches[2]), other.adapt_step(batches[2]))

    @pytest.mark.parametrize("norm", NORMS)
    def test_streams_of_one_image_and_of_one_class(self, norm):
        adapter = ROID(make_network(norm), SGD(lr=0.01, momentum=0.9))
        images = make_batches(1)[0]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for batch in (*images[:3, None], images[:2], *[images[:1].expand(8, 3, 32, 32)] * 4):
                assert torch.isfinite(adapter.adapt_step(batch)).all()
                assert adapter.report.updated
        assert all(torch.isfinite(t).all() for t in adapter.moving_tensors().values())

    def test_a_batch_without_images(self):
        adapter = make_roid(network_of("gn"))
        assert adapter.adapt_step(coloured_squares(1)[0][:0]).shape == (0, 10)
        assert not adapter.report.updated
        assert adapter.memory == {}

    @pytest.mark.parametrize("norm", NORMS)
    def test_works_whatever_grad_mode_surrounds_it(self, norm):
        adapter = make_roid(network_of(norm))
        expected = [adapter.adapt_step(images) for images in coloured_squares(3)]
        for mode in (torch.no_grad, torch.inference_mode):
            other = make_roid(network_of(norm))
            with mode():
                logits = [other.adapt_step(images.clone()) for images in coloured_squares(3)]
                assert torch.equal(other(coloured_squares(1)[0]), other(coloured_squares(1)[0]))
            assert are_equal(logits, expected)
            assert not logits[0].is_inference()

    @pytest.mark.parametrize("norm", NORMS)
    def test_half_precision_of_autocast(self, norm):
        logits = []
        for remembers in (True, False):
            adapter = ROID(make_network(norm), SGD(lr=0.01, momentum=0.9))
            with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=remembers):
                logits.append([adapter.adapt_step(images) for images in make_batches(3)])
            assert adapter.report.updated
            assert all(torch.isfinite(t).all() for t in adapter.moving_tensors().values())
            assert adapter.memory["probabilities"].dtype == torch.float32
        assert are_equal(*logits)
        assert all(torch.isfinite(each).all() for each in logits[0])

    def test_the_average_keeps_its_precision(self):
        adapter = make_roid(make_network("gn"))
        adapter.adapt_step(make_batches(1)[0])
        kept = copy.deepcopy(adapter.memory)
        adapter.bfloat16()
        assert are_equal(adapter.memory, kept)
        adapter.adapt_step(make_batches(1)[0].bfloat16())
        assert adapter.report.updated
        adapter.double()
        assert adapter.memory["probabilities"].dtype == torch.float64
        adapter.adapt_step(make_batches(1)[0].double())
        assert adapter.report.updated
        assert adapter.memory["step"] == 3

    @pytest.mark.usefixtures("powers")
    def test_a_network_in_half_precision_is_learnt_from_in_float32(self):
        images = make_batches(1)[0].bfloat16()
        adapter = plain_roid(make_network("gn").bfloat16(), consistency=True, prior_correction=True)
        with torch.no_grad():
            logits, views = (adapter.network(x).float() for x in (images, images**1.5))
        prior = logits.softmax(1).mean(0)
        smooth = 0.1 / prior.max()
        expected = (logits * (prior + smooth) / (1 + smooth * 10)).bfloat16()
        assert torch.equal(adapter.adapt_step(images), expected)
        p, q = logits.softmax(1), views.softmax(1)
        slr = -(p * (p / (1 - p) + 1e-5).log()).sum(1)
        loss = slr - 0.5 * (p * q.log() + q * p.log()).sum(1)
        assert adapter.report.loss.dtype == torch.float32
        assert adapter.report.loss.item() == pytest.approx(loss.mean().item(), rel=1e-6)
        other = make_roid(make_network("gn").bfloat16())
        other.adapt_step(images)
        average = 0.09 + 0.1 * logits.softmax(1).mean(0)
        torch.testing.assert_close(other.memory["probabilities"], average, rtol=1e-6, atol=0)

    def test_the_default_rule(self):
        adapter = ROID(make_network("gn"))
        assert adapter.describe()["rule"]["name"] == "SGD"
        assert adapter.describe()["predicts"] == "before update"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature = 0.0 is out of range"),
        ({"temperature": -1.0}, "temperature = -1.0"),
        ({"temperature": math.nan}, "temperature = nan"),
        ({"temperature": math.inf}, "temperature = inf"),
        ({"momentum_src": 1.1}, "momentum_src = 1.1"),
        ({"momentum_src": -0.1}, "momentum_src = -0.1"),
        ({"momentum_probs": math.nan}, "momentum_probs = nan"),
        ({"momentum_probs": 1.1}, "momentum_probs = 1.1"),
        ({"seed": -1}, "seed = -1"),
        ({"seed": 1_000_003}, "seed = 1000003"),
    ],
)
def test_hyper_parameters_out_of_range(options, message):
    with pytest.raises(InputError, match=message):
        ROID(make_network("gn"), **options)


def test_describes_its_hyper_parameters():
    described = ROID(make_network("gn"), weighting=False, seed=3).describe()
    assert described["hyper_parameters"] == {
        "temperature": 1 / 3,
        "momentum_src": 0.99,
        "momentum_probs": 0.9,
        "weighting": False,
        "consistency": True,
        "prior_correction": True,
        "seed": 3,
    }
