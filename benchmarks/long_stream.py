"""Whether memory stays level on a long stream: resident memory after 10 % and after 90 % of it."""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import nn

from tta_lightning import Trainer
from tta_lightning.data import ImageSource, Stream
from tta_lightning.methods import Tent

LIMIT = 0.02  # relative change of the resident memory
SIZE = 32  # side of the images in px
CLASSES = 10
BATCH_SIZE = 50


class SyntheticSource(ImageSource):
    """Images of noise, made from their index when they are asked for; nothing is stored."""

    def __init__(self, images: int) -> None:
        self.labels = np.arange(images, dtype=np.int64) % CLASSES

    def load(self, index: int, corruption: str = "none", severity: int = 0) -> NDArray[np.uint8]:
        """Make one image ``[SIZE, SIZE, 3]``."""
        self.check(index, corruption, severity)
        rng = np.random.default_rng(index)
        return rng.integers(0, 256, size=(SIZE, SIZE, 3), dtype=np.uint8)

    def path(self, index: int, corruption: str = "none", severity: int = 0) -> str:
        """Name an image."""
        return f"synthetic[{index}]"


class MemoryProbe(Callback):
    """Read the resident memory after each tenth of the stream.

    Args:
        batches: Number of batches of the stream.

    Attributes:
        resident: Batches done to bytes.
    """

    def __init__(self, batches: int) -> None:
        self.due = {round(batches * tenth / 10) for tenth in range(1, 11)}
        self.resident: dict[int, int] = {}

    def on_test_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Read after a batch."""
        if batch_idx + 1 in self.due:
            self.resident[batch_idx + 1] = resident_bytes()


def resident_bytes() -> int:
    """Return the memory of this process that is in RAM now, in bytes; Linux only."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def make_network() -> nn.Module:
    """Build two convolutions with batch normalisation and a linear head."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, CLASSES),
    )


def report(resident: dict[int, int], batches: int, seconds: float) -> None:
    """Print the memory after each tenth, and the change between 10 % and 90 %."""
    console = Console()
    table = Table(title=f"{batches} batches, {seconds:.0f} s")
    table.add_column("batches", justify="right")
    table.add_column("resident, MiB", justify="right")
    for done, size in resident.items():
        table.add_row(str(done), f"{size / 2**20:.2f}")
    console.print(table)
    early, late = (resident[round(batches * part)] for part in (0.1, 0.9))
    word = "PASS" if abs(late / early - 1) <= LIMIT else "over"
    console.print(
        f"10 %: {early / 2**20:.2f} MiB, 90 %: {late / 2**20:.2f} MiB, "
        f"ratio {late / early:.4f}: {word} (limit: within {LIMIT:.0%})"
    )


def main() -> None:
    """Adapt Tent to a long stream, with default callbacks and CSV files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--samples", type=int, default=100_000, help=f"length, {10 * BATCH_SIZE} or more"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    options = parser.parse_args()
    if options.samples < 10 * BATCH_SIZE:
        parser.error(f"--samples {options.samples}: a tenth of the stream must be a whole batch")
    torch.set_num_threads(options.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    stream = Stream(SyntheticSource(options.samples), batch_size=BATCH_SIZE, image_size="keep")
    batches = -(-options.samples // BATCH_SIZE)
    probe = MemoryProbe(batches)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            run_dir=Path(folder, "run"), callbacks=[probe], accelerator="cpu", devices=1
        )
        trainer.adapt(Tent(make_network()), datamodule=stream)
    report(probe.resident, batches, time.perf_counter() - start)


if __name__ == "__main__":
    main()
