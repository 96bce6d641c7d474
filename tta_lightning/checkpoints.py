"""Checkpoints of a running adaptation: written whole, verified when read, free of code."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import re
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tta_lightning.errors import InputError, nearest_path
from tta_lightning.runs import LOCK, write_atomically

FOLDER = "checkpoints"
LAST = "last"
RUNS = "runs"
_SUFFIX = ".state"
_MARK = b"tta_lightning adaptation 1 sha256:"
_DIGEST = 64  # hexadecimal digits
_PLAIN = (bool, int, float, str, bytes, type(None))
_NAME = re.compile(r"batch-(\d+)" + re.escape(_SUFFIX))
_ABSENT = "nothing"
# What may differ between two processes of a run: where images lie (a digest says which they are),
# and what happens at one that cannot be read.
_FREE = ("root", "on_bad_image")
_PARTS = ("loop", "adapter", "callbacks", "random", "run")


class DamagedCheckpointError(InputError):
    """A checkpoint is not what was written; the message names the file and the reason."""


class Resumable(NamedTuple):
    """A run that can go on.

    Attributes:
        folder: Its run folder.
        files: Its checkpoints, those to try first in front; none where the run was interrupted
            before the first one, and so before the first batch.
    """

    folder: Path
    files: tuple[Path, ...]


def path_of(folder: Path, batches: int) -> Path:
    """Name the checkpoint of a run after a number of batches."""
    return folder / FOLDER / f"batch-{batches:08d}{_SUFFIX}"


def half_written(folder: Path) -> list[Path]:
    """List what a process that was killed while it wrote a checkpoint has left."""
    return list(Path(folder, FOLDER).glob(f".*{_SUFFIX}.*"))


def stored(folder: Path) -> list[Path]:
    """List the checkpoints of a run folder, the newest first."""
    found = [path for path in Path(folder, FOLDER).glob("*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=_batches, reverse=True)


def write(path: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint so that it is there as a whole or not at all.

    The file starts with a line that has the SHA-256 of what follows; that is a ``torch.save`` of
    tensors and plain values.

    Args:
        path: The file; a file of this name is replaced.
        state: Tensors and plain values in nested dicts, lists and tuples.

    Raises:
        InputError: The state holds something else.
        OSError: It cannot be written; files that were there stay as they were.
    """
    _check_plain(state, "")
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    payload = buffer.getvalue()
    head = _MARK + hashlib.sha256(payload).hexdigest().encode() + b"\n"
    write_atomically(path, head + payload)


def read(path: Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU, without running code from it.

    Args:
        path: What :func:`write` wrote.

    Returns:
        The state.

    Raises:
        DamagedCheckpointError: The file is cut off or altered.
        InputError: The file is missing, of another kind, or carries code.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"The checkpoint {path} cannot be read: {error.strerror}. Give a run folder, or a file "
            f"in its folder {FOLDER!r}."
        ) from error
    head, payload = content[: len(_MARK) + _DIGEST + 1], content[len(_MARK) + _DIGEST + 1 :]
    if not head.startswith(_MARK[: len(head)]):
        raise InputError(
            f"{path} is no checkpoint of a running adaptation, so nothing was read from it. Give a "
            "run folder that `tta adapt` wrote, or a file in its folder 'checkpoints'."
        )
    if head != _MARK + hashlib.sha256(payload).hexdigest().encode() + b"\n":
        raise DamagedCheckpointError(
            f"The checkpoint {path} is damaged: its content does not have the checksum that it "
            "was written with."
        )
    try:
        state: dict[str, Any] = torch.load(
            io.BytesIO(payload), map_location="cpu", weights_only=True
        )
    except Exception as error:  # the checksum is right, so somebody wrote it like this
        raise InputError(
            f"The checkpoint {path} holds more than tensors and plain values, and code from a file "
            f"is never run ({type(error).__name__}). Resume from a checkpoint that `tta adapt` "
            "wrote."
        ) from error
    return state


def read_newest(files: Sequence[Path]) -> tuple[Path, dict[str, Any]]:
    """Read the first file that is whole, and warn of those before it that are not.

    Args:
        files: Checkpoints, the newest first.

    Returns:
        The file and its state.

    Raises:
        InputError: None can be used.
    """
    problems = []
    for path in files:
        try:
            state = read(path)
        except DamagedCheckpointError as error:
            problems.append(str(error))
            continue
        if not isinstance(state, dict) or not all(isinstance(state.get(p), dict) for p in _PARTS):
            raise InputError(
                f"The checkpoint {path} does not hold what this version of tta_lightning writes. "
                "Resume with the version that the run was begun with."
            )
        for problem in problems:
            warnings.warn(f"{problem} The one before it is used: {path}.", stacklevel=3)
        return path, state
    raise InputError(f"{' '.join(problems)} There is none before it: start the run anew.")


def find(resume_from: str | Path) -> Resumable:
    """Find the run to resume.

    Args:
        resume_from: A run folder, one of its checkpoints, or ``"last"`` for the newest run under
            ``runs/`` that has checkpoints.

    Returns:
        The run. Of a file, it and those before it.

    Raises:
        InputError: There is none.
    """
    if str(resume_from) == LAST:
        return _newest_run()
    if not str(resume_from):
        raise InputError(f"resume_from is empty. Give a run folder, a checkpoint, or {LAST!r}.")
    path = Path(resume_from)
    if os.path.isdir(path):  # noqa: PTH112  (Path.is_dir raises where a name is too long)
        path = path.parent if path.name == FOLDER and not stored(path) else path
        files = stored(path)
        if files or _just_begun(path):
            return Resumable(path, tuple(files))
        inside = sorted(each.parent for each in path.glob(f"*/{FOLDER}") if stored(each.parent))
        hint = f" There is one in {inside[-1]}." if inside else ""
        raise InputError(
            f"The folder {path} has no checkpoint of an adaptation to resume from.{hint} A run "
            "writes them with the callback AdaptationCheckpoint."
        )
    if not os.path.isfile(path):  # noqa: PTH113
        raise InputError(
            f"There is no run folder or checkpoint {str(path)!r} to resume from."
            f"{nearest_path(path)} Give the folder "
            f"of a run, a file in its folder {FOLDER!r}, or {LAST!r}."
        )
    folder = path.absolute().parent.parent
    if path.absolute().parent.name != FOLDER or path.absolute() not in stored(folder):
        raise InputError(
            f"{path} does not lie in a run folder, where the predictions are that it goes on "
            f"from. Give the run folder, or a file batch-....state in its folder {FOLDER!r}."
        )
    older = [each for each in stored(folder) if _batches(each) <= _batches(path)]
    return Resumable(folder, tuple(older))


def check_same(before: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    """Refuse to go on as another run than the one that was begun.

    Args:
        before: What the checkpoint says of its run, nested plain values.
        now: What is to go on.
        path: The checkpoint, for the message.

    Raises:
        InputError: They differ; names each difference.
    """
    first, second = dict(_leaves(before)), dict(_leaves(now))
    names = [*first, *(name for name in second if name not in first)]
    pairs = {name: (first.get(name, _ABSENT), second.get(name, _ABSENT)) for name in names}
    differing = [name for name, (then, current) in pairs.items() if then != current]
    if not differing:
        return
    shown = "; ".join(
        "{}: {} then, {} now".format(name, *map(_shown, pairs[name])) for name in differing[:6]
    )
    more = f"; and {len(differing) - 6} more" if len(differing) > 6 else ""
    raise InputError(
        f"{path} belongs to another run ({shown}{more}). Resume with the options that the run was "
        "begun with: its config.yaml has them (-c RUN/config.yaml --resume_from RUN)."
    )


def random_state() -> dict[str, Any]:
    """Return the state of the generators of torch (CPU, CUDA), NumPy and Python."""
    name, keys, *others = np.random.get_state(legacy=True)  # noqa: NPY002
    version, words, gauss = random.getstate()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {
        "torch": torch.get_rng_state(),
        "cuda": cuda,
        "numpy": [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *others],
        "python": [version, torch.tensor(words), gauss],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Take what :func:`random_state` returned; that of CUDA only where there are as many GPUs."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    name, keys, *others = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *others))  # noqa: NPY002
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))


def _batches(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def _newest_run() -> Resumable:
    found = {folder.parent: stored(folder.parent) for folder in Path(RUNS).glob(f"**/{FOLDER}")}
    runs = {f: files for f, files in found.items() if files and not is_complete(f)}
    if not runs:
        raise InputError(
            f"There is no run under {RUNS}/ that has checkpoints and is not complete. Give the "
            "folder of a run."
        )
    newest = max(runs, key=lambda folder: max(file.stat().st_mtime for file in runs[folder]))
    return Resumable(newest, tuple(runs[newest]))


def _just_begun(folder: Path) -> bool:
    """Whether this is the folder of an adaptation in which nothing has been predicted yet."""
    tables = list(folder.glob("*.csv"))
    found = {path.name for path in folder.iterdir()}
    usual = {LOCK, FOLDER, "config.yaml", "manifest.json", *(path.name for path in tables)}
    if tables or "manifest.json" in found:  # a training has neither
        usual.add("logs")
    return (
        LOCK in found
        and found <= usual
        and all(path.read_bytes().count(b"\n") <= 1 for path in tables)
        and not list(folder.glob(f"{FOLDER}/[!.]*"))
    )


def is_complete(folder: Path) -> bool:
    """Whether a run has written all its results."""
    try:
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # a run that was killed has none
        return False
    return bool(metrics.get("completed"))


def _check_plain(value: Any, where: str) -> None:
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            _check_plain(key, where)
            _check_plain(item, f"{where}.{key}".removeprefix("."))
    elif type(value) in (list, tuple):
        for item in value:
            _check_plain(item, where)
    elif type(value) not in (Tensor, nn.Parameter, *_PLAIN):
        raise InputError(
            f"{where} of a checkpoint is a {type(value).__name__}. Expected tensors and plain "
            "Python values: turn it into those in state_dict()."
        )


def _leaves(values: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{where}{key}.")
        elif key not in _FREE:
            yield f"{where}{key}", value


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:28]} ... {text[-28:]}"
