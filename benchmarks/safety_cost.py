"""What safety costs: the share of a Tent run that checkpoints and the guard take, and their size.

Whole runs in their run folders, with both; Lightning's profiler says how long their hooks took. A
share of one run says more on a noisy machine than a difference of two. The size of a checkpoint is
that of the last one, beside that of the network.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.profilers import SimpleProfiler
from rich.console import Console
from rich.table import Table

from tta_lightning import Stream, Trainer
from tta_lightning.callbacks import AdaptationCheckpoint, CollapseGuard
from tta_lightning.checkpoints import read, stored
from tta_lightning.data import Digits
from tta_lightning.methods import Tent
from tta_lightning.models import load_model
from tta_lightning.rules import SGD

CALLBACKS = ("AdaptationCheckpoint", "CollapseGuard")
LIMITS = {"AdaptationCheckpoint": 0.02, "CollapseGuard": 0.01}


def shares(network: str, corruptions: list[str], limit: int, folder: Path) -> dict[str, float]:
    """Adapt once, and return each callback's part of the time from the first batch to the last."""
    profiler, clock = SimpleProfiler(), Clock()
    stream = Stream(
        Digits("test"),
        scenario="continual",
        corruptions=corruptions,
        severity=3,
        batch_size=50,
        limit=limit,
    )
    trainer = Trainer(
        run_dir=folder,
        callbacks=[AdaptationCheckpoint(every_n_batches=50), CollapseGuard(), clock],
        profiler=profiler,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
    )
    adapter = Tent(load_model(network), SGD(lr=2.5e-4, momentum=0.9))
    trainer.adapt(adapter, datamodule=stream)
    spent = {
        name: sum(
            sum(seconds)
            for action, seconds in profiler.recorded_durations.items()
            if action
            in (f"[Callback]{name}.on_adapt_boundary", f"[Callback]{name}.on_adapt_batch_end")
        )
        for name in CALLBACKS
    }
    rest = clock.seconds - sum(spent.values())
    return {name: seconds / rest for name, seconds in spent.items()}


class Clock(Callback):
    """Measures from the first batch to the end of the last."""

    def on_test_batch_start(self, *args: Any) -> None:
        """Start at the first batch."""
        self.start = getattr(self, "start", time.perf_counter())

    def on_test_batch_end(self, *args: Any) -> None:
        """Note how long it has been."""
        self.seconds = time.perf_counter() - self.start


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("network", help="a checkpoint of tta fit, or another model of digits")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument(
        "--corruptions",
        nargs="+",
        default=["gaussian_noise", "shot_noise", "zoom_blur", "pixelate"],
        help="at severity 3; with contrast, predictions are suspicious and evidence is asked for",
    )
    parser.add_argument("--limit", type=int, default=1000, help="images a corruption, of four")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as parent:
        # the first turn warms up
        turns = [
            shares(options.network, options.corruptions, options.limit, Path(parent, str(turn)))
            for turn in range(options.turns + 1)
        ][1:]
        newest = stored(Path(parent, str(options.turns)))[0]
        size, held = newest.stat().st_size, read(newest)
    table = Table("callback", "share of the run (median)", "largest", "limit")
    for name in CALLBACKS:
        found = [turn[name] for turn in turns]
        shown = (median(found), max(found), LIMITS[name])
        table.add_row(name, *(f"{share:.2%}" for share in shown))
    console = Console()
    console.print(table)
    weights = sum(tensor.nbytes for tensor in load_model(options.network).state_dict().values())
    moving = sum(t.nbytes for t in held["adapter"].values() if isinstance(t, torch.Tensor))
    console.print(
        f"checkpoint {size:,} bytes, of which {moving:,} are the weights that move; "
        f"network {weights:,} bytes; {torch.get_num_threads()} threads, {options.turns} turns of "
        f"{held['loop']['batches']} batches"
    )


if __name__ == "__main__":
    main()
