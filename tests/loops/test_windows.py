"""Streams that come one by one, in a sliding window, or with a reset before every batch."""

import numpy as np
import pytest
import torch
from torch import nn

from tests.loops.test_adaptation import Logits, by_hand, logits_of, quiet, tent
from tests.networks import make_network
from tests.streams import make_source, make_stream
from tta_lightning import methods
from tta_lightning.callbacks import AdaptCallback
from tta_lightning.data import ArraySource, BadImageError, Stream
from tta_lightning.errors import InputError
from tta_lightning.loops.window import SlidingWindow
from tta_lightning.methods import BNStats, Source, Tent
from tta_lightning.rules import SGD

LR, MOMENTUM = 0.05, 0.9  # those of tent()


def windowed(window=4, images=11, **options):
    """Two segments of eleven images, which no window of 4 divides."""
    settings = {"scenario": "sliding_window", "scenario_options": {"window": window}}
    return make_stream(images, **settings, **options)


class Hooks(AdaptCallback):
    """Notes what happens."""

    def __init__(self):
        self.reasons, self.reports, self.segments = [], [], []

    def on_adapt_reset(self, trainer, adapter, reason):
        self.reasons.append(reason)

    def on_adapt_segment_start(self, trainer, adapter, segment):
        self.segments.append(segment.name)

    def on_adapt_batch_end(self, trainer, adapter, logits, batch, batch_idx):
        assert logits.shape == (len(batch.labels), 10)
        assert not logits.requires_grad
        self.reports.append(adapter.report)


# One by one ---------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Batch statistics of a single image")
@pytest.mark.parametrize("norm", ["bn", "gn"])
def test_single_sample_is_a_batch_size_of_one(norm):
    single = logits_of(tent(norm), make_stream(scenario="single_sample", batch_size=5))
    plain = logits_of(tent(norm), make_stream(scenario="reset_each_shift", batch_size=1))
    assert torch.equal(single, plain)
    assert not torch.equal(single, logits_of(tent(norm), make_stream()))


# A window -----------------------------------------------------------------------------------------


def plain_tent(network):
    """Tent by torch alone: the network, its affine parameters, an optimizer."""
    layers = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    for layer in layers:
        layer.train()
        layer.track_running_stats = False
    parameters = [p for layer in layers for p in layer.parameters()]
    return network, torch.optim.SGD(parameters, lr=LR, momentum=MOMENTUM)


def windows_by_hand(stream, size):
    """The logits of a list of images that grows, learnt from when its size divides the count."""
    rows = []
    for segment in stream.plan.segments:
        network, optimizer = plain_tent(make_network("bn"))
        seen = []
        for position in range(segment.start, segment.stop):
            (image,) = (b.images for b in stream.test_dataloader() if position in b.positions)
            seen.append(image)
            logits = network(torch.cat(seen[-size:]))
            rows.append(logits[-1:].detach())
            if len(seen) % size == 0:
                loss = -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return torch.cat(rows)


@pytest.mark.parametrize("size", [2, 4, 11, 64])
def test_a_window_equals_a_list_of_the_last_images(size):
    """The first image of a segment is alone and yet nothing is warned of: no larger batch helps."""
    stream = windowed(size)
    found, expected = logits_of(tent(), stream), windows_by_hand(stream, size)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    if size == 4:  # and it is learnt from
        assert not torch.allclose(found, logits_of(BNStats(make_network("bn")), stream), atol=1e-4)


@pytest.mark.parametrize("given", [8, 8.0])
def test_a_window_is_described_as_a_whole_number(given):
    """A parser makes 8.0 of it."""
    assert repr(windowed(given).describe()["scenario_options"]) == "{'window': 8}"


def test_what_is_left_at_the_end_is_not_learnt_from():
    quiet(hooks := Hooks()).adapt(tent(), datamodule=windowed())
    assert [report.updated for report in hooks.reports] == [
        *([False] * 3 + [True]) * 2,
        *[False] * 3,
    ] * 2
    reasons = {report.reason for report in hooks.reports if not report.updated}
    assert reasons == {"the window is not complete"}
    assert all(report.loss is None for report in hooks.reports if not report.updated)
    assert hooks.reasons == ["segment gaussian_noise-3"]


@pytest.mark.filterwarnings("ignore:Batch statistics of a single image")
def test_a_window_of_one_is_single_sample():
    single = logits_of(tent(), make_stream(11, scenario="single_sample"))
    assert torch.equal(logits_of(tent(), windowed(1)), single)


def test_networks_without_batch_statistics_see_the_newest_image_alone():
    found = logits_of(Source(make_network("gn")), windowed())
    plain = logits_of(Source(make_network("gn")), make_stream(11, batch_size=1))
    torch.testing.assert_close(found, plain)


class OneByOne(Tent):
    """Learns from each image by itself, and forgets."""

    episodic = True

    def adapt_step(self, images):
        assert len(images) == 1
        self.reset()
        super().adapt_step(images)
        return self(images).detach()


def test_a_method_that_forgets_gets_the_newest_image_alone():
    found = logits_of(OneByOne(make_network("gn"), SGD(lr=0.1)), windowed())
    plain = logits_of(OneByOne(make_network("gn"), SGD(lr=0.1)), make_stream(11, batch_size=1))
    assert torch.equal(found, plain)


def test_no_method_but_those_that_forget_is_episodic():
    are_episodic = {name for name in methods.__all__ if getattr(methods, name).episodic}
    assert are_episodic == {"MEMO", "MT3", "TTT"}


class WithBadImages(ArraySource):
    def load(self, index, corruption="none", severity=0):
        if index in (2, 5):
            raise BadImageError(f"images/{index}.jpg is truncated.")
        return super().load(index, corruption, severity)


@pytest.mark.filterwarnings("ignore:Left out")
def test_bad_images_are_no_part_of_a_window():
    """Eleven images without two: windows of 3 are complete three times."""
    source = make_source(11)
    pixels = np.stack([source.load(i) for i in range(11)])
    bad = WithBadImages(pixels, source.labels, source.classes)
    settings = {"scenario": "sliding_window", "scenario_options": {"window": 3}}
    stream = Stream(bad, on_bad_image="skip", seed=4, **settings)
    kept, hooks = Logits(), Hooks()
    results = quiet(kept, hooks).adapt(tent(), datamodule=stream)
    assert [report.updated for report in hooks.reports] == [False, False, True] * 3
    assert results["bad_images"]["count"] == 2
    good = [p for p in range(11) if stream.plan.samples[p] not in (2, 5)]
    assert sorted(kept.rows) == good
    network, optimizer = plain_tent(make_network("bn"))
    seen = torch.stack([torch.tensor(pixels[i]) for i in stream.plan.samples[good]])
    seen = seen.permute(0, 3, 1, 2) / 255
    rows = []
    for count in range(1, 10):
        logits = network(seen[max(0, count - 3) : count])
        rows.append(logits[-1].detach())
        if count % 3 == 0:
            optimizer.zero_grad()
            torch.distributions.Categorical(logits=logits).entropy().mean().backward()
            optimizer.step()
    torch.testing.assert_close(kept.stacked(), torch.stack(rows), atol=1e-5, rtol=1e-5)


def test_images_of_a_window_must_be_alike():
    window = SlidingWindow(3)
    window.add(torch.zeros(1, 3, 8, 6))
    with pytest.raises(InputError, match=r"differ in size \(6 x 8 and 8 x 8 px\).*image_size"):
        window.add(torch.zeros(1, 3, 8, 8))


def test_the_cost_of_a_window():
    """A forward for every image, a backward for every complete window: 4 in 22."""
    cost = quiet().adapt(tent(), datamodule=windowed())["cost"]
    assert (cost["forwards_per_batch"], cost["backwards_per_batch"]) == (1, 4 / 22)
    assert cost["images_per_second"] > 0


def test_a_window_under_autocast():
    adapter = tent("gn")
    results = quiet(kept := Logits(), precision="bf16-mixed").adapt(adapter, datamodule=windowed())
    assert results["nonfinite_batches"] == 0
    assert {row.dtype for row in kept.rows.values()} == {torch.bfloat16}


def test_the_window_is_let_go_at_the_end():
    class Sizes(AdaptCallback):
        def __init__(self):
            self.sizes = []

        def on_adapt_batch_end(self, trainer, adapter, logits, batch, batch_idx):
            self.sizes.append(len(trainer.test_loop.window.images))
            self.loop = trainer.test_loop

    quiet(sizes := Sizes()).adapt(tent("gn"), datamodule=windowed())
    assert sizes.sizes == [1, 2, 3, *[4] * 8] * 2
    assert sizes.loop.window is None


# A reset before every batch -----------------------------------------------------------------------


class TwoSteps(Tent):
    """Predicts after its first step, so that what it has learnt before shows."""

    def adapt_step(self, images):
        super().adapt_step(images)
        return super().adapt_step(images)


def two_steps():
    return TwoSteps(make_network("bn"), SGD(lr=LR, momentum=MOMENTUM))


def test_episodic_equals_resetting_by_hand():
    stream, adapter = make_stream(scenario="episodic"), two_steps()
    rows = []
    for batch in stream.test_dataloader():
        adapter.reset()
        rows.append(adapter.adapt_step(batch.images))
    found = logits_of(two_steps(), stream)
    assert torch.equal(found, torch.cat(rows))
    assert not torch.equal(found, by_hand(two_steps(), make_stream()))


def test_tent_never_shows_what_it_learnt_there():
    found = logits_of(tent(), make_stream(scenario="episodic"))
    torch.testing.assert_close(found, logits_of(BNStats(make_network("bn")), make_stream()))


def test_resets_before_a_batch_are_not_announced():
    resets = []

    class Counts(Tent):
        def reset(self):
            resets.append(self)
            super().reset()

    adapter = Counts(make_network("gn"), SGD(lr=0.1))
    quiet(hooks := Hooks()).adapt(adapter, datamodule=make_stream(scenario="episodic"))
    assert hooks.reasons == ["segment gaussian_noise-3"]
    assert hooks.segments == ["contrast-3", "gaussian_noise-3"]
    assert len(resets) == 1 + 6 + 1  # at the start, before each batch, at the second segment
    assert all(report.updated for report in hooks.reports)


def test_the_end_of_a_segment_sees_what_was_learnt():
    class Ends(AdaptCallback):
        moved = ()

        def on_adapt_segment_end(self, trainer, adapter, segment):
            source = make_network("bn").state_dict()
            now = adapter.network.state_dict()
            self.moved = (*self.moved, any(not torch.equal(source[k], now[k]) for k in source))

    quiet(ends := Ends()).adapt(tent(), datamodule=make_stream(scenario="episodic"))
    assert ends.moved == (True, True)
