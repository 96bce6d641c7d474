"""Counts of forwards and backwards, times and memory."""

import sys

import pytest
import torch

from tests.loops.test_adaptation import quiet, tent
from tests.networks import make_network
from tests.streams import make_stream
from tta_lightning.callbacks import CostMonitor
from tta_lightning.contract import unobserved
from tta_lightning.methods import BNStats, Source, Tent
from tta_lightning.rules import SGD


class TwoBackwards(Tent):
    """A step with two forwards and two backwards, as SAR's."""

    def adapt_step(self, images):
        logits = super().adapt_step(images)
        super().adapt_step(images)
        return logits


@pytest.mark.parametrize(
    ("adapter", "forwards", "backwards"),
    [
        (lambda: Source(make_network("bn")), 1, 0),
        (lambda: BNStats(make_network("bn")), 1, 0),
        (tent, 1, 1),
        (lambda: TwoBackwards(make_network("gn"), SGD(lr=0.1)), 2, 2),
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


def test_nothing_stays_on_the_adapter():
    adapter = tent()
    quiet().adapt(adapter, datamodule=make_stream())
    assert not adapter.network._forward_hooks
    assert adapter.phase is unobserved
