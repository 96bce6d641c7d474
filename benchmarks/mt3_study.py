"""What meta-training for a self-supervised step is worth: the table of the MT3 paper, at any size.

Baseline, JT and MT are predictions of a network as it is: trained with labels alone, jointly with
the self-supervised loss, and by MT3. TTT is the step on the network of JT, MT3 the step on that of
MT. Nothing is tuned. Each repetition is one network of each kind, with its own noise and views.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from learned_rules import Batches, run, stream
from rich.console import Console
from rich.table import Table
from torch import nn

from tta_lightning.adapter import Adapter
from tta_lightning.data.stream import CLEAN, CORRUPTION_SETS
from tta_lightning.errors import InputError
from tta_lightning.methods import MT3, Source
from tta_lightning.models import Embedder, load_model
from tta_lightning.runs import write_atomically

Arms = dict[str, Callable[[], Adapter]]
ARMS = ("Baseline", "JT", "TTT", "MT", "MT3")
GAINS = (("MT3", "MT"), ("MT3", "JT"), ("TTT", "JT"), ("MT", "JT"))


def make_arms(options: argparse.Namespace, repetition: int) -> Arms:
    """Say how to make the methods of a repetition."""
    joint, meta = options.joint[repetition], options.meta[repetition]
    flips = not options.no_flips

    def episodic(network: str, lr: float) -> Adapter:
        return MT3(network, lr=lr, copies=options.copies, flips=flips, seed=repetition)

    arms: Arms = {
        "JT": lambda: Source(joint),
        "TTT": lambda: episodic(joint, options.ttt_lr),
        "MT": lambda: Source(meta),
        "MT3": lambda: episodic(meta, options.lr),
    }
    if options.baseline:
        arms = {"Baseline": lambda: Source(options.baseline[repetition]), **arms}
    return arms


def repeat(
    options: argparse.Namespace, repetition: int, known: list[str]
) -> dict[str, dict[str, float]]:
    """Run the arms of a repetition that are not known; return accuracy in % by corruption, by cell.

    A cell is ``arm/repetition``.
    """
    if options.processes > 1:
        torch.set_num_threads(1)
    batches = stream(options, [CLEAN, *CORRUPTION_SETS[options.corruptions]], repetition)
    arms = make_arms(options, repetition)
    cells = {f"{name}/{repetition}": make for name, make in arms.items()}
    return {cell: run(make(), batches)[0] for cell, make in cells.items() if cell not in known}


def measure(options: argparse.Namespace, out: Path) -> dict[str, dict[str, float]]:
    """Run what the file does not hold yet; return all of it."""
    free = ("out", "batch_size", "processes", "baseline")
    settings = {k: v for k, v in vars(options).items() if k not in free}
    kept = json.loads(out.read_text()) if out.exists() else {"settings": settings, "accuracy": {}}
    if kept["settings"] != settings:
        raise InputError(f"{out} holds figures of other settings: {kept['settings']}.")
    known = list(kept["accuracy"])
    with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
        for done in as_completed(
            [pool.submit(repeat, options, number, known) for number in range(len(options.meta))]
        ):
            kept["accuracy"] |= done.result()
            write_atomically(out, json.dumps(kept, indent=1))
    return dict(
        sorted(kept["accuracy"].items(), key=lambda item: ARMS.index(item[0].split("/")[0]))
    )


def likeness(path: str, batches: Batches) -> float:
    """Return the mean cosine between the predictor's outputs for different clean images.

    Near 1 the self-supervised loss says nothing of an image.
    """
    embedder = Embedder(load_model(path))
    with torch.no_grad():
        said = torch.cat([embedder(images).predictions for images, _ in batches[CLEAN]])
    said = nn.functional.normalize(said, dim=1)
    pairs = len(said) * (len(said) - 1)
    return float(((said @ said.T).sum() - len(said)) / pairs)


def average(accuracies: dict[str, float]) -> float:
    """Average over the corruptions."""
    return float(np.mean([value for name, value in accuracies.items() if name != CLEAN]))


def show(found: dict[str, dict[str, float]], console: Console) -> None:
    """Print the table of the paper, and the gains with their signs."""
    arms = list(dict.fromkeys(cell.split("/")[0] for cell in found))
    cells = {arm: [found[cell] for cell in found if cell.split("/")[0] == arm] for arm in arms}
    names = [name for name in next(iter(found.values())) if name != CLEAN]
    table = Table("corruption", *arms, title="accuracy in %, mean ± s.d. (population)")
    for name in [*names, CLEAN]:
        table.add_row(name, *(_spread([each[name] for each in cells[arm]]) for arm in arms))
    table.add_row("mean", *(_spread([average(each) for each in cells[arm]]) for arm in arms))
    console.print(table)
    for better, worse in GAINS:
        pairs = list(zip(cells[better], cells[worse], strict=True))
        gains = [average(first) - average(second) for first, second in pairs]
        each = {n: float(np.mean([first[n] - second[n] for first, second in pairs])) for n in names}
        low, high = min(each, key=each.__getitem__), max(each, key=each.__getitem__)
        console.print(
            f"{better} - {worse}: {_spread(gains)}; up on {sum(g > 0 for g in each.values())} of "
            f"{len(names)} corruptions, {each[low]:+.2f} ({low}) to {each[high]:+.2f} ({high})"
        )


def _spread(values: list[float]) -> str:
    return f"{np.mean(values):.2f} ± {np.std(values):.2f}"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--meta", nargs="+", required=True, help="checkpoints of MT3, one each")
    parser.add_argument("--joint", nargs="+", required=True, help="checkpoints of JointTraining")
    parser.add_argument("--baseline", nargs="+", help="checkpoints of SourceTraining")
    parser.add_argument("--test", default="digits", help="folder of class folders, or digits")
    parser.add_argument("--table", default="imagenet", choices=("imagenet", "cifar"))
    parser.add_argument("--severity", type=int, default=5)
    parser.add_argument("--corruptions", default="common", choices=CORRUPTION_SETS)
    parser.add_argument("--limit", type=int, default=200, help="images a corruption")
    parser.add_argument("--batch-size", type=int, default=50, help="changes nothing but the speed")
    parser.add_argument("--copies", type=int, default=32, help="views a and b of an image, each")
    parser.add_argument("--lr", type=float, default=0.1, help="of the step of MT3")
    parser.add_argument("--ttt-lr", type=float, default=0.01, help="of the step of TTT")
    parser.add_argument("--no-flips", action="store_true", help="of networks trained without")
    parser.add_argument("--processes", type=int, default=1, help="repetitions at once")
    parser.add_argument("--out", type=Path, default=Path("mt3_study.json"))
    options = parser.parse_args()
    for name in ("joint", "baseline"):
        given = getattr(options, name)
        if given is not None and len(given) != len(options.meta):
            parser.error(f"--{name}: {len(given)} checkpoints for {len(options.meta)} repetitions")
    console = Console(width=140)
    show(measure(options, options.out), console)
    clean = stream(options, [CLEAN], 0)
    for name, paths in (("JT", options.joint), ("MT", options.meta)):
        values = ", ".join(f"{likeness(path, clean):.4f}" for path in paths)
        console.print(f"{name}, mean cosine between the predictions of different images: {values}")


if __name__ == "__main__":
    main()
