"""What the file of AdaptedWeights predicts without this package, and what gathering it costs.

Half of the held-out digits are the stream: one corruption, then, after a reset, the last one. The
other half, with the last corruption, is predicted by the source model, by the method as it stands
after the stream (in batches), and by a plain network in evaluation mode that loads the file: once
as it is, once with the running statistics of the source model put back.

The cost is that of a batch under Tent, in whole runs with and without the callback by turns.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tta_lightning import Stream, Trainer
from tta_lightning.adapter import Adapter
from tta_lightning.callbacks import AdaptCallback, AdaptedWeights
from tta_lightning.data import ArraySource, Digits
from tta_lightning.methods import BNStats, CoTTA, RoTTA, Source, Tent
from tta_lightning.models import Classifier, load_model
from tta_lightning.models.norms import batch_norm_layers
from tta_lightning.rules import SGD, Adam

METHODS: dict[str, Callable[[nn.Module], Adapter]] = {
    "BNStats": BNStats,
    "Tent": lambda network: Tent(network, Adam(lr=1e-3)),
    "CoTTA, sure": lambda network: CoTTA(network, Adam(lr=1e-3), ap=0.0),
    "CoTTA, views": lambda network: CoTTA(network, Adam(lr=1e-3), ap=1.0, n_augmentations=8),
    "RoTTA": lambda network: RoTTA(network, Adam(lr=1e-3)),
}
ARMS = ("source", "as it ran", "file", "file, source statistics")
BATCH = 50


class Collector(AdaptCallback):
    """Keeps the images and labels of a stream."""

    def __init__(self) -> None:
        self.images: list[Tensor] = []
        self.labels: list[Tensor] = []

    def on_adapt_batch_end(self, *args: Any) -> None:
        """Keep a batch."""
        batch = args[3]
        self.images.append(batch.images)
        self.labels.append(batch.labels)


def adapt(adapter: Adapter, callbacks: list[Any], folder: Path | bool, **data: Any) -> Any:
    """Run on the CPU, without bars and loggers."""
    trainer = Trainer(
        run_dir=folder,
        callbacks=callbacks,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
    )
    return trainer.adapt(adapter, **data)


def halves() -> tuple[ArraySource, ArraySource]:
    """Split the held-out digits: every second one, so that the classes are as frequent in both."""
    digits = Digits("test")
    images = np.stack([digits.load(index) for index in range(len(digits.labels))])
    first, second = (
        ArraySource(images[start::2], digits.labels[start::2], digits.classes) for start in (0, 1)
    )
    return first, second


def collect(source: ArraySource, network: str, corruption: str) -> tuple[Tensor, Tensor]:
    """Return corrupted images ``[N, 3, H, W]`` and labels ``[N]``, shuffled."""
    kept = Collector()
    stream = Stream(source, corruptions=[corruption], severity=3, batch_size=BATCH)
    adapt(Source(load_model(network)), [kept], False, datamodule=stream)
    return torch.cat(kept.images), torch.cat(kept.labels)


def accuracy(predict: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> float:
    """Return the fraction that is right, predicted in batches."""
    with torch.no_grad():
        logits = torch.cat([predict(part) for part in images.split(BATCH)])
    return (logits.argmax(dim=1) == labels).double().mean().item()


def plain(network: str, file: Path, source_statistics: bool) -> nn.Module:
    """Load a file into a fresh network, perhaps without the statistics in it."""
    classifier = load_model(network)
    assert isinstance(classifier, Classifier)
    state = load_file(file)
    if source_statistics:
        state = {name: value for name, value in state.items() if ".running_" not in name}
    classifier.network.load_state_dict(state, strict=not source_statistics)
    return classifier.eval()


def compare(network: str, method: str, before: str, last: str) -> dict[str, float]:
    """Adapt to two corruptions and measure every arm on other images with the last one."""
    first, second = halves()
    adapter = METHODS[method](load_model(network))
    stream = Stream(first, corruptions=[before, last], severity=3, batch_size=BATCH)
    images, labels = collect(second, network, last)
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent, "run")
        adapt(adapter, [AdaptedWeights()], folder, datamodule=stream)
        file = folder / "adapted.safetensors"
        networks = (plain(network, file, source_statistics=source) for source in (False, True))
        predictors = (load_model(network).eval(), adapter, *networks)
        return {
            arm: accuracy(predictor, images, labels)
            for arm, predictor in zip(ARMS, predictors, strict=True)
        }


class Clock(Callback):
    """Notes the processor seconds of each batch, which other programs on the machine disturb least.

    It is the first callback of the trainer, so the hooks of others lie within.
    """

    def __init__(self) -> None:
        self.batches: list[float] = []

    def on_test_batch_start(self, *args: Any) -> None:
        """Start."""
        self.start = time.process_time()

    def on_test_batch_end(self, *args: Any) -> None:
        """Stop."""
        self.batches.append(time.process_time() - self.start)


def cost(spec: str, side: int, batches: int, turns: int) -> tuple[float, float, float]:
    """Time a batch of 16 under Tent with and without the callback, by turns.

    Returns:
        Seconds a batch without and with it (medians), and the median of the ratios.
    """
    torch.manual_seed(0)
    network = load_model(spec)
    images = TensorDataset(torch.rand(16 * batches, 3, side, side))
    times: dict[bool, list[float]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as parent:
        for turn in range(turns + 1):
            for watched in (False, True):
                clock, adapter = Clock(), Tent(network, SGD(lr=0.0))
                callbacks = [clock, AdaptedWeights()] if watched else [clock]
                loader = DataLoader(images, batch_size=16)
                adapt(adapter, callbacks, Path(parent, f"{turn}-{watched}"), dataloaders=loader)
                times[watched].append(median(clock.batches))
    without, with_it = times[False][1:], times[True][1:]  # the first turn warms up
    ratios = [b / a for a, b in zip(without, with_it, strict=True)]
    return median(without), median(with_it), median(ratios)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("network", help="a checkpoint of tta fit on digits, batch-normalised")
    parser.add_argument(
        "--corruptions",
        nargs="+",
        default=["gaussian_noise", "defocus_blur", "fog", "contrast", "jpeg_compression"],
        help="at severity 3; each is the last one once, after the one before it in this list",
    )
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--batches", type=int, default=8, help="of a run that is timed")
    parser.add_argument("--turns", type=int, default=5, help="0 leaves the cost out")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    console = Console()
    table = Table("method", "last corruption", *ARMS)
    for method in options.methods:
        rows = []
        for number, last in enumerate(options.corruptions):
            found = compare(options.network, method, options.corruptions[number - 1], last)
            rows.append(found)
            table.add_row(method, last, *(f"{found[arm]:.1%}" for arm in ARMS))
        table.add_row(
            method, "mean", *(f"{mean(r[arm] for r in rows):.1%}" for arm in ARMS), end_section=True
        )
    console.print(table)
    if not options.turns:
        return
    table = Table("network", "batch norms", "CPU ms a batch", "with it", "ratio (median)")
    cases = ((options.network, 32), ("package:efficientnet_lite0", 224))
    for spec, side in cases:
        without, watched, ratio = cost(spec, side, options.batches, options.turns)
        layers = len(batch_norm_layers(load_model(spec)))
        name = spec if ":" in spec else Path(spec).name
        table.add_row(
            name, str(layers), f"{1e3 * without:.0f}", f"{1e3 * watched:.0f}", f"{ratio:.3f}"
        )
    console.print(table)
    console.print(f"batches of 16, {torch.get_num_threads()} threads, {options.turns} turns")


if __name__ == "__main__":
    main()
