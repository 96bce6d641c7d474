"""What `Trainer.adapt` costs beside a bare loop of the same method: time a batch, peak memory.

All arms run Tent in one process, by turns, so that a slow spell of the machine hits each of them.
Peak memory is measured apart, each arm in a fresh process.
"""

from __future__ import annotations

import argparse
import io
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import tta_lightning.report.plots  # noqa: F401  adapt imports it late: no arm may save its memory
from tta_lightning import Trainer
from tta_lightning.data import ArraySource, Stream
from tta_lightning.errors import InputError
from tta_lightning.methods import Tent
from tta_lightning.models import load_model

LIMIT = 1.05  # of the ratios, in time and in memory

ADAPT = "adapt"
ADAPT_BAR = "adapt + bar"
BARE = "bare loop"
READY = "bare, ready"
BY_HAND = "torch.optim"

LEGEND = f"""\
{ADAPT}: Trainer.adapt, default callbacks, CSV files; {ADAPT_BAR}: and its bar
{BARE}: adapt_step, same dataloader; {READY}: adapt_step on ready tensors
{BY_HAND}: Tent written by hand, same dataloader, for orientation
ratio: of the medians, to the bare loop, limit {LIMIT}
other: milliseconds for the start, the first batch and the end of a run
"""

Arm = Callable[[], NDArray[np.float64]]
"""Runs the whole stream; returns the seconds of each batch after the first."""


@dataclass(frozen=True)
class Case:
    """A network and the batches it adapts to.

    Attributes:
        name: What it is called in the table.
        size: Side of the images in px.
        batch_size: Images a batch.
    """

    name: str
    size: int
    batch_size: int


CASES = (Case("vit_tiny_patch16_224", 224, 16), Case("efficientnet_lite0", 128, 32))


def make_network(case: Case) -> nn.Module:
    """Build the network of a case; without the package of weights, one with random weights."""
    torch.manual_seed(0)
    if case.name.startswith("vit"):
        return load_model(f"timm:{case.name}", pretrained=False)
    try:
        return load_model(f"package:{case.name}")
    except InputError:
        return load_model(f"timm:tf_{case.name}", pretrained=False)


def make_stream(case: Case, batches: int) -> Stream:
    """Make a stream of random images in memory, one batch more than is timed."""
    rng = np.random.default_rng(0)
    images = case.batch_size * (batches + 1)
    pixels = rng.integers(0, 256, size=(images, case.size, case.size, 3), dtype=np.uint8)
    source = ArraySource(pixels, rng.integers(0, 1000, size=images))
    return Stream(source, batch_size=case.batch_size, image_size="keep")


# Arms --------------------------------------------------------------------------------------------


class Clock(Callback):
    """Note when each batch ends, and the most memory that was in use before each batch."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.peak = 0

    def on_test_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """Read the high-water mark before CostMonitor sets it back."""
        self.peak = max(self.peak, high_water_mark(pl_module.device.type))

    def on_test_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """Note the time; the next batch's note covers the other callbacks of this one."""
        self.ends.append(time.perf_counter())


def adapt(adapter: Tent, stream: Stream, device: str, clock: Clock, bar: bool) -> dict[str, Any]:
    """Run `Trainer.adapt` with its default callbacks and CSV files; return its figures."""
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(Terminal()):
        trainer = Trainer(
            run_dir=Path(folder, "run"),
            callbacks=[clock],
            enable_progress_bar=bar,
            accelerator=device,
            devices=1,
        )
        return trainer.adapt(adapter, datamodule=stream)


class Terminal(io.StringIO):
    """A terminal that nobody sees: the progress bar draws in full and leaves our table alone."""

    def isatty(self) -> bool:
        """Say that somebody is watching."""
        return True


def time_adapt(adapter: Tent, stream: Stream, device: str, bar: bool) -> NDArray[np.float64]:
    """Time the batches of `Trainer.adapt`."""
    clock = Clock()
    adapt(adapter, stream, device, clock, bar)
    return np.diff(clock.ends)


def time_loop(
    step: Callable[[Tensor], Tensor], batches: Callable[[], Iterable[Tensor]]
) -> NDArray[np.float64]:
    """Time the batches of a bare loop."""
    ends = []
    for images in batches():
        step(images)
        ends.append(time.perf_counter())
    return np.diff(ends)


def load(stream: Stream, device: str) -> Iterator[Tensor]:
    """Draw images from the dataloader that `adapt` draws from."""
    for batch in stream.test_dataloader():
        yield batch.images.to(device)


def by_hand(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """Write Tent as a user does without this package; return its step."""
    network.eval().requires_grad_(False)
    parameters = []
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d | nn.LayerNorm):
            parameters += [p.requires_grad_(True) for p in layer.parameters()]
        if isinstance(layer, nn.BatchNorm2d):
            layer.train()
            layer.track_running_stats = False
    optimizer = torch.optim.SGD(parameters, lr=2.5e-4, momentum=0.9)

    def step(images: Tensor) -> Tensor:
        logits: Tensor = network(images)
        loss = -(logits.softmax(dim=1) * logits.log_softmax(dim=1)).sum(dim=1).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return logits.argmax(dim=1).cpu()

    return step


def make_arms(case: Case, stream: Stream, device: str) -> dict[str, Arm]:
    """Make every arm, each with its own copy of the network."""

    def tent() -> Tent:
        return Tent(make_network(case)).to(device)

    from_loader = partial(load, stream, device)
    ready = list(from_loader())
    return {
        ADAPT: partial(time_adapt, tent(), stream, device, bar=False),
        ADAPT_BAR: partial(time_adapt, tent(), stream, device, bar=True),
        BARE: partial(time_loop, tent().adapt_step, from_loader),
        READY: partial(time_loop, tent().adapt_step, lambda: ready),
        BY_HAND: partial(time_loop, by_hand(make_network(case).to(device)), from_loader),
    }


# Time --------------------------------------------------------------------------------------------


def measure_time(arms: dict[str, Arm], rounds: int) -> tuple[dict[str, Any], dict[str, float]]:
    """Run all arms by turns.

    Returns:
        For each arm the seconds of every batch, and the median of the seconds that a run takes
        besides: its start, its first batch and its end.
    """
    seconds: dict[str, list[NDArray[np.float64]]] = {name: [] for name in arms}
    rest: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, arm in arms.items():
            start = time.perf_counter()
            taken = arm()
            rest[name].append(time.perf_counter() - start - float(taken.sum()))
            seconds[name].append(taken)
    return (
        {name: np.concatenate(values) for name, values in seconds.items()},
        {name: float(np.median(values)) for name, values in rest.items()},
    )


def time_table(title: str, seconds: dict[str, Any], rest: dict[str, float]) -> Table:
    """Show the time a batch of every arm beside that of the bare loop, in milliseconds."""
    table = Table(title=title)
    table.add_column("ms a batch")
    for column in ("n", "median", "min", "quartiles", "ratio", "other"):
        table.add_column(column, justify="right", no_wrap=True)
    bare = float(np.median(seconds[BARE]))
    for name, values in seconds.items():
        low, median, high = np.percentile(values, [25, 50, 75])
        table.add_row(
            name,
            str(len(values)),
            f"{median * 1e3:.1f}",
            f"{values.min() * 1e3:.1f}",
            f"{low * 1e3:.1f} - {high * 1e3:.1f}",
            verdict(median / bare, judged=name in (ADAPT, ADAPT_BAR)),
            f"{rest[name] * 1e3:.0f}",
        )
    return table


# Memory ------------------------------------------------------------------------------------------


def high_water_mark(device: str) -> int:
    """Return the most memory in use so far, in bytes: of the GPU's allocator, or resident on Linux.

    ``ru_maxrss`` would not do: a child starts with its parent's value.
    """
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM:"))) * 1024


def peak_memory(arm: str, case: Case, batches: int, device: str, threads: int) -> int:
    """Run one arm in this process and return its peak memory in bytes.

    CostMonitor sets the high-water mark back when inference starts and when the update starts. The
    peak of inference is therefore taken from its report, everything else from the clock.
    """
    settle(threads)
    stream, adapter = make_stream(case, batches), Tent(make_network(case))
    if arm == BARE:
        time_loop(adapter.to(device).adapt_step, partial(load, stream, device))
        return high_water_mark(device)
    clock = Clock()
    results = adapt(adapter, stream, device, clock, bar=False)
    inference = int(results["cost"]["inference"]["peak_memory_bytes"])
    return max(inference, clock.peak, high_water_mark(device))


def measure_memory(
    case: Case, rounds: int, batches: int, device: str, threads: int
) -> dict[str, list[int]]:
    """Measure both arms by turns, each time in a fresh process that imports the same modules."""
    peaks: dict[str, list[int]] = {ADAPT: [], BARE: []}
    for _ in range(rounds):
        for arm, found in peaks.items():
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
                job = fresh.submit(peak_memory, arm, case, batches, device, threads)
                found.append(job.result())
    return peaks


def memory_table(title: str, peaks: dict[str, list[int]]) -> Table:
    """Show the peak memory of both arms."""
    table = Table(title=title)
    table.add_column("peak MiB")
    for column in ("runs", "median", "min - max", "ratio"):
        table.add_column(column, justify="right")
    for name, values in peaks.items():
        ratio = float(np.median(values) / np.median(peaks[BARE]))
        table.add_row(
            name,
            str(len(values)),
            f"{np.median(values) / 2**20:.1f}",
            f"{min(values) / 2**20:.1f} - {max(values) / 2**20:.1f}",
            verdict(ratio, judged=name == ADAPT),
        )
    return table


# -------------------------------------------------------------------------------------------------


def verdict(ratio: float, judged: bool) -> str:
    """Write a ratio to the bare loop, and where it is judged whether it keeps the limit."""
    word = "PASS" if ratio <= LIMIT else "over"
    return f"{ratio:.3f} {word}" if judged else f"{ratio:.3f}     "


def settle(threads: int) -> None:
    """Fix the number of threads, and keep Lightning's notes on the hardware out of the tables."""
    torch.set_num_threads(threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="GPU available but not used")


def main() -> None:
    """Measure every case on the CPU and, where there is one, on a GPU."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns of every arm")
    parser.add_argument("--batches", type=int, default=8, help="timed batches of a turn")
    parser.add_argument("--memory-rounds", type=int, default=3, help="fresh processes of every arm")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    options = parser.parse_args()
    settle(options.threads)
    console = Console()
    console.print(LEGEND)
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        for case in CASES:
            title = f"{case.name}, batch {case.batch_size}, {case.size} px, {device}"
            if device == "cpu":
                title += f", threads: {options.threads}"
            arms = make_arms(case, make_stream(case, options.batches), device)
            console.print(time_table(title, *measure_time(arms, options.rounds)))
            peaks = measure_memory(
                case, options.memory_rounds, options.batches, device, options.threads
            )
            console.print(memory_table(title, peaks))


if __name__ == "__main__":
    main()
