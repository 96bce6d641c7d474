"""Whether the collapse guard tells collapses, and only those, and what going back is worth.

``tune`` shows the figures the guard decides by, on the four tuning corruptions: of every method at
its preset's learning rate, and of Tent at multiples of its default one. The options' defaults come
from there. ``guard`` runs Tent at too high a rate with and without the guard, ``healthy`` counts
the alarms of every method at its preset's rate, both on other corruptions. ``simulate`` counts
false alarms over many batches of simulated predictions of a model that never changes, and ``cost``
times the guard beside Tent.

The detector stands in a bare loop, as :class:`~tta_lightning.collapse.CollapseDetector` documents;
the callback of the same options decides alike.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from methods_study import make
from numpy.typing import NDArray
from rich.console import Console
from stag_study import Batch, stream
from torch import Tensor, nn

from tta_lightning.adapter import Adapter
from tta_lightning.collapse import CollapseDetector, Detection
from tta_lightning.methods import Tent
from tta_lightning.models import load_model
from tta_lightning.rules import SGD

REGIMES = {  # scenario, batch size (None: --batch-size)
    "continual": ("continual", None),
    "correlated": ("correlated", None),
    "label_shift": ("label_shift", None),
    "single_sample": ("continual", 1),
}
METHODS = (
    *("bnstats", "tent", "eta", "eata", "sar", "deyo", "cotta", "rotta", "roid", "t3a"),
    *("lame", "source"),
)
TUNING = ["speckle_noise", "gaussian_blur", "spatter", "saturate"]
DEFAULT_LR = 2.5e-4  # of Tent with SGD


class Trace(CollapseDetector):
    """A detector that never alarms and keeps the figures it would decide by."""

    def __init__(self) -> None:
        super().__init__("warn", concentration=1.0, low=0.0, high=1.0, drift=np.inf, margin=1.0)
        self.figures: list[Detection] = []
        self.rises: list[float] = []

    def after_update(self, adapter: Adapter, images: Tensor, logits: Tensor) -> Detection | None:
        """Observe a batch; every 128 images, ask the probes too."""
        before = self.images // 128
        super().observe(adapter, images, logits)
        if self._scale is None:
            return None
        self._look(adapter)
        self.figures.append(self._figures(self._scale))
        probes = self._probes.of_size(images)
        if self.images // 128 > before and probes is not None:
            labels, scale = self._ask(adapter, probes), self._scale
            told = scale(self._probes.labels)
            self.rises.append(2.0 if labels is None else scale(labels) - told)
        return None

    def quantiles(self) -> dict[str, list[float]]:
        """Return minimum, median and maximum of each figure."""
        found: dict[str, list[float]] = {"rise": self.rises}
        for name in ("concentration", "entropy", "drift"):
            given = [getattr(each, name) for each in self.figures]
            found[name] = [value for value in given if value is not None]
        return {
            name: [round(float(q), 4) for q in np.quantile(values, [0, 0.5, 1])]
            for name, values in found.items()
            if values
        }


def run(
    adapter: Adapter, batches: list[Batch], guard: CollapseDetector | None
) -> tuple[float, list[Detection]]:
    """Adapt to a stream; return the accuracy in % and the collapses that were told."""
    adapter.reset()
    right, found = 0, []
    for batch in batches:
        if batch.resets:
            adapter.reset()
            if guard is not None:
                guard.note_reset()
        logits = adapter.adapt_step(batch.images)
        right += int((logits.argmax(dim=1) == batch.labels).sum())
        detection = None if guard is None else guard.after_update(adapter, batch.images, logits)
        if detection is not None:
            found.append(detection)
    return 100 * right / sum(len(batch.labels) for batch in batches), found


def tent(network: nn.Module, factor: float) -> Adapter:
    """Make Tent with SGD at a multiple of its default learning rate."""
    return Tent(copy.deepcopy(network), SGD(lr=DEFAULT_LR * factor, momentum=0.9))


def arms(options: argparse.Namespace, network: nn.Module, size: int) -> Iterator[tuple[str, Any]]:
    """Yield the methods that are asked for, at their preset's rate, with their names."""
    has_batch_norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.modules())
    for name in options.methods:
        if name != "bnstats" or has_batch_norm:
            yield name, make(options, name, network, size)


def write(options: argparse.Namespace, row: dict[str, Any]) -> dict[str, Any]:
    """Add a row to the file of JSON lines."""
    with options.out.open("a") as file:
        file.write(json.dumps({"phase": options.phase, "network": options.network, **row}) + "\n")
    print(json.dumps(row), flush=True)
    return row


def each_stream(options: argparse.Namespace) -> Iterator[tuple[str, int, list[Batch]]]:
    """Yield the regimes with their batch size and batches."""
    for regime in options.regimes:
        scenario, single = REGIMES[regime]
        batches, _ = stream(options, scenario, single, options.corruptions, options.seed)
        yield regime, single or options.batch_size, batches


def tune(options: argparse.Namespace, network: nn.Module) -> None:
    """Show the figures of every arm."""
    for regime, size, batches in each_stream(options):
        every = [*arms(options, network, size)]
        every += [(f"tent x{factor:g}", tent(network, factor)) for factor in options.factors]
        for name, adapter in every:
            trace = Trace()
            accuracy, _ = run(adapter, batches, trace)
            figures = trace.quantiles()
            write(options, {"regime": regime, "arm": name, "accuracy": accuracy, **figures})


def guard(options: argparse.Namespace, network: nn.Module) -> None:
    """Run Tent at too high a rate with no guard, and with two actions of it."""
    for regime, size, batches in each_stream(options):
        source, _ = run(make(options, "source", network, size), batches, None)
        for factor in options.factors:
            row: dict[str, Any] = {"regime": regime, "factor": factor, "source": source}
            for action in (None, "reset", "rollback"):
                detector = None if action is None else CollapseDetector(action)
                accuracy, found = run(tent(network, factor), batches, detector)
                row[action or "none"] = accuracy
                if detector is not None:
                    row[f"{action} counts"] = detector.summary()
                    row[f"{action} first"] = str(found[0]) if found else ""
            write(options, row)


def healthy(options: argparse.Namespace, network: nn.Module) -> None:
    """Count the alarms of every method at its preset's rate."""
    for regime, size, batches in each_stream(options):
        source, _ = run(make(options, "source", network, size), batches, None)
        for name, adapter in arms(options, network, size):
            detector = CollapseDetector("warn")
            accuracy, found = run(adapter, batches, detector)
            row = {"regime": regime, "arm": name, "source": source, "accuracy": accuracy}
            told = [str(each) for each in found[:3]]
            row |= {"batches": len(batches), **detector.summary(), "told": told}
            write(options, row)


def cost(options: argparse.Namespace, network: nn.Module) -> None:
    """Time the guard beside Tent at its default rate: medians, in microseconds of the CPU."""
    for regime, size, batches in each_stream(options):
        adapter, detector = tent(network, 1.0), CollapseDetector()
        steps, guards, calm, passes = [], [], [], 0
        for batch in batches:
            start = time.process_time()
            logits = adapter.adapt_step(batch.images)
            between = time.process_time()
            detector.after_update(adapter, batch.images, logits)
            steps.append(between - start)
            guards.append(time.process_time() - between)
            if detector.evidence_passes == passes:
                calm.append(guards[-1])
            passes = detector.evidence_passes
        row = {"regime": regime, "batch size": size, "batches": len(batches)}
        row |= {"step": 1e6 * np.median(steps), "guard": 1e6 * np.median(guards)}
        row["guard, % of steps"] = 100 * sum(guards) / sum(steps)
        row["the same without evidence"] = 100 * sum(calm) / sum(steps)
        write(options, {**row, **detector.summary()})


# Simulation --------------------------------------------------------------------------------------


class Simulated(Adapter):
    """A model that never changes, right with a probability, on images that are their class.

    An error falls on a class by weights that differ between classes, as confusions do.
    """

    def __init__(self, classes: int, accuracy: float, rng: np.random.Generator) -> None:
        super().__init__(nn.Identity())
        self.known, self.accuracy, self.rng = classes, accuracy, rng
        self.wrong = rng.dirichlet(np.full(classes, 1.0)).cumsum()[:-1]
        self.ready()
        self.memory = {"something": torch.zeros(1)}  # else there would be nothing to guard

    def configure(self) -> None:
        """Let nothing move."""

    def forward(self, images: Tensor) -> Tensor:
        """Predict images ``[B, 3, 1, 1]`` that hold their class."""
        labels = images[:, 0, 0, 0].long().numpy()
        right = self.rng.random(len(labels)) < self.accuracy
        predicted = np.where(
            right, labels, np.searchsorted(self.wrong, self.rng.random(len(labels)))
        )
        logits = torch.zeros(len(labels), self.known)
        logits[torch.arange(len(labels)), torch.from_numpy(predicted)] = 4.0
        return logits


def order_of(kind: str, classes: int, images: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Draw the classes of a stream ``[images]``: shuffled, in Dirichlet runs or one by one."""
    if kind == "shuffled":
        return rng.integers(0, classes, images)
    if kind == "one class after the other":
        length = max(1, images // classes)
        return np.repeat(rng.permutation(classes), length + 1)[:images]
    slots = min(classes, 100)
    runs = []
    for _ in range(slots):
        share = rng.dirichlet(np.full(classes, 0.1))
        runs.append(np.sort(rng.choice(classes, images // slots + 1, p=share)))
    return np.concatenate(runs)[:images]


KINDS = ("shuffled", "dirichlet", "one class after the other")
STREAM, CHUNK = 2000, 50_000  # batches of a simulated stream, and to a row of the results


def simulated_stream(kind: str, rng: np.random.Generator) -> dict[str, int]:
    """Serve one stream of a model that never changes; return the detector's counts."""
    classes, size = int(rng.choice([10, 100, 1000])), int(rng.choice([1, 4, 16]))
    model = Simulated(classes, rng.uniform(0.2, 0.95), rng)
    labels = torch.from_numpy(order_of(kind, classes, STREAM * size, rng))
    images = labels.float().view(-1, 1, 1, 1).expand(-1, 3, 1, 1)
    detector = CollapseDetector("warn", seed=int(rng.integers(1 << 30)))
    for part in images.split(size):
        detector.after_update(model, part, model.forward(part))
    return {"batches": STREAM, **detector.summary()}


def simulate(options: argparse.Namespace) -> None:
    """Count false alarms over streams of many kinds."""
    rng = np.random.default_rng(options.seed)
    for chunk in range(-(-options.batches // CHUNK)):
        totals: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
        for number in range(CHUNK // STREAM):
            kind = KINDS[number % len(KINDS)]
            totals[kind].update(simulated_stream(kind, rng))
        for kind, counts in totals.items():
            write(options, {"seed": options.seed, "chunk": chunk, "order": kind, **counts})


# Report ------------------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]]) -> str:
    """Write rows as a table, a column a key."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for row in rows:
        lines.append("| " + " | ".join(_cell(row.get(name, "")) for name in names) + " |")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    return f"{value:.1f}" if isinstance(value, float) else str(value)


PHASES = {"tune": tune, "guard": guard, "healthy": healthy, "cost": cost, "simulate": None}


def main() -> None:
    """Run a phase, print its table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("phase", choices=tuple(PHASES))
    parser.add_argument("network", nargs="?", help="as in `tta`, or a JSON object")
    parser.add_argument("--test", default="digits", help="'digits', or a folder of class folders")
    parser.add_argument("--clean", help="a folder of class folders; else digits")
    parser.add_argument(
        "--corruptions",
        nargs="+",
        default=["gaussian_noise", "defocus_blur", "fog", "contrast", "jpeg_compression"],
        help="the phase tune has its own",
    )
    parser.add_argument("--severity", type=int, default=3)
    parser.add_argument("--table", choices=("imagenet", "cifar"), default="imagenet")
    parser.add_argument("--image-size", type=int, help="side in px; as it is by default")
    parser.add_argument("--limit", type=int, default=500, help="images a corruption")
    parser.add_argument("--single", type=int, default=200, help="the same at batch size 1")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--regimes", nargs="+", choices=list(REGIMES), default=list(REGIMES))
    parser.add_argument("--factors", nargs="*", type=float, default=[10.0], help="of Tent's rate")
    parser.add_argument("--batches", type=int, default=1_000_000, help="to simulate")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    parser.add_argument("--out", type=Path, required=True, help="file that JSON lines are added to")
    options = parser.parse_args()
    vars(options).update(presets="small", lr_factor=1.0, given="{}", mgg=None)
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    phase = PHASES[options.phase]
    if phase is None:
        simulate(options)
    else:
        given = options.network or parser.error("give a network")
        network = load_model(json.loads(given) if given.startswith("{") else given)
        if options.phase == "tune":
            options.corruptions = TUNING
        phase(options, network)
    rows = [json.loads(line) for line in options.out.read_text().splitlines()]
    Console().print(table(rows), soft_wrap=True)


if __name__ == "__main__":
    main()
