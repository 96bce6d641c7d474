"""Which runs are repetitions of one another, and what a group of them is called."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Any

from tta_lightning.report.protocol import differences, stream_fields
from tta_lightning.report.run import Run, labels

# What differs between repetitions: seeds, and what follows from them.
_OF_SEEDS = {"seed", "plan_sha256", "subset_sha256", "domains", "resets"}
_CALLBACKS = {"STAG", "CollapseGuard"}  # those that change what a run does


def group(runs: Sequence[Run]) -> list[str]:
    """Name runs, such that repetitions share a name.

    Repetitions differ in nothing but their seeds: they have the same weights, method,
    hyper-parameters and stream. A group has the name that the names of its folders have in common
    (``tent`` for ``tent_0`` and ``tent_1``, and for ``0/tent`` and ``1/tent``), a run by itself
    that of its folder.

    Args:
        runs: Runs in different folders.

    Returns:
        A name a run.
    """
    own = labels(runs)
    keys = [_key(run) for run in runs]
    members: dict[str, list[str]] = {}
    for key, label in zip(keys, own, strict=True):
        members.setdefault(key, []).append(label)
    common = {key: _common(names) for key, names in members.items()}
    taken = list(common.values())
    for key, names in members.items():
        if not common[key] or taken.count(common[key]) > 1:
            common[key] = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
    return [common[key] for key in keys]


def unlike(runs: Sequence[Run], names: Sequence[str]) -> list[str]:
    """Find where the protocols of runs differ by more than the seeds of repetitions.

    Args:
        runs: Runs.
        names: A name a run; runs that share one are repetitions.

    Returns:
        Names of the fields, the most telling first. Runs of one seed are compared, if each name has
        the same seeds; else all are, and the seed is among the fields.
    """
    of_seed: dict[Any, dict[str, Run]] = {}
    for run, name in zip(runs, names, strict=True):
        seed = (run.settings["stream"] or {}).get("seed")
        of_seed.setdefault(seed, {})[name] = run
    alike = all(members.keys() == set(names) for members in of_seed.values())
    if not alike or sum(map(len, of_seed.values())) < len(runs):
        return list(differences(runs))
    found = [field for members in of_seed.values() for field in differences([*members.values()])]
    return list(dict.fromkeys(found))


def _key(run: Run) -> str:
    """Write out what repetitions have in common."""
    stream: dict[str, Any] = run.settings["stream"] or {}
    callbacks = run.settings.get("callbacks", {})
    known = {
        "method": run.settings["method"],
        "model": run.model,
        "stream": {
            name: value
            for name, value in stream_fields(stream)
            if name.removeprefix("stream.") not in _OF_SEEDS
        },
        "callbacks": {k: v for k, v in callbacks.items() if k in _CALLBACKS},
        "precision": run.settings["precision"],
    }
    if "seed" not in stream:  # of a plain dataloader nobody knows what differs
        known["folder"] = str(run.folder)
    return json.dumps(known, sort_keys=True)


def _common(names: Sequence[str]) -> str:
    """Return what names begin with alike, else what they end with, without separators."""
    if len(names) == 1:
        return names[0]
    own = {name.rpartition("/")[2] for name in names}
    if len(own) == 1:  # a folder a seed, with runs of the same names
        return own.pop()
    begin = beginning(names).rstrip("0123456789").strip("-_/. ")
    end = beginning([name[::-1] for name in names])[::-1].strip("-_/. ")
    return begin if len(begin) >= len(end) else end


def beginning(names: Sequence[str]) -> str:
    """Return the letters that all texts begin with."""
    columns = zip(*names, strict=False)  # as long as the shortest
    return "".join(c[0] for c in itertools.takewhile(lambda c: len(set(c)) == 1, columns))
