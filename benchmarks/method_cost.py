"""What a batch costs under each method, in units of the plain forward pass of the network.

All arms run in one process by turns, the forward pass before and after each of them, so that a slow
spell of the machine hits both. Learning rates are zero, so that every turn does the same work, but
for T3A, whose memory grows.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from overhead import CASES, Case, make_network
from rich.console import Console
from rich.table import Table
from stag_cost import make_images
from torch import Tensor, nn

from tta_lightning.adapter import Adapter
from tta_lightning.functional import entropy
from tta_lightning.methods import (
    EATA,
    LAME,
    MEMO,
    ROID,
    SAR,
    T3A,
    BNStats,
    CoTTA,
    DeYO,
    RoTTA,
    Source,
    Tent,
)
from tta_lightning.models.norms import batch_norm_layers
from tta_lightning.rules import SGD

LIMITS = {  # of the published code, measured on this kind of machine
    ("vit_tiny_patch16_224", "Tent"): 2.4,
    ("vit_tiny_patch16_224", "SAR"): 4.9,
    ("efficientnet_lite0", "Tent"): 3.9,
    ("efficientnet_lite0", "SAR"): 7.9,
}
NAMES = (
    *("Source", "BNStats", "Tent", "ETA, all kept", "ETA, a quarter kept", "ETA, none kept"),
    *("SAR", "DeYO, all kept", "DeYO, a quarter kept", "DeYO, none kept", "CoTTA, sure"),
    *("CoTTA, unsure", "RoTTA", "ROID", "LAME", "T3A", "MEMO"),
)
EVERYTHING = 10.0  # nats, a margin that every sample of 1,000 classes is within
SLOW = {"MEMO", "CoTTA, unsure"}


class Arm(NamedTuple):
    """A method, and how many batches its work repeats after."""

    adapter: Adapter
    period: int = 1


def make_arms(case: Case, device: str) -> dict[str, Arm]:
    """Make every method, each on its own copy of the network."""
    still, images = SGD(lr=0.0), make_images(case, device)

    def network() -> nn.Module:
        return make_network(case).to(device)

    def eta(share: float) -> EATA:
        margin = margin_keeping(network(), images, share)
        return EATA(network(), still, margin, d_margin=2.0, fisher_alpha=0.0)

    def deyo(share: float) -> DeYO:
        margin = margin_keeping(network(), images, share)
        return DeYO(network(), still, margin, plpd_threshold=-1.0)

    arms = {
        "Source": Arm(Source(network())),
        "Tent": Arm(Tent(network(), still)),
        "ETA, all kept": Arm(eta(1.0)),
        "ETA, a quarter kept": Arm(eta(0.25)),
        "ETA, none kept": Arm(eta(0.0)),
        "SAR": Arm(SAR(network(), still, margin_e0=EVERYTHING, reset_constant=0.0)),
        "DeYO, all kept": Arm(deyo(1.0)),
        "DeYO, a quarter kept": Arm(deyo(0.25)),
        "DeYO, none kept": Arm(deyo(0.0)),
        "CoTTA, sure": Arm(CoTTA(network(), still, ap=0.0)),
        "CoTTA, unsure": Arm(CoTTA(network(), still, ap=1.0)),
        "RoTTA": Arm(RoTTA(network(), still), period=64 // case.batch_size),
        "ROID": Arm(ROID(network(), still)),
        "LAME": Arm(LAME(network())),
        "T3A": Arm(T3A(network())),
        "MEMO": Arm(MEMO(network(), still)),
    }
    if batch_norm_layers(network()):
        arms["BNStats"] = Arm(BNStats(network()))
    # Random networks predict few classes, and its memory has a place or less for each of 1,000.
    arms["RoTTA"].adapter.restrict_classes([0])
    return arms


def margin_keeping(network: nn.Module, images: Tensor, share: float) -> float:
    """Return an entropy that a share of the images is below, under statistics of the batch."""
    if share in (0.0, 1.0):
        return share * EVERYTHING
    adapter = Tent(network, SGD(lr=0.0))
    with torch.no_grad():
        entropies = entropy(adapter(images)).sort().values
    kept = math.ceil(share * len(images))
    return float((entropies[kept - 1] + entropies[kept]) / 2)


def seconds_of(step: Callable[[], object], times: int, device: str) -> float:
    """Time a call, the mean of several."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(times):
        step()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / times


def measure(case: Case, device: str, rounds: int, slow_rounds: int, chosen: list[str]) -> Table:
    """Time the chosen methods beside the forward pass, by turns."""
    images, plain = make_images(case, device), make_network(case).to(device).eval()

    @torch.no_grad()
    def forward() -> Tensor:
        logits: Tensor = plain(images)
        return logits

    arms = {name: arm for name, arm in make_arms(case, device).items() if name in chosen}
    ratios = dict[str, list[float]]()
    for arm in arms.values():  # caches, and states that are made at the first batch
        seconds_of(lambda arm=arm: arm.adapter.adapt_step(images), arm.period, device)
    seconds_of(forward, 3, device)
    for turn in range(rounds):
        for name, (adapter, period) in arms.items():
            if name in SLOW and turn >= slow_rounds:
                continue
            before = seconds_of(forward, 2, device)
            own = seconds_of(lambda: adapter.adapt_step(images), period, device)  # noqa: B023
            after = seconds_of(forward, 2, device)
            ratios.setdefault(name, []).append(2 * own / (before + after))
    shown = Table(
        title=f"{case.name}, batch {case.batch_size}, {case.size} px, {device}: forwards a batch"
    )
    for column in ("method", "median", "quartiles", "limit"):
        shown.add_column(column, justify="left" if column == "method" else "right")
    for name, values in ratios.items():
        low, middle, high = np.percentile(values, [25, 50, 75])
        limit = LIMITS.get((case.name, name))
        verdict = "" if limit is None else f"{limit} {'PASS' if middle <= limit else 'over'}"
        shown.add_row(name, f"{middle:.2f}", f"{low:.2f} - {high:.2f}", verdict)
    return shown


def main() -> None:
    """Measure both networks on the CPU and, where there is one, on a GPU."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15, help="turns of every method")
    parser.add_argument("--slow-rounds", type=int, default=2, help="of those with many views")
    parser.add_argument("--methods", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        for case in CASES:
            rounds = (options.rounds, options.slow_rounds)
            Console().print(measure(case, device, *rounds, options.methods))


if __name__ == "__main__":
    main()
