"""MEMO against an episode written out in loops; what it forgets; images that are not finite."""

import copy
import inspect
import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from tests.loops.test_adaptation import quiet
from tests.networks import are_equal, coloured_squares, make_batches, make_network, sharp_network
from tests.streams import make_stream
from tta_lightning.callbacks import CostMonitor
from tta_lightning.errors import InputError
from tta_lightning.methods import memo
from tta_lightning.methods.augmix import augmix
from tta_lightning.methods.memo import MEMO
from tta_lightning.methods.stag import StagOptions, StagTerm
from tta_lightning.rules import SGD, Adam

IMAGES = make_batches(1, 4)[0]
SQUARES = coloured_squares(2, 2)
NORMS = pytest.mark.parametrize("norm", ["bn", "gn", "ln"])
VIEWS = 3


def make_memo(network=None, rule=None, **options):
    network = make_network("gn") if network is None else network
    rule = SGD(lr=0.05) if rule is None else rule
    return MEMO(network, rule, **{"n_augmentations": VIEWS, **options})


def state_of(adapter):
    return copy.deepcopy(adapter.network.state_dict())


def run(network, images, prior):
    """The network with statistics of each pass blended in, channel by channel."""
    if not isinstance(network, nn.Sequential) or prior is None:
        return network(images)
    for layer in network:
        if isinstance(layer, nn.BatchNorm2d):
            channels = []
            for c in range(images.shape[1]):
                values = images[:, c].detach().flatten()
                mean = values.sum() / len(values)
                var = (values - mean).square().sum() / (len(values) - 1)
                mean = (prior * layer.running_mean[c] + mean) / (prior + 1)
                var = (prior * layer.running_var[c] + var) / (prior + 1)
                unit = (images[:, c] - mean) / (var + layer.eps).sqrt()
                channels.append(layer.weight[c] * unit + layer.bias[c])
            images = torch.stack(channels, dim=1)
        else:
            images = layer(images)
    return images


def episode(network, image, draws, optimizer, prior=16, steps=1, classes=None, term=0.0):
    """One image: steps in place on a copy; the prediction, the first loss, the change."""
    adapted = copy.deepcopy(network).eval()
    kept = slice(None) if classes is None else classes
    optimizer = optimizer(adapted.parameters())
    losses = []
    for _ in range(steps):
        mean, log_b = 0.0, math.log(VIEWS)
        views = augmix(image, VIEWS, draws)
        for row in run(adapted, views, prior)[:, kept]:
            mean = mean + (row.softmax(0).log() - log_b).exp()
        loss = -sum(p * p.log() for p in mean)
        if term:
            loss = loss + term * run(adapted, image[None], prior)[:, kept].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        return run(adapted, image[None], prior)[0, kept], losses[0]


@NORMS
@pytest.mark.parametrize(
    ("options", "rule", "optimizer"),
    [
        ({}, SGD(lr=0.05), lambda p: torch.optim.SGD(p, lr=0.05)),
        ({"steps": 2}, SGD(lr=0.05), lambda p: torch.optim.SGD(p, lr=0.05)),
        (
            {"steps": 3, "term": 0.1},  # momentum within an image, and not beyond it
            SGD(lr=0.02, momentum=0.9),
            lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9),
        ),
        ({"steps": 2}, Adam(lr=1e-3), lambda p: torch.optim.Adam(p, lr=1e-3)),
        ({"prior": 0}, SGD(lr=0.05), lambda p: torch.optim.SGD(p, lr=0.05)),
        ({"prior": 2.5}, SGD(lr=0.05), lambda p: torch.optim.SGD(p, lr=0.05)),
        ({"prior": None}, SGD(lr=0.05), lambda p: torch.optim.SGD(p, lr=0.05)),
        ({"classes": [7, 2, 5]}, SGD(lr=0.05), lambda p: torch.optim.SGD(p, lr=0.05)),
    ],
    ids=["published", "steps", "momentum", "adam", "batch", "blend", "source", "classes"],
)
def test_equals_an_episode_written_out(norm, options, rule, optimizer):
    network = sharp_network(norm, 3.0)
    given = {"steps": options.get("steps", 1), "prior_strength": options.get("prior", 16)}
    adapter = make_memo(copy.deepcopy(network), rule, seed=3, **given)
    adapter.restrict_classes(options.get("classes"))
    if term := options.get("term", 0.0):
        adapter.terms.append(lambda out, head: term * out.logits.square().mean())
    before, number = state_of(adapter), 0
    for images in SQUARES:
        found = adapter.adapt_step(images)
        rows, losses = [], []
        for image in images:
            draws = np.random.default_rng([3, number])
            row, loss = episode(network, image, draws, optimizer, **options)
            rows.append(row)
            losses.append(loss)
            number += 1
        torch.testing.assert_close(found, torch.stack(rows), rtol=0, atol=1e-10)
        assert adapter.report.loss.item() == pytest.approx(sum(losses) / 2, abs=1e-10)
        assert (adapter.report.updated, adapter.report.finite) == (True, True)
        still = make_memo(copy.deepcopy(network), SGD(lr=0.0), **given)
        still.restrict_classes(options.get("classes"))
        assert (found - still.adapt_step(images)).abs().max() > 1e-3  # a step that is seen
        assert are_equal(state_of(adapter), before)
    assert adapter.memory == {"images": torch.tensor(4)}


@NORMS
def test_the_default_rule_and_views(norm):
    network = sharp_network(norm, 3.0)
    image = SQUARES[0][:1]
    spelt = MEMO(copy.deepcopy(network), SGD(lr=0.005), 32, 1, 16.0, "pad", 0).adapt_step(image)
    assert torch.equal(MEMO(copy.deepcopy(network)).adapt_step(image), spelt)
    assert not torch.equal(MEMO(copy.deepcopy(network), crop="resized").adapt_step(image), spelt)


def test_the_crop_and_the_seed_reach_the_views(monkeypatch):
    seen = []

    def spy(image, count, draws, crop):
        seen.append((count, crop, draws.bit_generator.seed_seq.entropy))
        return augmix(image, count, draws, crop)

    monkeypatch.setattr(memo, "augmix", spy)
    adapter = make_memo(crop="resized", seed=9)
    adapter.adapt_step(IMAGES[:2])
    adapter.adapt_step(IMAGES[:1])
    assert seen == [(VIEWS, "resized", [9, number]) for number in range(3)]


class TestLoss:
    @pytest.mark.parametrize("views", [1, 3])
    def test_is_the_entropy_of_the_mean(self, views):
        adapter = make_memo()
        adapter.ready()
        logits = torch.log(torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.1, 0.2, 0.7]]))
        out = memo.Outputs(logits[:views])
        # entropy of (0.7, 0.2, 0.1), and of (0.3, 0.4, 0.3)
        expected = {1: 0.8018185525, 3: 1.0888999754}[views]
        assert adapter.loss(out, IMAGES).item() == pytest.approx(expected, abs=1e-6)

    def test_is_stable_where_all_views_are_sure(self):
        adapter = make_memo()
        logits = torch.tensor([[3e4, 0.0, -3e4]] * 4, requires_grad=True)
        loss = adapter.loss(memo.Outputs(logits), IMAGES)
        (grad,) = torch.autograd.grad(loss, logits)
        assert loss.item() == 0
        assert torch.isfinite(grad).all()

    def test_is_computed_in_float32(self):
        logits = torch.randn(8, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
        adapter = make_memo()
        exact = adapter.loss(memo.Outputs(logits.double()), IMAGES)
        loss = adapter.loss(memo.Outputs(logits), IMAGES)
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(exact.item(), abs=1e-5)


class TestBatches:
    @NORMS
    @pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (1, 3), (2, 2)])
    def test_any_cut_gives_the_same_bit_for_bit(self, norm, sizes):
        expected = make_memo(make_network(norm)).adapt_step(IMAGES)
        adapter = make_memo(make_network(norm))
        found = [adapter.adapt_step(part) for part in IMAGES.split(sizes)]
        assert torch.equal(torch.cat(found), expected)

    def test_the_neighbours_do_not_matter(self):
        others = IMAGES.clone()
        others[[0, 1, 3]] = 1 - others[[0, 1, 3]]
        others[1] = torch.nan
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found, expected = (
                make_memo(make_network("bn")).adapt_step(i)[2] for i in (others, IMAGES)
            )
        assert torch.equal(found, expected)

    def test_an_empty_one(self):
        adapter = make_memo(make_network("bn"))
        assert adapter(IMAGES[:0]).shape == (0, 10)
        assert adapter.adapt_step(IMAGES[:0]).shape == (0, 10)
        assert (adapter.report.updated, adapter.report.reason) == (False, "there is no image")
        other = make_memo(make_network("bn"))
        assert torch.equal(adapter.adapt_step(IMAGES), other.adapt_step(IMAGES))

    def test_one_class_alone(self):
        images = IMAGES[:1].expand(4, -1, -1, -1)
        adapter = make_memo()
        adapter.restrict_classes([3])
        assert torch.isfinite(adapter.adapt_step(images)).all()
        assert adapter.report.loss.item() == pytest.approx(0, abs=1e-6)


class TestForgetting:
    @NORMS
    def test_nothing_of_the_network_changes(self, norm):
        network = make_network(norm)
        tensors = [*network.parameters(), *network.buffers()]
        network.get_parameter("head.bias" if norm == "ln" else "8.bias").grad = torch.ones(10)
        adapter = make_memo(network, Adam(lr=0.1), steps=2)
        adapter.ready()
        before, rule = state_of(adapter), copy.deepcopy(adapter.rule_state)
        places = [tensor.data_ptr() for tensor in tensors]
        adapter.adapt_step(IMAGES)
        assert are_equal(state_of(adapter), before)
        now = [*network.parameters(), *network.buffers()]
        assert all(ours is theirs for ours, theirs in zip(now, tensors, strict=True))
        assert [tensor.data_ptr() for tensor in tensors] == places
        assert are_equal(rule, adapter.rule_state)
        assert [p.grad is None for p in network.parameters()].count(False) == 1
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in network.modules())
        assert adapter.moving_tensors() == {}
        assert list(adapter.adapted_parameters) == [n for n, _ in network.named_parameters()]

    def test_all_parameters_step(self, monkeypatch):
        network, seen = make_network("gn"), []
        adapter = make_memo(network)
        predict = MEMO._predict

        def spy(self, image):
            seen.append(state_of(self))
            return predict(self, image)

        monkeypatch.setattr(MEMO, "_predict", spy)
        before = state_of(adapter)
        adapter.adapt_step(IMAGES[:1])
        assert all(not torch.equal(seen[0][name], before[name]) for name in before)

    @pytest.mark.parametrize("place", [0, 1])
    def test_the_network_gets_its_weights_back_when_a_view_fails(self, monkeypatch, place):
        """At the first step, and at the second one, when the weights have moved."""
        network, calls = make_network("bn"), []
        adapter = make_memo(network, Adam(lr=0.1), steps=2)
        adapter.ready()
        before, rule = state_of(adapter), copy.deepcopy(adapter.rule_state)
        tensors = [*network.parameters(), *network.buffers()]
        places = [tensor.data_ptr() for tensor in tensors]

        def broken(*args):
            calls.append(1)
            if len(calls) > place:
                raise RuntimeError("of the user's")
            return augmix(*args)

        monkeypatch.setattr(memo, "augmix", broken)
        with pytest.raises(RuntimeError, match="of the user's"):
            adapter.adapt_step(IMAGES)
        assert are_equal(state_of(adapter), before)
        assert [tensor.data_ptr() for tensor in tensors] == places
        assert are_equal(rule, adapter.rule_state)
        assert adapter.memory == {}

    def test_the_statistics_come_back_when_the_network_fails(self):
        network = make_network("bn")
        adapter = make_memo(network)
        adapter.ready()
        buffers = list(network.buffers())

        def broken(module, inputs):
            raise RuntimeError("of the user's")

        network[8].register_forward_pre_hook(broken)
        with pytest.raises(RuntimeError, match="of the user's"):
            adapter.adapt_step(IMAGES)
        assert all(ours is theirs for ours, theirs in zip(network.buffers(), buffers, strict=True))
        assert not network[1]._forward_pre_hooks

    def test_another_method_may_follow(self):
        network = make_network("gn")
        make_memo(network).adapt_step(IMAGES)
        other = make_memo(network)
        assert torch.equal(other.adapt_step(IMAGES), make_memo().adapt_step(IMAGES))

    def test_reset_starts_the_numbers_again_and_a_state_continues_them(self):
        adapter = make_memo(make_network("bn"), Adam(lr=0.01))
        first, second = adapter.adapt_step(IMAGES), adapter.adapt_step(IMAGES)
        assert not torch.equal(first, second)
        adapter.reset()
        assert adapter.memory == {}
        assert torch.equal(adapter.adapt_step(IMAGES), first)
        state = copy.deepcopy(adapter.state_dict())
        twin = copy.deepcopy(adapter)
        assert torch.equal(adapter.adapt_step(IMAGES), second)
        other = make_memo(make_network("bn"), Adam(lr=0.01))
        other.load_state_dict(state)
        assert torch.equal(other.adapt_step(IMAGES), second)
        assert torch.equal(twin.adapt_step(IMAGES), second)

    def test_forward_predicts_what_the_next_step_returns(self):
        adapter = make_memo(make_network("bn"))
        for images in make_batches(2, 3):
            kept, report = copy.deepcopy(adapter.memory), adapter.report
            with torch.no_grad():
                expected = adapter(images)
            assert are_equal(adapter.memory, kept)
            assert adapter.report is report
            assert torch.equal(adapter.adapt_step(images), expected)

    def test_random_numbers_of_others_do_not_matter_and_are_left_alone(self):
        expected, adapter = make_memo().adapt_step(IMAGES), make_memo()
        torch.manual_seed(7)
        state = torch.get_rng_state()
        assert torch.equal(adapter.adapt_step(IMAGES), expected)
        assert torch.equal(torch.get_rng_state(), state)
        assert not torch.equal(make_memo(seed=1).adapt_step(IMAGES), expected)


class TestStatistics:
    def test_no_rate_is_the_network_with_blended_statistics(self):
        network = make_network("bn")
        expected = torch.cat([run(network.eval(), image[None], 16) for image in IMAGES])
        found = make_memo(network, SGD(lr=0.0)).adapt_step(IMAGES)
        torch.testing.assert_close(found, expected.detach())
        assert (found - make_network("bn").eval()(IMAGES)).abs().max() > 1e-3

    @pytest.mark.parametrize(("norm", "options"), [("bn", {"prior_strength": None}), ("gn", {})])
    def test_no_rate_is_the_network_itself_elsewhere(self, norm, options):
        found = make_memo(make_network(norm), SGD(lr=0.0), **options).adapt_step(IMAGES)
        network = make_network(norm).eval()
        assert torch.equal(found, torch.cat([network(image[None]) for image in IMAGES]))

    def test_one_value_a_channel_has_none(self):
        """The second layer of the prediction sees one value a channel, of the views three."""
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(3, 4, 8, stride=8), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1),
            nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, 3),
        )  # fmt: skip
        network[4].running_mean.fill_(0.2)
        seen = []
        network[4].register_forward_hook(
            lambda layer, *_: seen.append((layer.running_mean.clone(), layer.running_var.clone()))
        )
        adapter = make_memo(network)
        assert torch.isfinite(adapter.adapt_step(IMAGES[:1])).all()
        (of_views, _), (mean, var) = seen
        assert not torch.equal(of_views, mean)
        assert torch.equal(mean, torch.full((4,), 0.2))
        assert torch.equal(var, torch.ones(4))
        assert adapter.report.failed == 0

    def test_a_layer_without_running_statistics_stays_as_it_is(self):
        network = make_network("bn")
        network[1] = nn.BatchNorm2d(8, track_running_stats=False)
        found = make_memo(network, SGD(lr=0.0)).adapt_step(IMAGES)
        assert torch.isfinite(found).all()
        assert network[1].running_mean is None

    def test_a_layer_that_stands_twice_blends_with_its_source_each_time(self):
        torch.manual_seed(0)
        layer = nn.BatchNorm2d(4)
        network = nn.Sequential(
            nn.Conv2d(3, 4, 8, stride=8), layer, nn.ReLU(), layer, nn.Flatten(), nn.Linear(64, 3)
        ).double()
        image = IMAGES[:1].double()
        expected = run(copy.deepcopy(network).eval(), image, 1)
        found = make_memo(network, SGD(lr=0.0), prior_strength=1).adapt_step(image)
        torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-12)


class TestTerms:
    def test_see_the_image_the_classes_and_the_head_of_the_step(self):
        seen, heads = [], []

        def term(out, head):
            seen.append(out.logits.detach())
            heads.append(head.weight.clone())
            rebuilt = out.features @ head.weight.T
            torch.testing.assert_close(rebuilt + head.bias, adapter.network(IMAGES[:1]))
            return out.logits.square().mean()

        adapter = make_memo(steps=2)
        adapter.restrict_classes([7, 2, 5])
        adapter.terms.append(term)
        adapter.adapt_step(IMAGES[:1])
        full = make_network("gn")(IMAGES[:1])[:, [7, 2, 5]].detach()
        assert torch.equal(seen[0], full)
        assert not torch.equal(seen[1], full)
        assert torch.equal(heads[0], make_network("gn")[8].weight)
        assert not torch.equal(heads[1], heads[0])

    def test_stag_of_no_weight_is_bit_identical_and_of_some_is_not(self):
        def predicted(weight):
            adapter = make_memo(make_network("bn"))
            adapter.ready()
            adapter.terms.append(StagTerm(adapter.head, StagOptions(weight=weight)))
            return adapter.adapt_step(IMAGES)

        expected = make_memo(make_network("bn")).adapt_step(IMAGES)
        assert torch.equal(predicted(0.0), expected)
        assert (predicted(1.0) - expected).abs().max() > 1e-5


class Steep(nn.Module):
    """Of a black image the logits are finite, but not their slope by one parameter."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.inner = make_network("gn")

    def forward(self, images):
        variance = images.var(dim=(1, 2, 3), keepdim=True)
        return self.inner(images + (variance * self.scale).sqrt())


class TestNotFinite:
    def told(self, adapter, images):
        with pytest.warns(UserWarning, match="not finite.*predicted by the model as it is"):
            return adapter.adapt_step(images)

    @NORMS
    def test_a_bad_image_beside_good_ones(self, norm):
        images = IMAGES.clone()
        images[3, 0, 4, 4] = torch.nan
        adapter = make_memo(make_network(norm))
        logits = self.told(adapter, images)
        good = [0, 1, 2]
        expected = make_memo(make_network(norm)).adapt_step(IMAGES)
        assert torch.equal(logits[good], expected[good])
        assert logits[3].isnan().any()
        report = adapter.report
        assert (report.updated, report.finite, report.failed) == (True, False, 1)
        assert report.reason.startswith("1 of 4 images")
        assert report.loss.isfinite()
        assert adapter.memory == {"images": torch.tensor(4)}

    def test_a_network_that_mends_the_image_predicts_it_without_a_step(self):
        class Mends(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = make_network("gn")

            def forward(self, images):
                return self.inner(images.nan_to_num())

        images = IMAGES[:1].clone()
        images[0, 0, 4, 4] = torch.nan
        adapter = make_memo(Mends())
        assert torch.equal(self.told(adapter, images), Mends()(images).detach())
        assert (adapter.report.updated, adapter.report.failed) == (False, 1)
        assert adapter.report.loss.isnan()

    @NORMS
    def test_all_bad(self, norm):
        adapter = make_memo(make_network(norm), Adam(lr=0.1))
        adapter.ready()
        before, rule = state_of(adapter), copy.deepcopy(adapter.rule_state)
        assert self.told(adapter, torch.full_like(IMAGES, torch.inf)).shape == (4, 10)
        report = adapter.report
        assert (report.updated, report.finite, report.failed) == (False, False, 4)
        assert are_equal(state_of(adapter), before)
        assert are_equal(rule, adapter.rule_state)

    def test_a_slope_that_is_not_finite(self, monkeypatch):
        images = IMAGES.clone()
        images[1] = 0.0
        monkeypatch.setattr(  # views of a black image may have grey edges
            memo, "augmix", lambda image, count, *_: image.expand(count, -1, -1, -1)
        )
        adapter = make_memo(Steep(), Adam(lr=0.01), steps=2)
        logits = self.told(adapter, images)
        assert torch.equal(logits[1:2], Steep()(images[1:2]).detach())
        assert (adapter.report.failed, adapter.report.updated) == (1, True)
        assert adapter.report.loss.isfinite()
        good = [0, 2, 3]
        other = make_memo(Steep(), Adam(lr=0.01), steps=2)
        images[1] = IMAGES[1]
        assert torch.equal(logits[good], other.adapt_step(images)[good])

    @pytest.mark.parametrize("lr", [1e38, 1e20])
    def test_a_step_or_a_prediction_that_is_not_finite(self, lr):
        """Steps of the first length overflow, of the second only what the network makes of them."""
        network = sharp_network("gn", 3.0).float()
        adapter = make_memo(copy.deepcopy(network), SGD(lr=lr))
        logits = self.told(adapter, IMAGES)
        expected = torch.cat([network(image[None]) for image in IMAGES])
        assert torch.equal(logits, expected.detach())
        assert (adapter.report.failed, adapter.report.updated) == (4, False)

    def test_weights_that_are_not_finite_though_the_prediction_is(self):
        class Hides(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner, self.hidden = make_network("gn"), nn.Parameter(torch.zeros(()))

            def forward(self, images):
                return self.inner(images).detach() + self.hidden.clamp(-1, 1)

        adapter = make_memo(Hides(), SGD(lr=1e38))
        adapter.terms.append(lambda out, head: out.logits.sum())
        logits = self.told(adapter, IMAGES[:1])
        assert torch.equal(logits, Hides()(IMAGES[:1]).detach())
        assert adapter.report.failed == 1

    def test_images_without_a_step_are_counted_by_the_run(self):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*not finite")
            results = quiet().adapt(make_memo(rule=SGD(lr=1e38)), datamodule=make_stream())
        assert results["images_without_step"] == 24


class TestPrecision:
    @NORMS
    def test_bfloat16_autocast_is_near_and_remembers_no_weight(self, norm):
        seen = []
        adapter = make_memo(make_network(norm), steps=2)
        adapter.network.register_forward_hook(
            lambda *_: seen.append(torch.is_autocast_cache_enabled())
        )
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = adapter.adapt_step(IMAGES)
            forward = make_memo(make_network(norm), steps=2)(IMAGES)
            assert torch.is_autocast_cache_enabled()
        assert seen
        assert not any(seen)
        assert torch.equal(logits, forward)
        expected = make_memo(make_network(norm), steps=2).adapt_step(IMAGES)
        torch.testing.assert_close(logits.float(), expected, rtol=0.1, atol=0.1)

    def test_statistics_are_not_rounded_by_autocast(self):
        network, seen = make_network("bn"), []
        network[1].register_forward_hook(
            lambda layer, inputs, _: seen.append((inputs[0], layer.running_mean, layer.running_var))
        )
        adapter = make_memo(network, prior_strength=0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            adapter.adapt_step(IMAGES[:1])
        for inputs, mean, var in seen:
            assert inputs.dtype == torch.bfloat16
            exact = torch.var_mean(inputs.detach().double(), dim=(0, 2, 3))
            torch.testing.assert_close((var.double(), mean.double()), exact, rtol=1e-5, atol=1e-6)

    @NORMS
    def test_a_network_in_bfloat16(self, norm):
        adapter = make_memo(make_network(norm).bfloat16())
        logits = adapter.adapt_step(IMAGES.bfloat16())
        assert logits.dtype == torch.bfloat16
        assert adapter.report.failed == 0
        expected = make_memo(make_network(norm)).adapt_step(IMAGES)
        torch.testing.assert_close(logits.float(), expected, rtol=0.1, atol=0.1)


@NORMS
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_works_whatever_grad_mode_surrounds_it(norm, mode):
    other, adapter = make_memo(make_network(norm)), make_memo(make_network(norm))
    for each in (other, adapter):
        each.terms.append(lambda out, head: out.logits.square().mean())
    expected = other.adapt_step(IMAGES)
    with mode():
        assert torch.equal(adapter(IMAGES * 1), expected)
        found = adapter.adapt_step(IMAGES * 1)
    assert not found.requires_grad
    assert torch.equal(found, expected)


def test_dropout_is_off():
    network = nn.Sequential(make_network("gn"), nn.Dropout(0.9)).train()
    expected = make_memo().adapt_step(IMAGES)
    assert torch.equal(make_memo(network).adapt_step(IMAGES), expected)


def test_costs_two_forwards_and_a_backward_an_image_and_step():
    """24 images in six batches."""
    for steps, forwards, backwards in ((1, 8, 4), (2, 12, 8)):
        results = quiet(CostMonitor()).adapt(make_memo(steps=steps), datamodule=make_stream())
        cost = results["cost"]
        assert cost["forwards_per_batch"] == pytest.approx(forwards)
        assert cost["backwards_per_batch"] == pytest.approx(backwards)
        assert cost["update"]["seconds_per_batch"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_augmentations": 0}, "n_augmentations = 0 is out of range: expected 1 <="),
        ({"n_augmentations": 1.5}, "n_augmentations = 1.5 is out of range: expected a whole"),
        ({"steps": 0}, "steps = 0 is out of range"),
        ({"steps": 1.5}, "steps = 1.5 is out of range: expected a whole"),
        ({"seed": -1}, "seed = -1 is out of range"),
        ({"seed": 2**32}, "seed = 4294967296 is out of range"),
        ({"seed": 0.5}, "seed = 0.5 is out of range: expected a whole"),
        ({"prior_strength": -1}, "prior_strength = -1 is out of range: expected 0 <="),
        ({"prior_strength": math.inf}, "prior_strength = inf is out of range"),
        ({"prior_strength": math.nan}, "prior_strength = nan is out of range"),
        ({"crop": "resize"}, r"crop.*'resize'.*resized"),
    ],
)
def test_wrong_hyper_parameters(options, message):
    with pytest.raises(InputError, match=message):
        make_memo(**options)


@pytest.mark.parametrize("call", [MEMO.adapt_step, MEMO.__call__])
@pytest.mark.parametrize("images", [IMAGES[0], IMAGES[:, :1], IMAGES.to(torch.uint8)])
def test_what_is_no_batch_of_images_is_refused(images, call):
    with pytest.raises(InputError, match=r"MEMO got images of shape .*\[B, 3"):
        call(make_memo(), images)


def test_describes_itself():
    described = MEMO(make_network("gn")).describe()
    assert described["name"] == "MEMO"
    assert described["predicts"] == "after update"
    assert described["hyper_parameters"] == {
        "n_augmentations": 32,
        "steps": 1,
        "prior_strength": 16.0,
        "crop": "pad",
        "seed": 0,
    }
    assert (described["rule"]["name"], described["rule"]["lr"]) == ("SGD", 0.005)
    assert described["rule"]["momentum"] == 0
    assert MEMO.episodic
    assert set(described["hyper_parameters"]) == set(inspect.signature(MEMO).parameters) - {
        "network",
        "rule",
    }
