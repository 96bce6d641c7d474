"""Counts of forwards and backwards, times and memory."""

import sys
from contextlib import nullcontext

import pytest
import torch

from tests.loops.test_adaptation import quiet, tent
from tests.networks import make_network
from tests.streams import make_stream
from tta_lightning.callbacks import CostMonitor
from tta_lightning.contract import unobserved
from tta_lightning.methods import MT3, BNStats, Source, Tent
from tta_lightning.models import BYOLHeads, load_model
from tta_lightning.rules import SGD


class TwoBackwards(Tent):
    """A step with two forwards and two backwards, as SAR's."""

    def adapt_step(self, images):
        logits = super().adapt_step(images)
        super().adapt_step(images)
        return logits


def with_heads():
    return BYOLHeads(make_network("gn"), hidden=8, projection=6)


class Failing(MT3):
    """Breaks in the middle of a step."""

    def _one_by_one(self, images, numbers):
        super()._one_by_one(images, numbers)
        raise RuntimeError("of the test")


@pytest.mark.parametrize(
    ("adapter", "forwards", "backwards"),
    [
        (lambda: Source(make_network("bn")), 1, 0),
        (lambda: BNStats(make_network("bn")), 1, 0),
        (tent, 1, 1),
        (lambda: TwoBackwards(make_network("gn"), SGD(lr=0.1)), 2, 2),
        # 24 images in 6 batches; the logits of MT3 get no gradient, its predictions do
        (lambda: MT3(with_heads(), copies=2, episodes="loop"), 2 * 24 / 6, 24 / 6),
        (lambda: MT3(with_heads(), copies=2, episodes="vmap"), 2, 1),
        (lambda: MT3(load_model(with_heads(), mean=[0.1] * 3), copies=2, episodes="vmap"), 2, 1),
        (lambda: Tent(with_heads(), SGD(lr=0.1)), 1, 1),
        (lambda: Source(with_heads()), 1, 0),
    ],
)
def test_counts(adapter, forwards, backwards):
    cost = quiet().adapt(adapter(), datamodule=make_stream())["cost"]
    assert (cost["forwards_per_batch"], cost["backwards_per_batch"]) == (forwards, backwards)


def test_times_and_memory_are_plausible():
    class Slow(Tent):
        def learn(self, out, images):
            import time

            time.sleep(0.02)
            self.kept = torch.ones(64, 1024, 1024, dtype=torch.uint8).max()  # 64 MiB for a moment
            return super().learn(out, images)

    monitor = CostMonitor()
    cost = quiet(monitor).adapt(Slow(make_network("gn"), SGD(lr=0.1)), datamodule=make_stream())[
        "cost"
    ]
    assert cost["update"]["seconds_per_batch"] >= 0.02
    assert cost["inference"]["seconds_per_batch"] > 0
    assert 0 < cost["images_per_second_with_loading"] <= cost["images_per_second"] < 5 / 0.02
    if sys.platform == "linux":
        grown = cost["update"]["peak_memory_bytes"] - cost["inference"]["peak_memory_bytes"]
        assert 32 * 2**20 < grown < 256 * 2**20


def test_an_update_once_a_window_counts_for_all_batches_of_the_window():
    class Slow(Tent):
        def learn(self, out, images):
            import time

            time.sleep(0.05)
            return super().learn(out, images)

    stream = make_stream(scenario="sliding_window", scenario_options={"window": 4})
    cost = quiet().adapt(Slow(make_network("gn"), SGD(lr=0.1)), datamodule=stream)["cost"]
    updates, batches = 2 * 12 / 4, 2 * 12
    assert cost["backwards_per_batch"] == updates / batches
    assert 0.05 * updates / (batches - 1) <= cost["update"]["seconds_per_batch"] < 0.05


def test_nothing_stays_on_the_adapter():
    adapter = tent()
    quiet().adapt(adapter, datamodule=make_stream())
    assert not adapter.network._forward_hooks
    assert adapter.phase is unobserved


@pytest.mark.parametrize("method", [MT3, Failing])
def test_nothing_stays_on_the_heads(method):
    adapter = method(with_heads(), copies=2, episodes="loop")
    stops = pytest.raises(RuntimeError, match="of the test") if method is Failing else nullcontext()
    with stops:
        quiet().adapt(adapter, datamodule=make_stream())
    assert not any(module._forward_hooks for module in adapter.network.modules())
    assert adapter.phase is unobserved
