"""What STAG costs: a step of Tent with it beside a step without, in time and in memory.

All arms run in one process by turns, so that a slow spell of the machine hits each of them. Peak
memory is measured apart, each arm in a fresh process.
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import torch
from learned_rule_cost import Arm, table, time_arms
from overhead import CASES, Case, high_water_mark, make_network
from rich.console import Console
from rich.table import Table
from torch import Tensor

from tta_lightning.contract import Outputs
from tta_lightning.methods import Tent
from tta_lightning.methods.stag import StagOptions, StagTerm

TIME_LIMIT = 1.02
MEMORY_LIMIT = 1.01  # of the host's peak, and the anchors on top
ALONE = "Tent"
READINGS = {
    "row/self": StagOptions(space="row", anchors="self"),
    "feature/input": StagOptions(space="feature", anchors="input"),
    "full/full": StagOptions(space="full", anchors="full"),
}


def make_tent(case: Case, device: str, reading: str | None) -> Tent:
    """Make the host, with STAG if a reading is given."""
    tent = Tent(make_network(case)).to(device)
    tent.ready()
    if reading is not None:
        tent.terms.append(StagTerm(tent.head, READINGS[reading]))
    return tent


def make_images(case: Case, device: str) -> Tensor:
    """Make a batch of random images."""
    torch.manual_seed(0)
    return torch.rand(case.batch_size, 3, case.size, case.size, device=device)


def make_arms(case: Case, device: str) -> dict[str, Arm]:
    """Make one step of every arm, each on its own copy of the network."""
    images = make_images(case, device)

    def arm(reading: str | None) -> Arm:
        tent = make_tent(case, device, reading)
        return lambda: tent.adapt_step(images)

    return {ALONE: arm(None), **{name: arm(name) for name in READINGS}}


def term_arms(case: Case, device: str) -> dict[str, Arm]:
    """Make the loss of every reading and its gradient by features and logits."""

    def arm(reading: str) -> Arm:
        tent = make_tent(case, device, reading)
        out = tent.outputs(make_images(case, device))
        assert out.features is not None
        h, z = (t.detach().requires_grad_() for t in (out.features, out.logits))
        given = Outputs(z, h)
        return lambda: torch.autograd.grad(
            tent.terms[0](given, tent.head), [z, h], allow_unused=True
        )

    return {name: arm(name) for name in READINGS}


def peak_memory(case: Case, reading: str | None, device: str, threads: int) -> tuple[int, int]:
    """Run five steps in this process; return its peak and the anchors, both in bytes."""
    torch.set_num_threads(threads)
    tent, images = make_tent(case, device, reading), make_images(case, device)
    for _ in range(5):
        tent.adapt_step(images)
    anchors = [term.anchors for term in tent.terms if isinstance(term, StagTerm)]
    return high_water_mark(device), sum(each.numel() * each.element_size() for each in anchors)


def memory_table(case: Case, device: str, rounds: int, threads: int) -> Table:
    """Measure every arm by turns, each time in a fresh process."""
    found: dict[str | None, list[tuple[int, int]]] = {}
    for _ in range(rounds):
        for reading in (None, *READINGS):
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
                job = fresh.submit(peak_memory, case, reading, device, threads)
                found.setdefault(reading, []).append(job.result())
    shown = Table(title=f"{case.name}, peak of {rounds} processes, {device}")
    for column in ("MiB", "median", "min - max", "over the host", "allowed"):
        shown.add_column(column, justify="right" if column != "MiB" else "left")
    host = float(np.median([peak for peak, _ in found[None]]))
    for reading, values in found.items():
        peaks, anchors = [peak for peak, _ in values], values[0][1]
        over = float(np.median(peaks)) - host
        allowed = anchors + (MEMORY_LIMIT - 1) * host
        shown.add_row(
            reading or ALONE,
            f"{np.median(peaks) / 2**20:.1f}",
            f"{min(peaks) / 2**20:.1f} - {max(peaks) / 2**20:.1f}",
            f"{over / 2**20:.1f}",
            f"{allowed / 2**20:.1f} {'PASS' if over <= allowed else 'over'}" if reading else "",
        )
    return shown


def main() -> None:
    """Measure every case on the CPU and, where there is one, on a GPU."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=40, help="timed steps of every arm")
    parser.add_argument("--memory-rounds", type=int, default=5, help="fresh processes of every arm")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console = Console()
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        for case in CASES:
            title = f"{case.name}, batch {case.batch_size}, {case.size} px, {device}"
            seconds = time_arms(make_arms(case, device), options.rounds, device)
            console.print(table(f"{title}: limit {TIME_LIMIT}", seconds))
            for name in READINGS:
                low, middle, high = np.percentile(seconds[name] / seconds[ALONE], [25, 50, 75])
                console.print(f"{name}, step by step: {middle:.3f} ({low:.3f} - {high:.3f}) x")
            alone = time_arms(term_arms(case, device), options.rounds, device)
            console.print(table(f"{title}: the term alone, forward and backward", alone))
            head = make_tent(case, device, None).head
            for name, reading in READINGS.items():
                start = time.perf_counter()
                StagTerm(head, reading)
                took = time.perf_counter() - start
                console.print(f"anchors {name}, once: {took * 1e3:.0f} ms")
            if options.memory_rounds:
                console.print(memory_table(case, device, options.memory_rounds, options.threads))


if __name__ == "__main__":
    main()
