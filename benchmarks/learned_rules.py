"""What a learned rule is worth: MGG against the rules it could be replaced by, under one loss.

Every arm but Source and Tent minimises the loss of MGTTA. The learning rate of each arm is the one
of its grid with the highest accuracy on the four tuning corruptions, with the first network; the
15 corruptions of the table are then looked at once. Every network given is one repetition, with its
own order of the stream, noise, and training of the rules.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from rich.console import Console
from torch import Tensor, nn

from tta_lightning import Trainer
from tta_lightning.adapter import Adapter
from tta_lightning.data import ArraySource, Digits, ImageFolder, ImageSource, ShiftedImages, Stream
from tta_lightning.meta import MGGPretraining
from tta_lightning.methods import MGTTA, Source, Tent
from tta_lightning.models import load_model
from tta_lightning.rules import MGG, SGD, Adam, Sign
from tta_lightning.runs import write_atomically

BETAS = (0.9, 0.99)
NORMALISED = (1e-3, 3e-3, 1e-2, 3e-2)  # learning rates of rules that divide by the gradient's size
PLAIN = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
FACTORS = (0.1, 1.0, 10.0)  # of the loss weight, for the sensitivity to it

Batches = dict[str, list[tuple[Tensor, Tensor]]]  # by corruption: images, labels
Make = Callable[[nn.Module, float], Adapter]  # network and learning rate to method


class Arm(NamedTuple):
    """A method, and the learning rates it is tuned over."""

    make: Make
    grid: tuple[float, ...]


def images_of(options: argparse.Namespace, split: str) -> ImageSource:
    """Return the digits, or a folder of class folders."""
    root = getattr(options, split)
    return Digits(split) if root == "digits" else ImageFolder(root)


def stream(options: argparse.Namespace, corruptions: str | list[str], seed: int) -> Batches:
    """Make the batches of all corruptions, in memory."""
    data = Stream(
        images_of(options, "test"),
        corruptions=corruptions,
        severity=options.severity,
        table=options.table,
        batch_size=options.batch_size,
        limit=options.limit,
        image_size="keep",
        seed=seed,
    )
    found: Batches = {}
    for batch in data.test_dataloader():
        name = data.plan.domain(int(batch.positions[0])).corruption
        found.setdefault(name, []).append((batch.images, batch.labels))
    return found


def run(adapter: Adapter, batches: Batches) -> tuple[dict[str, float], list[float]]:
    """Adapt to each corruption from the source model.

    Returns:
        Accuracy in % by corruption, and the running accuracy after each batch, averaged over them.
    """
    accuracies, curves = {}, []
    for name, sequence in batches.items():
        adapter.reset()
        right = [(adapter.adapt_step(x).argmax(dim=1) == y).double() for x, y in sequence]
        seen = torch.tensor([len(each) for each in right]).cumsum(0)
        running = torch.stack([each.sum() for each in right]).cumsum(0) / seen
        accuracies[name] = 100 * float(running[-1])
        curves.append(100 * running)
    return accuracies, torch.stack(curves).mean(dim=0).tolist()


def mean(accuracies: dict[str, float]) -> float:
    """Average over corruptions."""
    return float(np.mean(list(accuracies.values())))


# Training ---------------------------------------------------------------------------------------


def train(
    options: argparse.Namespace, network: nn.Module, kind: str, seed: int, folder: str
) -> tuple[str, float]:
    """Pre-train a rule for a network; return the checkpoint and the seconds it took."""
    seed_everything(seed, verbose=False)
    unrolled = kind == "unroll"
    rule = MGG(form="extended", lr=options.unroll_lr) if unrolled else MGG(lr=1e-2)
    module = MGGPretraining(
        MGTTA(copy.deepcopy(network), rule, options.weight),
        lr=1e-2,
        inner_lr=None if unrolled else 1e-4,
        unroll=options.unroll if unrolled else 1,
        reset_network=unrolled,
        schedule="cosine" if unrolled else "constant",
    )
    data = ShiftedImages(
        images_of(options, "train"),
        severity=5,
        table=options.table,
        images=options.unroll_images if unrolled else 128,
        batch_size=options.batch_size if unrolled else 2,
        order="separate" if unrolled else "mixed",
        val_images=400,
        val_batch_size=options.batch_size,
        image_size="keep",
        clean=clean_of(options),
        seed=seed,
    )
    best = ModelCheckpoint(folder, filename=f"{kind}-{seed}", monitor="val/selection")
    start = time.perf_counter()
    Trainer(
        run_dir=False,
        accelerator="cpu",
        devices=1,
        logger=False,
        callbacks=[best],
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=options.unroll_epochs if unrolled else options.greedy_epochs,
    ).fit(module, datamodule=data)
    return best.best_model_path, time.perf_counter() - start


def clean_of(options: argparse.Namespace) -> ImageSource:
    """Return clean images of the training set, at most ``--clean`` of them."""
    source = images_of(options, "train")
    chosen = np.random.default_rng(0).permutation(len(source))[: options.clean]
    return ArraySource(np.stack([source.load(int(index)) for index in chosen]))


# Arms ---------------------------------------------------------------------------------------


def fixed_arms(options: argparse.Namespace, clean: list[Tensor]) -> dict[str, Arm]:
    """Make the arms that need no training."""

    def method(rule: Callable[[float], Any]) -> Make:
        return lambda network, lr: prepared(network, rule(lr), options.weight, clean)

    arms = {
        "Source": Arm(lambda network, lr: Source(copy.deepcopy(network)), (0.0,)),
        "Tent": Arm(lambda network, lr: Tent(copy.deepcopy(network), Adam(lr)), NORMALISED),
        "SGD": Arm(method(SGD), PLAIN),
        "Adam": Arm(method(lambda lr: Adam(lr, BETAS)), NORMALISED),
        "Sign": Arm(method(lambda lr: Sign(lr)), NORMALISED),
        "MGG untrained": Arm(method(lambda lr: MGG(lr=lr)), NORMALISED),
    }
    if options.published is not None:
        arms["MGG published"] = Arm(method(lambda lr: MGG(options.published, lr)), NORMALISED)
    return arms


def learned_arm(options: argparse.Namespace, kind: str, path: str, clean: list[Tensor]) -> Arm:
    """Make the arm of a rule that was trained for this network."""
    grid = NORMALISED
    if kind == "unroll":  # it was trained with its learning rate
        grid = tuple(factor * options.unroll_lr for factor in (0.5, 1.0, 2.0))
    return Arm(lambda network, lr: prepared(network, MGG(path, lr), options.weight, clean), grid)


def prepared(network: nn.Module, rule: Any, weight: float, clean: list[Tensor]) -> MGTTA:
    """Make MGTTA and show it clean images."""
    method = MGTTA(copy.deepcopy(network), rule, weight)
    method.prepare(clean)
    return method


def tune(arm: Arm, network: nn.Module, batches: Batches) -> dict[str, float]:
    """Return the mean accuracy on the tuning corruptions for each learning rate.

    The grid goes on by steps of its last ratio while its largest learning rate is the best.
    """
    found = {f"{lr:g}": accuracy(arm, network, lr, batches) for lr in arm.grid}
    last, largest = arm.grid[-2:] if len(arm.grid) > 1 else (0.0, 0.0)
    while largest and max(found, key=lambda lr: found[lr]) == f"{largest:g}":
        last, largest = largest, largest * largest / last
        found[f"{largest:g}"] = accuracy(arm, network, largest, batches)
    return found


def accuracy(arm: Arm, network: nn.Module, lr: float, batches: Batches) -> float:
    """Return the mean accuracy of an arm; a random rule is the same one at every call."""
    torch.manual_seed(0)
    return mean(run(arm.make(network, lr), batches)[0])


def clean_batches(options: argparse.Namespace) -> list[Tensor]:
    """Return the clean images of the training set as batches."""
    source = clean_of(options)
    pixels = np.stack([source.load(index) for index in range(len(source))])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    return list(images.split(options.batch_size))


# Report ---------------------------------------------------------------------------------------


def table(results: dict[str, Any]) -> str:
    """Write the results as a Markdown table."""
    rows = [
        "| arm | learning rate | tuning | accuracy (mean ± s.d.) | batches to Tent's accuracy |",
        "|---|---|---|---|---|",
    ]
    for name, arm in results["arms"].items():
        means = [mean(each) for each in arm["accuracies"]]
        spread = f" ± {np.std(means, ddof=1):.2f}" if len(means) > 1 else ""
        tuned = arm["tuning"][arm["lr"]]
        rows.append(
            f"| {name} | {arm['lr']} | {tuned:.2f} | {np.mean(means):.2f}{spread} | "
            f"{arm['batches_to_tent']} |"
        )
    return "\n".join(rows)


def batches_to(target: float, curve: list[float]) -> int | None:
    """Return after how many batches the running accuracy is, and stays, at the target."""
    below = [number for number, value in enumerate(curve, start=1) if value < target]
    first = (below[-1] if below else 0) + 1
    return first if first <= len(curve) else None


def main() -> None:
    """Tune, train and run every arm; print and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("networks", nargs="+", help="checkpoints of tta fit, one a repetition")
    parser.add_argument("--train", default="digits", help="'digits', or a folder of class folders")
    parser.add_argument("--test", default="digits", help="the same for the stream")
    parser.add_argument("--severity", type=int, default=3)
    parser.add_argument("--table", choices=("imagenet", "cifar"), default="imagenet")
    parser.add_argument("--limit", type=int, default=1000, help="images a corruption")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--clean", type=int, default=2000, help="clean images of the training set")
    parser.add_argument("--weight", type=float, default=4.0, help="of the statistics gap")
    parser.add_argument("--published", help="the published mgg_ckpt.pth")
    parser.add_argument("--greedy-epochs", type=int, default=20)
    parser.add_argument("--unroll", type=int, default=5)
    parser.add_argument("--unroll-lr", type=float, default=2e-2)
    parser.add_argument("--unroll-images", type=int, default=4000)
    parser.add_argument("--unroll-epochs", type=int, default=20)
    parser.add_argument("--sensitivity", action="store_true", help="also vary the loss weight")
    parser.add_argument("--only", nargs="+", help="arms to run anew, the others stay in the file")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", module="lightning")
    console, results = Console(), measure(options)
    console.print(table(results), soft_wrap=True)
    console.print(f"{options.out}", soft_wrap=True)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run everything; the file is written after each repetition."""
    clean = clean_batches(options)
    results: dict[str, Any] = {"arms": {}, "training_seconds": {}}
    if options.only:  # the others stay as they are in the file
        results = json.loads(options.out.read_text())
        for name in options.only:
            results["arms"].pop(name, None)
    results["options"] = {**vars(options), "out": str(options.out)}
    for seed, path in enumerate(options.networks):
        network = load_model(path)
        with tempfile.TemporaryDirectory() as folder:
            arms = make_arms(options, network, seed, clean, folder, results)
            repeat(options, network, seed, arms, results)
        finish(results)
        write_atomically(options.out, json.dumps(results, indent=1))
    return results


def make_arms(
    options: argparse.Namespace,
    network: nn.Module,
    seed: int,
    clean: list[Tensor],
    folder: str,
    results: dict[str, Any],
) -> dict[str, Arm]:
    """Make the arms that are asked for, and train those that need it."""
    arms = fixed_arms(options, clean)
    for kind in ("greedy", "unroll"):
        name = f"MGG ours, {kind}"
        if not options.only or name in options.only:
            checkpoint, seconds = train(options, network, kind, seed, folder)
            arms[name] = learned_arm(options, kind, checkpoint, clean)
            results["training_seconds"].setdefault(kind, []).append(seconds)
    return {name: arm for name, arm in arms.items() if not options.only or name in options.only}


def repeat(
    options: argparse.Namespace,
    network: nn.Module,
    seed: int,
    arms: dict[str, Arm],
    results: dict[str, Any],
) -> None:
    """Run all arms on one network; tune them first if it is the first."""
    tuning = stream(options, "extra", seed) if seed == 0 else {}
    batches = stream(options, "common", seed)
    for name, arm in arms.items():
        if seed == 0:
            found = tune(arm, network, tuning)
            best = max(found, key=lambda lr: found[lr])
            results["arms"][name] = {"lr": best, "tuning": found, "accuracies": [], "curves": []}
        record = results["arms"][name]
        torch.manual_seed(seed)  # of the untrained rule
        accuracies, curve = run(arm.make(network, float(record["lr"])), batches)
        record["accuracies"].append(accuracies)
        record["curves"].append(curve)
        print(
            f"{options.networks[seed]} {name} lr {record['lr']}: {mean(accuracies):.2f}", flush=True
        )
    if seed == 0 and options.sensitivity:
        found = sensitivity(options, network, arms, results, tuning)
        results["weights"] = {**results.get("weights", {}), **found}


def finish(results: dict[str, Any]) -> None:
    """Compare every arm's curve with Tent's final accuracy."""
    curves = {
        name: np.mean(arm["curves"], axis=0).tolist() for name, arm in results["arms"].items()
    }
    for name, curve in curves.items():
        results["arms"][name]["batches_to_tent"] = batches_to(curves["Tent"][-1], curve)


def sensitivity(
    options: argparse.Namespace,
    network: nn.Module,
    arms: dict[str, Arm],
    results: dict[str, Any],
    tuning: Batches,
) -> dict[str, dict[str, float]]:
    """Measure the tuning corruptions with other weights of the statistics gap."""
    found: dict[str, dict[str, float]] = {}
    for name, arm in arms.items():
        if name in ("Source", "Tent"):
            continue
        for factor in FACTORS:
            torch.manual_seed(0)  # of the untrained rule
            method = arm.make(network, float(results["arms"][name]["lr"]))
            assert isinstance(method, MGTTA)
            method.statistics_weight = factor * options.weight
            found.setdefault(name, {})[f"{factor:g}"] = mean(run(method, tuning)[0])
    return found


if __name__ == "__main__":
    main()
