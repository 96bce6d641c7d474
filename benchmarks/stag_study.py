"""Which reading of STAG helps whom: spaces, anchors and weights, over hosts and regimes.

``tune`` looks at the four tuning corruptions with the first network; ``confirm`` runs one reading
on the 15 corruptions, each network given being one repetition with its own order and noise. In both
every figure stands beside that of the host alone on the same images in the same order.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from tta_lightning.adapter import Adapter
from tta_lightning.contract import Outputs
from tta_lightning.data import Digits, ImageFolder, ImageSource, Stream
from tta_lightning.data.classes import class_indices
from tta_lightning.methods import EATA, SAR, DeYO, Source, Tent
from tta_lightning.methods.stag import (
    Kind,
    Scope,
    Space,
    StagOptions,
    StagTerm,
    Unit,
    counted_samples,
    entropy_logit_gradient,
)
from tta_lightning.models import find_head, load_model
from tta_lightning.models.classifier import describe
from tta_lightning.models.heads import Head, capture_features
from tta_lightning.rules import SGD, Adam, UpdateRule
from tta_lightning.runs import write_atomically

READINGS = (
    ("row", "self"),
    ("row", "input"),
    ("row", "total"),
    ("row", "sum"),
    ("feature", "self"),
    ("feature", "input"),
    ("feature", "total"),
    ("full", "full"),
)
SINGLE = 4.0  # what the learning rate is divided by at batch size 1
REGIMES = {  # scenario, batch size (None: --batch-size)
    "iid": ("reset_each_shift", None),
    "label shift": ("label_shift", None),
    "batch size 1": ("reset_each_shift", 1),
    "mixed": ("mixed_domains", None),
}
Make = Callable[[nn.Module, UpdateRule], Adapter]
HOSTS: dict[str, Make] = {
    "Tent": Tent,
    "ETA": lambda network, rule: EATA(
        network, rule, d_margin=0.05 if classes_of(network) > 100 else 0.4, fisher_alpha=0.0
    ),
    "SAR": SAR,
    "DeYO": DeYO,
}


class Batch(NamedTuple):
    """Images, and what only the measurement sees."""

    images: Tensor
    labels: Tensor
    domains: Tensor
    resets: bool


class Reading(NamedTuple):
    """A reading of the abstract, its weight and what it is measured in."""

    space: Space
    anchors: Kind
    weight: float
    unit: Unit

    def __str__(self) -> str:
        return f"{self.space}/{self.anchors} {self.unit} {self.weight:g}"


class WarmUp(StagTerm):
    """The weight grows over the first 20 calls."""

    calls = 0

    def __call__(self, out: Outputs, head: Head) -> Tensor:
        """Scale the loss by the part of the warm-up that is over."""
        self.calls += 1
        return min(1.0, self.calls / 20) * super().__call__(out, head)


class ClassMean(StagTerm):
    """Aligns the gradient of the batch by each row of the classifier, not that of each sample."""

    def __call__(self, out: Outputs, head: Head) -> Tensor:
        """Average ``1 - cos`` over the classes predicted; for ``row`` and the unit ``cosine``."""
        assert out.features is not None
        counted = counted_samples(out.features, out.logits, out.selected)
        h, z = out.features[counted], out.logits[counted]
        y = z.detach().argmax(dim=1)
        own = entropy_logit_gradient(z.detach()).gather(1, y[:, None])
        sums = torch.zeros_like(self.anchors).index_add(0, y, own * h)
        seen = y.unique()
        cosines = torch.nn.functional.cosine_similarity(sums[seen], self.anchors[seen], eps=1e-20)
        return self.options.weight * (1 - cosines).mean()


VARIANTS: dict[str, type[StagTerm]] = {
    "plain": StagTerm,
    "all": StagTerm,
    "warm-up": WarmUp,
    "class-mean": ClassMean,
}


def classes_of(network: nn.Module) -> int:
    """Return the number of logits."""
    return len(find_head(network).weight)


def images_of(where: str) -> ImageSource:
    """Return the digits, or a folder of class folders."""
    return Digits("test") if where == "digits" else ImageFolder(where)


def stream(
    options: argparse.Namespace,
    scenario: str,
    batch_size: int | None,
    corruptions: str | list[str],
    seed: int,
) -> tuple[list[Batch], list[str]]:
    """Make all batches of a stream in memory; return them and the names of the domains."""
    data = Stream(
        images_of(options.test),
        scenario=scenario,
        corruptions=corruptions,
        severity=options.severity,
        table=options.table,
        batch_size=batch_size or options.batch_size,
        limit=options.single if batch_size == 1 else options.limit,
        image_size=options.image_size or "keep",
        seed=seed,
    )
    starts = {segment.start for segment in data.plan.segments if segment.reset}
    batches = []
    for batch in data.test_dataloader():
        domains = torch.from_numpy(data.plan.domain_ids)[batch.positions]
        resets = int(batch.positions[0]) in starts
        batches.append(Batch(batch.images, batch.labels, domains, resets))
    return batches, [domain.corruption for domain in data.plan.domains]


def run(adapter: Adapter, batches: list[Batch]) -> list[float]:
    """Adapt to a stream; return the accuracy of each domain in %."""
    adapter.reset()
    right, domains = [], []
    for batch in batches:
        if batch.resets:
            adapter.reset()
        logits = adapter.adapt_step(batch.images)
        right.append(logits.argmax(dim=1) == batch.labels)
        domains.append(batch.domains)
    hits, ids = torch.cat(right).double(), torch.cat(domains)
    return [100 * float(hits[ids == number].mean()) for number in range(int(ids.max()) + 1)]


def make(
    options: argparse.Namespace, network: nn.Module, host: str, regime: str, reading: Reading | None
) -> Adapter:
    """Make a host on its own copy of the network, with or without STAG."""
    lr = options.lr
    if REGIMES[regime][1] == 1:
        # The published (lr / 64) * batch * 2 is for 50,000 single images; these streams are short.
        lr /= SINGLE
    rule: UpdateRule = Adam(lr) if options.rule == "adam" else SGD(lr, momentum=0.9)
    adapter = HOSTS[host](copy.deepcopy(network), rule)
    adapter.restrict_classes(known_classes(options, network))
    adapter.ready()
    if reading is not None:
        space, anchors, weight, unit = reading
        scope: Scope = "all" if options.variant == "all" else "host"
        chosen = StagOptions(weight, space, anchors, scope, unit)
        kind = VARIANTS[options.variant]
        adapter.terms.append(kind(adapter.head, chosen, adapter.classes))
    return adapter


def known_classes(options: argparse.Namespace, network: nn.Module) -> list[int] | None:
    """Return the positions of the stream's classes among the network's outputs; None for all."""
    names, known = images_of(options.test).classes, describe(network).class_names
    if names is None or known is None or tuple(names) == tuple(known):
        return None
    return class_indices(names, known)


def source_accuracy(
    options: argparse.Namespace, network: nn.Module, batches: list[Batch]
) -> list[float]:
    """Return the accuracy of the network as it is."""
    adapter = Source(copy.deepcopy(network))
    adapter.restrict_classes(known_classes(options, network))
    return run(adapter, batches)


def logit_unit(network: nn.Module, batch: Batch) -> float:
    """Return what the unit `logit` multiplies the loss by, averaged over a batch."""
    head = find_head(network)
    with torch.no_grad(), capture_features(head) as captured:
        rows = head.weight[network(batch.images).argmax(dim=1)]
    return float((captured.features.norm(dim=1) * rows.norm(dim=1)).mean())


def readings(options: argparse.Namespace) -> Iterator[Reading]:
    """Yield the grid that was asked for."""
    for text in options.readings or [f"{space}/{anchors}" for space, anchors in READINGS]:
        space, anchors = text.split("/")
        for unit in options.units:
            for weight in options.weights:
                yield Reading(space, anchors, weight, unit)


SETTINGS = (
    "test",
    "severity",
    "table",
    "limit",
    "single",
    "batch_size",
    "rule",
    "lr",
    "image_size",
)


def opened(options: argparse.Namespace) -> dict[str, Any]:
    """Read the file that runs are added to, if it is of the same phase, networks and settings."""
    settings = {name: getattr(options, name) for name in ("phase", "networks", *SETTINGS)}
    if options.phase == "confirm" and len(list(readings(options))) != 1:
        raise SystemExit("confirm looks at one reading: give one of --readings, --weights, --units")
    if not options.out.exists():
        return {"settings": settings, "runs": []}
    results: dict[str, Any] = json.loads(options.out.read_text())
    if results["settings"] != settings:
        raise SystemExit(f"{options.out} holds runs with other settings: {results['settings']}")
    return results


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run everything; the file is written after each host and regime."""
    results = opened(options)
    corruptions = "extra" if options.phase == "tune" else "common"
    networks = options.networks[:1] if options.phase == "tune" else options.networks
    for seed, path in enumerate(networks):
        network = load_model(json.loads(path) if path.startswith("{") else path)
        for regime in options.regimes:
            batches, domains = stream(options, *REGIMES[regime], corruptions, seed)
            source = source_accuracy(options, network, batches)
            print(f"{path} {regime}: ||h|| ||w_y|| = {logit_unit(network, batches[0]):.1f}")
            for host in options.hosts:
                start = time.perf_counter()
                alone = run(make(options, network, host, regime, None), batches)
                for reading in readings(options):
                    with_stag = run(make(options, network, host, regime, reading), batches)
                    results["runs"].append(
                        {
                            "network": path,
                            "seed": seed,
                            "regime": regime,
                            "host": host,
                            "reading": reading._asdict(),
                            "variant": options.variant,
                            "domains": domains,
                            "source": source,
                            "alone": alone,
                            "stag": with_stag,
                        }
                    )
                seconds = time.perf_counter() - start
                print(f"{path} {regime} {host}: {seconds:.0f} s", flush=True)
                write_atomically(options.out, json.dumps(results))
    return results


# Report ------------------------------------------------------------------------------------------


def grid_table(runs: list[dict[str, Any]]) -> str:
    """Write mean gains over the host in points: a row a reading, a column a regime and host."""
    gains: dict[str, dict[str, list[float]]] = {}
    base: dict[str, list[tuple[float, float]]] = {}
    for each in runs:
        column, reading = f"{each['regime']}: {each['host']}", str(Reading(**each["reading"]))
        source, alone, stag = (float(np.mean(each[key])) for key in ("source", "alone", "stag"))
        gains.setdefault(reading, {}).setdefault(column, []).append(stag - alone)
        base.setdefault(column, []).append((source, alone))
    rows = ["| | " + " | ".join(base) + " | mean |", "|---" * (len(base) + 2) + "|"]
    for place, name in enumerate(("source", "host")):
        cells = [f"{np.mean([pair[place] for pair in pairs]):.1f}" for pairs in base.values()]
        rows.append(f"| {name} | {' | '.join(cells)} | |")
    for reading, found in gains.items():
        means = [float(np.mean(found.get(column, [np.nan]))) for column in base]
        cells = [f"{mean:+.2f}" for mean in means]
        rows.append(f"| {reading} | {' | '.join(cells)} | {np.nanmean(means):+.2f} |")
    return "\n".join(rows)


def confirmation_table(runs: list[dict[str, Any]]) -> str:
    """Write a row a regime and host: gain with its spread over repetitions, and what it is made of.

    All runs are of one reading and one list of networks; see :func:`opened`.

    A corruption counts as improved if its mean over repetitions is higher, and one repetition of a
    corruption as collapsed if fewer than half as many images are right as of the source model.
    """
    rows = [
        "| regime | host | source | host alone | gain ± s.d. | corruptions improved | collapsed: "
        "alone | with STAG |",
        "|---|---|---|---|---|---|---|---|",
    ]
    cells: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for each in runs:
        cells.setdefault((each["regime"], each["host"]), []).append(each)
    for (regime, host), found in cells.items():
        source, alone, stag = (
            np.array([each[key] for each in found]) for key in ("source", "alone", "stag")
        )
        gains = (stag - alone).mean(axis=1)
        spread = f" ± {gains.std(ddof=1):.2f}" if len(gains) > 1 else ""
        improved = int(((stag - alone).mean(axis=0) > 0).sum())
        lost = [f"{100 * (arm < source / 2).mean():.0f} %" for arm in (alone, stag)]
        rows.append(
            f"| {regime} | {host} | {source.mean():.1f} | {alone.mean():.1f} | {gains.mean():+.2f}"
            f"{spread} | {improved} of {alone.shape[1]} | {lost[0]} | {lost[1]} |"
        )
    return "\n".join(rows)


def main() -> None:
    """Run the grid, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("networks", nargs="+", help="as in `tta`, or a JSON object")
    parser.add_argument("--phase", choices=("tune", "confirm"), default="tune")
    parser.add_argument("--test", default="digits", help="'digits', or a folder of class folders")
    parser.add_argument("--severity", type=int, default=3)
    parser.add_argument("--table", choices=("imagenet", "cifar"), default="imagenet")
    parser.add_argument("--image-size", type=int, help="side in px; as it is by default")
    parser.add_argument("--limit", type=int, default=1000, help="images a corruption")
    parser.add_argument("--single", type=int, default=200, help="the same at batch size 1")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--rule", choices=("adam", "sgd"), default="adam")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--hosts", nargs="+", choices=list(HOSTS), default=list(HOSTS))
    parser.add_argument("--regimes", nargs="+", choices=list(REGIMES), default=list(REGIMES))
    parser.add_argument("--readings", nargs="+", help="such as row/self; all by default")
    parser.add_argument("--weights", nargs="+", type=float, default=[0.1, 1.0, 10.0, 100.0])
    parser.add_argument("--units", nargs="+", default=["cosine"], help="logit, cosine")
    parser.add_argument("--variant", choices=list(VARIANTS), default="plain")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    parser.add_argument("--out", type=Path, required=True, help="JSON file; runs are added to it")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    runs = measure(options)["runs"]
    table = grid_table if options.phase == "tune" else confirmation_table
    Console().print(table(runs), soft_wrap=True)


if __name__ == "__main__":
    main()
