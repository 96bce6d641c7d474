"""MT3's adapter against an episode written out, in every way that its episodes can run."""

import copy
import inspect
import json
import warnings

import pytest
import torch
from torch import nn

from tests.loops.test_adaptation import quiet
from tests.models.test_loading import write_checkpoint
from tests.networks import LayerNormNet, are_equal, make_batches, make_network, tensors_of
from tests.streams import make_stream
from tta_lightning.callbacks import STAG, AdaptCallback, CostMonitor
from tta_lightning.errors import InputError
from tta_lightning.inner_loop import InnerLoop, inner_adapt
from tta_lightning.meta import JointTraining
from tta_lightning.methods import MT3, Source, mt3
from tta_lightning.methods.stag import StagOptions, StagTerm
from tta_lightning.models import BYOLHeads, ResNet26GN, SmallConvNet, load_model
from tta_lightning.views import ViewOptions, generator, ssl_views

IMAGES = make_batches(1, 5)[0]
WAYS = pytest.mark.parametrize("way", ["loop", "vmap"])


def make_heads(backbone=None, dtype=torch.float32):
    backbone = make_network("gn") if backbone is None else backbone
    torch.manual_seed(5)
    network = BYOLHeads(backbone, hidden=8, projection=6)
    with torch.no_grad():  # biases that are not at their initial zero
        for layer in (*network.projector[::2], *network.predictor[::2]):
            layer.bias.uniform_(-0.3, 0.3)
    return network.to(dtype)


def make_mt3(network=None, **options):
    given = {"copies": 3, "episodes": "loop", **options}
    return MT3(make_heads() if network is None else network, **given)


def views_of(image, number, copies=3, seed=0, flips=True):
    copied = image.expand(2 * copies, -1, -1, -1)
    return ssl_views(copied, generator(seed, number), ViewOptions(None, flips)).chunk(2)


def unit(vectors):
    return vectors / vectors.norm(dim=1, keepdim=True)


def episode(network, image, views, lr=0.1, steps=1, target="meta"):
    """One image: SGD in place on a copy, four forwards a step, a prediction, the loss at first."""
    adapted = copy.deepcopy(network).requires_grad_(True)
    optimizer = torch.optim.SGD(adapted.parameters(), lr=lr)
    features, losses = [], []
    adapted.backbone[8].register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    meta = copy.deepcopy(network)
    of_meta = []
    meta.backbone[8].register_forward_pre_hook(lambda _, inputs: of_meta.append(inputs[0]))

    def project(model, seen, images):
        model(images)
        return model.projector(seen.pop())

    for _ in range(steps):
        slow, seen = (meta, of_meta) if target == "meta" else (adapted, features)
        with torch.no_grad():
            aims = [project(slow, seen, view) for view in views]
        said = [adapted.predictor(project(adapted, features, view)) for view in views]
        pairs = zip(said, reversed(aims), strict=True)
        loss = sum((unit(p) - unit(t)).square().sum(dim=1).mean() for p, t in pairs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        return adapted(image[None])[0], losses[0]


def by_hand(network, images, first=0, **options):
    rows = [
        episode(network, image, views_of(image, first + i), **options)
        for i, image in enumerate(images)
    ]
    return torch.stack([row for row, _ in rows]), sum(loss for _, loss in rows) / len(rows)


@WAYS
@pytest.mark.parametrize(
    "options",
    [{}, {"lr": 0.5}, {"steps": 3}, {"steps": 2, "target": "self", "lr": 0.3}],
    ids=["published", "lr", "steps", "self"],
)
def test_equals_an_episode_written_out(way, options):
    """T10, T11: in place on a copy, with four forwards a step and the distance of unit vectors."""
    network, images = make_heads(dtype=torch.float64), IMAGES.double()
    adapter = make_mt3(copy.deepcopy(network), episodes=way, **options)
    found = adapter.adapt_step(images)
    expected, loss = by_hand(network, images, **options)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    assert adapter.report.loss.item() == pytest.approx(loss, abs=1e-11)
    assert adapter.report.updated
    assert (found - network(images)).abs().max() > 1e-3  # a step that is seen
    again, _ = by_hand(network, images, first=5, **options)  # the numbers go on
    torch.testing.assert_close(adapter.adapt_step(images), again, rtol=0, atol=1e-11)


def test_copies_are_averaged_over():
    network, image = make_heads(dtype=torch.float64), IMAGES[:1].double()
    adapter = make_mt3(copy.deepcopy(network), copies=7)
    expected, _ = episode(network, image[0], views_of(image[0], 0, copies=7))
    torch.testing.assert_close(adapter.adapt_step(image)[0], expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("options", [{"seed": 4}, {"flips": False}])
def test_options_reach_the_views(options):
    network, image = make_heads(dtype=torch.float64), IMAGES[:1].double()
    views = views_of(image[0], 0, **options)
    adapter = make_mt3(copy.deepcopy(network), **options)
    expected, _ = episode(network, image[0], views)
    found = adapter.adapt_step(image)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    assert not torch.equal(found, make_mt3(network).adapt_step(image)[0])


def test_crop_reaches_the_views():
    assert make_mt3(crop=[8, 9]).view_options.sides(IMAGES) == (8, 9)
    assert make_mt3().view_options.sides(IMAGES) == (20, 31)


class TestTargets:
    """T12."""

    def predicted(self, target, steps):
        return make_mt3(target=target, steps=steps, lr=0.3).adapt_step(IMAGES)

    def test_one_step_has_one_target(self):
        assert torch.equal(self.predicted("self", 1), self.predicted("meta", 1))

    def test_two_steps_have_two(self):
        assert (self.predicted("self", 2) - self.predicted("meta", 2)).abs().max() > 1e-4


class TestBatches:
    """T9, T16: a batch is so many episodes."""

    @pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1), (2, 3), (4, 1), (3, 2)])
    def test_any_cut_gives_the_same_in_a_loop(self, sizes):
        expected = make_mt3().adapt_step(IMAGES)
        adapter = make_mt3()
        found = [adapter.adapt_step(part) for part in IMAGES.split(sizes)]
        assert torch.equal(torch.cat(found), expected)

    @pytest.mark.parametrize("in_flight", [1, 2, 5, 16])
    @pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1), (3, 2)])
    def test_any_cut_gives_nearly_the_same_with_vmap(self, sizes, in_flight):
        expected = make_mt3().adapt_step(IMAGES)
        adapter = make_mt3(episodes="vmap", in_flight=in_flight)
        found = [adapter.adapt_step(part) for part in IMAGES.split(sizes)]
        torch.testing.assert_close(torch.cat(found), expected, rtol=0, atol=1e-5)

    def test_in_flight_limits_what_runs_at_once(self, monkeypatch):
        seen = []
        vmap = torch.func.vmap

        def spy(function):
            return lambda *parts: seen.append(len(parts[0])) or vmap(function)(*parts)

        monkeypatch.setattr(torch.func, "vmap", spy)
        make_mt3(episodes="vmap", in_flight=2).adapt_step(IMAGES)
        assert seen == [2, 2, 1]

    @WAYS
    def test_the_neighbours_do_not_matter(self, way):
        others = IMAGES.clone()
        others[[0, 1, 3, 4]] = 1 - others[[0, 1, 3, 4]]
        found, expected = (make_mt3(episodes=way).adapt_step(i)[2] for i in (others, IMAGES))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 if way == "vmap" else 0)

    def test_the_order_does_not_matter_given_the_same_views(self, monkeypatch):
        monkeypatch.setattr(mt3, "generator", lambda seed, number: generator(seed, 0))
        order = torch.tensor([3, 0, 4, 1, 2])
        expected = make_mt3().adapt_step(IMAGES)
        assert torch.equal(make_mt3().adapt_step(IMAGES[order]), expected[order])

    def test_the_published_network_in_small(self):
        network = make_heads(ResNet26GN(width=4, groups=2))
        loop = make_mt3(copy.deepcopy(network), copies=2).adapt_step(IMAGES[:2])
        vmap = make_mt3(network, copies=2, episodes="vmap").adapt_step(IMAGES[:2])
        torch.testing.assert_close(loop, vmap, rtol=0, atol=1e-5)


class TestNumbers:
    def test_views_depend_on_number_and_seed_alone(self):
        adapter = make_mt3(seed=3)
        drawn = adapter._views(IMAGES[0], 7)
        torch.rand(5)  # no other generator
        assert torch.equal(drawn, adapter._views(IMAGES[0], 7))
        assert torch.equal(drawn.flatten(0, 1), torch.cat(views_of(IMAGES[0], 7, seed=3)))
        assert not torch.equal(drawn, adapter._views(IMAGES[0], 8))
        assert not torch.equal(drawn, make_mt3(seed=4)._views(IMAGES[0], 7))

    @WAYS
    def test_reset_starts_them_again(self, way):
        adapter = make_mt3(episodes=way)
        first, second = adapter.adapt_step(IMAGES), adapter.adapt_step(IMAGES)
        assert not torch.equal(first, second)
        adapter.reset()
        assert torch.equal(adapter.adapt_step(IMAGES), first)

    @WAYS
    def test_the_state_continues_in_mid_stream(self, way):
        adapter = make_mt3(episodes=way)
        adapter.adapt_step(IMAGES[:3])
        state = copy.deepcopy(adapter.state_dict())
        expected = adapter.adapt_step(IMAGES)
        other = make_mt3(episodes=way)
        other.load_state_dict(state)
        assert torch.equal(other.adapt_step(IMAGES), expected)


class Clock:
    """Each image of a loop takes `loop` seconds, and of a vmap `vmap`; counts the runs."""

    def __init__(self, monkeypatch, loop, vmap):
        self.now, self.runs = 0.0, []
        self.seconds = {"_one_by_one": loop, "_together": vmap}
        monkeypatch.setattr(mt3, "_clock", lambda device: self.now)
        for name in self.seconds:
            monkeypatch.setattr(MT3, name, self.timed(name, getattr(MT3, name)))

    def timed(self, name, method):
        def run(adapter, images, numbers):
            self.runs.append((name, len(images)))
            self.now += self.seconds[name] * len(images)
            if self.seconds[name] < 0:
                raise torch.OutOfMemoryError("of the test")
            return method(adapter, images, numbers)

        return run


class TestAuto:
    @pytest.mark.parametrize(
        ("loop", "vmap", "chosen"),
        [(2.0, 1.0, "vmap"), (1.0, 2.0, "loop"), (1.1, 1.0, "loop"), (1.3, 1.0, "vmap")],
    )
    def test_keeps_to_the_faster_way_and_says_so(self, monkeypatch, loop, vmap, chosen):
        clock = Clock(monkeypatch, loop, vmap)
        adapter = make_mt3(episodes="auto")
        assert adapter.describe()["episodes"] == "auto"
        assert adapter.describe()["hyper_parameters"]["episodes"] == "auto"
        adapter.adapt_step(IMAGES[:1])
        assert clock.runs == [("_one_by_one", 1)]  # one image says nothing about batches
        adapter.adapt_step(IMAGES)
        tried, ran = clock.runs[1:-1], clock.runs[-1]
        assert tried == [("_one_by_one", 4)] * 2 + [("_together", 4)] * 2
        assert ran == ("_together" if chosen == "vmap" else "_one_by_one", 5)
        said = f"{chosen} (measured: {loop:.3g} s an image in a loop, {vmap:.3g} with vmap)"
        assert adapter.describe()["episodes"] == said
        adapter.reset()
        adapter.adapt_step(IMAGES)
        assert clock.runs[6:] == [ran]  # and is not timed again

    def test_the_choice_changes_no_prediction(self, monkeypatch):
        Clock(monkeypatch, 1.0, 2.0)
        assert torch.equal(
            make_mt3(episodes="auto").adapt_step(IMAGES), make_mt3().adapt_step(IMAGES)
        )

    def test_the_choice_is_state(self, monkeypatch):
        Clock(monkeypatch, 2.0, 1.0)
        adapter = make_mt3(episodes="auto")
        adapter.adapt_step(IMAGES)
        clock = Clock(monkeypatch, 1.0, 2.0)
        other = make_mt3(episodes="auto")
        other.load_state_dict(copy.deepcopy(adapter.state_dict()))
        assert other.describe() == adapter.describe()
        assert torch.equal(other.adapt_step(IMAGES), adapter.adapt_step(IMAGES))
        assert {name for name, _ in clock.runs} == {"_together"}

    def test_falls_back_where_vmap_runs_out_of_memory(self, monkeypatch):
        Clock(monkeypatch, 5.0, -1.0)
        adapter = make_mt3(episodes="auto")
        assert torch.equal(adapter.adapt_step(IMAGES), make_mt3().adapt_step(IMAGES))
        assert adapter.describe()["episodes"] == "loop (vmap does not run here)"

    def test_falls_back_where_more_in_flight_run_out_of_memory(self, monkeypatch):
        clock = Clock(monkeypatch, 5.0, 1.0)
        adapter = make_mt3(episodes="auto")
        adapter.adapt_step(IMAGES)
        clock.seconds["_together"] = -1.0
        expected = make_mt3()
        expected.adapt_step(IMAGES)
        assert torch.equal(adapter.adapt_step(IMAGES), expected.adapt_step(IMAGES))
        assert adapter.describe()["episodes"] == "loop (vmap failed on a larger batch)"
        with pytest.raises(InputError, match=r"vmap cannot run.*of the test.*episodes: loop"):
            make_mt3(episodes="vmap").adapt_step(IMAGES)  # who asks for it gets it

    def test_falls_back_where_vmap_cannot_run_the_network(self):
        class Branches(LayerNormNet):
            def forward(self, images):
                sign = 1 if float(images.mean()) > 0 else -1
                return sign * super().forward(images)

        torch.manual_seed(0)
        adapter = make_mt3(make_heads(Branches()), episodes="auto")
        assert adapter.adapt_step(IMAGES).isfinite().all()
        assert adapter.describe()["episodes"] == "loop (vmap does not run here)"


@WAYS
def test_classes_are_restricted(way):
    classes = [7, 2, 5]
    adapter = make_mt3(episodes=way)
    adapter.restrict_classes(classes)
    full = make_mt3(episodes=way).adapt_step(IMAGES)
    assert torch.equal(adapter.adapt_step(IMAGES), full[:, classes])
    adapter.restrict_classes([3, 12])
    with pytest.raises(InputError, match="10 logits"):
        adapter.adapt_step(IMAGES)


class TestTerms:
    def test_enter_each_step_with_the_parameters_of_that_step(self):
        """A term that pulls all features to zero, written out."""

        def term(out, head):
            return 0.5 * out.features.square().mean()

        network, image = make_heads(dtype=torch.float64), IMAGES[:1].double()
        adapter = make_mt3(copy.deepcopy(network), steps=2)
        adapter.terms.append(term)
        found = adapter.adapt_step(image)
        adapter._embedder[0].requires_grad_(True)
        theta = dict(adapter._embedder[0].named_parameters())

        def features(parameters):
            out = torch.func.functional_call(adapter._embedder[0], dict(parameters), (image,))
            return 0.5 * out.features.square().mean()

        views = torch.stack(views_of(image[0], 0))
        phi, loss = inner_adapt(
            adapter._embedder[0], theta, views, InnerLoop(2, 0.1, None, True, "meta"), features
        )
        expected = torch.func.functional_call(adapter._embedder[0], phi, (image,)).logits
        torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-12)
        assert adapter.report.loss.item() == pytest.approx(loss.item(), abs=1e-12)
        assert not torch.equal(found, make_mt3(network, steps=2).adapt_step(image))

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_see_the_classes_of_the_stream_in_any_grad_mode(self, mode):
        seen = []

        def term(out, head):
            seen.append(out.logits.detach())
            return out.logits.square().mean()

        adapter = make_mt3()
        adapter.restrict_classes([7, 2, 5])
        adapter.terms.append(term)
        with mode():
            logits = adapter.adapt_step(IMAGES * 1)
        full = make_mt3()(IMAGES)[:, [7, 2, 5]].detach()
        torch.testing.assert_close(torch.cat(seen), full, rtol=0, atol=1e-5)
        assert (logits - full).abs().max() > 1e-4

    def test_stag_of_no_weight_is_bit_identical_and_of_some_is_not(self):
        def predicted(weight):
            adapter = make_mt3(episodes="vmap")  # terms run in the loop
            adapter.ready()
            adapter.terms.append(StagTerm(adapter.head, StagOptions(weight=weight)))
            logits = adapter.adapt_step(IMAGES)
            assert adapter.describe()["episodes"].startswith("loop (attached terms")
            return logits

        expected = make_mt3().adapt_step(IMAGES)
        assert torch.equal(predicted(0.0), expected)
        assert (predicted(1.0) - expected).abs().max() > 1e-4

    def test_the_callback_attaches_it(self):
        adapter = make_mt3(episodes="vmap", copies=2)
        callback = STAG(weight=1.0)
        summary = quiet(callback).adapt(adapter, datamodule=make_stream())
        assert summary["overall"]["images"] == 24
        assert summary["images_without_step"] == 0
        assert -1 < summary["stag"]["alignment"] < 1
        plain = quiet().adapt(make_mt3(copies=2), datamodule=make_stream())
        assert summary["overall"]["entropy"] != plain["overall"]["entropy"]
        assert not adapter.terms


class TestNotFinite:
    def told(self, adapter, images):
        with pytest.warns(UserWarning, match="not finite.*predicted by the model as it is"):
            return adapter.adapt_step(images)

    @WAYS
    def test_a_bad_image_beside_good_ones(self, way):
        images = IMAGES.clone()
        images[3, 0, 4, 4] = torch.nan
        adapter = make_mt3(episodes=way)
        logits = self.told(adapter, images)
        good = [0, 1, 2, 4]
        assert torch.equal(logits[good], make_mt3(episodes=way).adapt_step(IMAGES)[good])
        torch.testing.assert_close(logits[3:4], make_heads()(images[3:4]), equal_nan=True)
        report = adapter.report
        assert (report.updated, report.finite, report.failed) == (True, False, 1)
        assert report.reason.startswith("1 of 5 images")
        assert report.loss.isfinite()

    @WAYS
    def test_a_step_that_overflows_is_predicted_by_theta(self, way):
        """A grey image has finite logits, whose slope by one parameter is not finite."""

        class Steep(nn.Module):
            def __init__(self):
                super().__init__()
                self.scale = nn.Parameter(torch.ones(()))
                self.inner = make_network("gn")

            def forward(self, images):
                variance = images.var(dim=(1, 2, 3), keepdim=True)
                return self.inner(images + (variance * self.scale).sqrt())

            def get_classifier(self):
                return self.inner[8]

        images = IMAGES.clone()
        images[1] = 0.0  # grey, whatever the jitter
        adapter = make_mt3(make_heads(Steep()), episodes=way)
        logits = self.told(adapter, images)
        assert logits.isfinite().all()
        torch.testing.assert_close(logits[1], make_heads(Steep())(images)[1], rtol=0, atol=1e-6)
        assert (adapter.report.failed, adapter.report.updated) == (1, True)
        assert adapter.report.loss.isfinite()
        good, alone = [0, 2, 3, 4], make_mt3(make_heads(Steep()), episodes=way)
        images[1] = IMAGES[1]
        assert torch.equal(logits[good], alone.adapt_step(images)[good])
        assert alone.report.failed == 0

    @WAYS
    def test_all_bad(self, way):
        adapter = make_mt3(episodes=way)
        network = tensors_of(adapter)
        logits = self.told(adapter, IMAGES * torch.inf)
        assert logits.shape == (5, 10)
        report = adapter.report
        assert (report.updated, report.finite, report.failed) == (False, False, 5)
        assert are_equal(tensors_of(adapter), network)

    def test_views_that_are_not_finite_leave_the_image_itself(self):
        class SometimesBad(MT3):
            def _views(self, image, number):
                views = super()._views(image, number)
                return views * torch.nan if number == 1 else views

        adapter = SometimesBad(make_heads(), copies=2, episodes="loop")
        logits = self.told(adapter, IMAGES)
        assert logits.isfinite().all()
        torch.testing.assert_close(logits[1], make_heads()(IMAGES)[1])


@WAYS
def test_nothing_of_the_network_changes(way):
    """T9."""
    network = make_heads()
    kept = torch.ones_like(network.projector[0].bias)
    network.projector[0].bias.grad = kept.clone()
    adapter = make_mt3(network, episodes=way, steps=2)
    before = tensors_of(adapter)
    adapter.adapt_step(IMAGES)
    assert are_equal(tensors_of(adapter), before)
    head = {"backbone.8.weight", "backbone.8.bias"}
    assert {n for n, p in network.named_parameters() if not p.requires_grad} == head
    grads = {n: p.grad for n, p in network.named_parameters() if p.grad is not None}
    assert are_equal(grads, {"projector.0.bias": kept})
    assert not network._forward_hooks
    assert not network.backbone[8]._forward_pre_hooks
    assert adapter.moving_tensors() == {}
    torch.testing.assert_close(adapter(IMAGES), make_heads()(IMAGES))


@WAYS
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_works_whatever_grad_mode_surrounds_it(way, mode):
    expected = make_mt3(episodes=way).adapt_step(IMAGES)
    adapter = make_mt3(episodes=way)
    with mode():
        found = adapter.adapt_step(IMAGES * 1)
        assert not found.requires_grad
    assert torch.equal(found, expected)


@WAYS
def test_bfloat16_autocast(way):
    adapter = make_mt3(episodes=way)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = adapter.adapt_step(IMAGES)
    assert logits.isfinite().all()
    torch.testing.assert_close(logits.float(), make_mt3().adapt_step(IMAGES), rtol=0.1, atol=0.1)
    assert all(p.dtype == torch.float32 for p in adapter.network.parameters())


def test_images_smaller_than_the_crop():
    with pytest.raises(InputError, match=r"crops of 20 to 40 px.*32 x 32 px.*`crop`"):
        make_mt3(crop=(20, 40)).adapt_step(IMAGES)


def test_a_network_without_heads():
    with pytest.raises(InputError, match=r"SmallConvNet has no BYOL heads.*JointTraining"):
        MT3(SmallConvNet(width=8)).adapt_step(IMAGES)


@pytest.mark.parametrize("name", ["steps", "copies", "in_flight"])
@pytest.mark.parametrize("value", [0, -1])
def test_counts_out_of_range(name, value):
    with pytest.raises(InputError, match=rf"{name}\b.*{value}\b"):
        make_mt3(**{name: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -0.1}, r"lr\b.*-0\.1"),
        ({"lr": float("nan")}, r"lr\b.*nan"),
        ({"seed": -1}, r"seed\b.*-1"),
        ({"target": "met"}, r"target.*'met'.*meta"),
        ({"episodes": "vamp"}, r"episodes.*'vamp'.*vmap"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(InputError, match=message):
        make_mt3(**options)


@pytest.mark.parametrize("crop", [(0, 20), (24, 20)])
def test_a_crop_that_is_none(crop):
    with pytest.raises(InputError, match=rf"crop = \({crop[0]}, {crop[1]}\) is out of range"):
        make_mt3(crop=crop).adapt_step(IMAGES)


def test_describes_itself():
    described = make_mt3(steps=2, lr=0.05, target="self").describe()
    assert described["name"] == "MT3"
    assert described["predicts"] == "after update"
    hyper = described["hyper_parameters"]
    assert (hyper["steps"], hyper["copies"], hyper["lr"], hyper["target"]) == (2, 3, 0.05, "self")
    assert described["rule"]["lr"] == 0.05
    assert described["episodes"] == "loop"
    assert set(hyper) == set(inspect.signature(MT3).parameters) - {"network"}
    assert make_mt3(crop=[8, 9], flips=False).describe()["hyper_parameters"]["crop"] == [8, 9]
    published = MT3(make_heads()).describe()["hyper_parameters"]
    assert (published["steps"], published["copies"], published["lr"]) == (1, 32, 0.1)


def test_no_rate_is_the_meta_model():
    adapter = make_mt3(lr=0.0)
    expected = torch.cat([make_heads()(image[None]) for image in IMAGES])
    assert torch.equal(adapter.adapt_step(IMAGES), expected)


class TestCost:
    """24 images in six batches, with two forwards and a backward an image and step."""

    @pytest.mark.parametrize(
        ("options", "forwards", "backwards"),
        [
            ({}, 8, 4),
            ({"steps": 3}, 16, 12),
            ({"episodes": "vmap"}, 2, 1),
            ({"episodes": "vmap", "in_flight": 2, "steps": 2}, 7, 14 / 3),
        ],
    )
    def test_counts(self, options, forwards, backwards):
        monitor = CostMonitor()
        adapter = make_mt3(copies=2, **options)
        cost = quiet(monitor).adapt(adapter, datamodule=make_stream())["cost"]
        assert cost["forwards_per_batch"] == pytest.approx(forwards)
        assert cost["backwards_per_batch"] == pytest.approx(backwards)
        assert cost["update"]["seconds_per_batch"] > 0
        assert not adapter.network.predictor._forward_hooks


def test_runs_on_a_checkpoint_of_joint_training(tmp_path):
    """TTT (ours): the same step on another checkpoint."""
    torch.manual_seed(2)
    backbone = {"spec": "tta_lightning.models.ResNet26GN", "width": 4, "groups": 2}
    spec = {"spec": "tta_lightning.models.BYOLHeads", "backbone": backbone}
    trained = JointTraining({**spec, "hidden": 8, "projection": 6})
    path = write_checkpoint(tmp_path / "jt.ckpt", trained.network)
    logits = make_mt3(path, lr=0.01, copies=2).adapt_step(IMAGES[:2])
    expected = make_mt3(trained.network, lr=0.01, copies=2).adapt_step(IMAGES[:2])
    assert torch.equal(logits, expected)
    source = Source(path).adapt_step(IMAGES[:2])
    assert torch.equal(source, load_model(path)(IMAGES[:2]))
    assert not torch.equal(source, logits)


def test_a_choice_is_not_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_mt3(episodes="auto").adapt_step(IMAGES)


@WAYS
def test_a_prediction_that_is_not_finite_is_that_of_the_meta_model(way):
    """Steps of this length stay finite; what the network makes of them does not."""
    adapter = make_mt3(episodes=way, lr=1e10)
    with pytest.warns(UserWarning, match="5 of 5 images"):
        logits = adapter.adapt_step(IMAGES)
    torch.testing.assert_close(logits, make_heads()(IMAGES).detach())
    assert (adapter.report.failed, adapter.report.updated) == (5, False)


@WAYS
def test_images_without_a_step_are_counted_by_the_run(way):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*not finite")
        results = quiet().adapt(make_mt3(episodes=way, lr=1e20), datamodule=make_stream())
    assert (results["images_without_step"], results["nonfinite_batches"]) == (24, 6)


def test_the_manifest_says_how_episodes_ran(tmp_path, monkeypatch):
    Clock(monkeypatch, 5.0, 1.0)
    quiet(run_dir=tmp_path / "run").adapt(make_mt3(episodes="auto"), datamodule=make_stream())
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["method"]["episodes"] == "vmap (measured: 5 s an image in a loop, 1 with vmap)"
    assert manifest["method"]["hyper_parameters"]["episodes"] == "auto"


def test_the_manifest_of_a_run_that_stopped_says_so_too(tmp_path, monkeypatch):
    class Stops(AdaptCallback):
        def on_adapt_batch_end(self, trainer, adapter, logits, batch, batch_idx):
            if batch_idx == 2:
                raise RuntimeError("stopped")

    Clock(monkeypatch, 5.0, 1.0)
    trainer = quiet(Stops(), run_dir=tmp_path / "run")
    with pytest.raises(RuntimeError, match="stopped"):
        trainer.adapt(make_mt3(episodes="auto"), datamodule=make_stream())
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["method"]["episodes"].startswith("vmap (measured")


def test_the_manifest_says_that_terms_run_in_the_loop(tmp_path):
    trainer = quiet(STAG(weight=1.0), run_dir=tmp_path / "run")
    trainer.adapt(make_mt3(episodes="vmap"), datamodule=make_stream())
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["method"]["episodes"].startswith("loop (attached terms")


def test_timing_is_not_counted():
    counts = {}
    for episodes in ("loop", "auto"):
        results = quiet().adapt(make_mt3(episodes=episodes), datamodule=make_stream())
        counts[episodes] = results["cost"]["forwards_per_batch"]
    assert counts["auto"] in (counts["loop"], 2.0)  # with vmap, two a batch


def test_a_state_does_not_overrule_what_was_asked_for():
    vmapped = make_mt3(episodes="vmap")
    vmapped.adapt_step(IMAGES)
    adapter, loop = make_mt3(episodes="loop"), make_mt3(episodes="loop")
    adapter.load_state_dict(vmapped.state_dict())
    loop.adapt_step(IMAGES)
    assert torch.equal(adapter.adapt_step(IMAGES), loop.adapt_step(IMAGES))


def test_autocast_remembers_no_parameter_inside_a_long_block():
    """It keeps a copy of each leaf until the block ends, and every step has new ones."""
    adapter, seen = make_mt3(), []
    adapter.network.register_forward_hook(lambda *_: seen.append(torch.is_autocast_cache_enabled()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        adapter.adapt_step(IMAGES)
        assert torch.is_autocast_cache_enabled()
    assert len(seen) == 10
    assert not any(seen)


def test_networks_may_view_what_a_convolution_gives():
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 4, 3, stride=8), nn.GroupNorm(2, 4), nn.ReLU())
            self.fc = nn.Linear(64, 5)

        def forward(self, images):
            return self.fc(self.body(images).view(len(images), -1))

    assert make_mt3(make_heads(Views())).adapt_step(IMAGES).shape == (5, 5)


def test_an_empty_batch():
    adapter = make_mt3()
    assert adapter.adapt_step(IMAGES[:0]).shape == (0, 10)
    assert not adapter.report.updated
    other = make_mt3()
    assert torch.equal(adapter.adapt_step(IMAGES), other.adapt_step(IMAGES))


@pytest.mark.parametrize("images", [IMAGES[0], IMAGES[:, :1], IMAGES.to(torch.uint8)])
def test_what_is_no_batch_of_images_is_refused(images):
    with pytest.raises(InputError, match=r"images of shape .*expects floating-point images \[B, 3"):
        make_mt3().adapt_step(images)


@pytest.mark.parametrize("name", ["steps", "copies", "in_flight", "seed"])
def test_numbers_that_are_not_whole(name):
    with pytest.raises(InputError, match=rf"{name} = 1.5 is out of range: expected a whole"):
        make_mt3(**{name: 1.5})
