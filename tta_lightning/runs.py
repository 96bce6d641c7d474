"""Run folders: one run, one folder, never overwritten."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from lightning.pytorch import Trainer

from tta_lightning.errors import InputError

LOCK = ".lock"


def run_folder(trainer: Trainer) -> Path | None:
    """Return the folder that a trainer's current run writes to; None if it writes nothing."""
    folder = getattr(trainer, "run_folder", None)
    return None if folder is None else Path(folder)


def unused_folder(parent: str | Path = "runs") -> Path:
    """Name a folder that does not exist yet, after the time of day."""
    stem = Path(parent, datetime.now().strftime("%Y-%m-%d_%H-%M-%S"))
    folder, number = stem, 1
    while folder.exists():
        number += 1
        folder = stem.with_name(f"{stem.name}-{number}")
    return folder


@contextmanager
def reserved(folder: Path, has_results: Callable[[], bool]) -> Iterator[None]:
    """Make a run folder, and take it away again if the run fails before it has anything to keep.

    Args:
        folder: The folder to make.
        has_results: Asked when the run fails; once it says yes, the folder is never removed.

    Raises:
        InputError: The folder exists, or cannot be made.
    """
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise InputError(
            f"The run folder {folder} exists already and is never overwritten. Choose another "
            "run_dir, or move the old one away."
        ) from None
    except OSError as error:
        raise InputError(
            f"The run folder {folder} cannot be made: {error.strerror}. Choose another run_dir."
        ) from error
    with locked(folder):
        try:
            yield
        except BaseException:
            if not has_results():
                shutil.rmtree(folder, ignore_errors=True)
            raise


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a run folder to this process while the block runs; a process that dies lets it go.

    Raises:
        InputError: Another process has it, or it cannot be written to.
    """
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(
            f"The run folder {folder} is in use: another process writes to it. Wait until that has "
            "ended, or stop it."
        ) from None
    except OSError as error:
        raise InputError(
            f"The run folder {folder} cannot be written to: {error.strerror}. Change its "
            "permissions, or choose another run_dir."
        ) from error
    try:
        yield
    finally:
        lock.release()


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader finds the old or the new one, never a part.

    Args:
        path: The file.
        content: Text (written as UTF-8) or bytes.
    """
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)  # mkstemp makes files that only their owner can read
        Path(name).replace(path)
        _sync(path.parent)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _sync(folder: Path) -> None:
    """Let the new name of a file survive a crash of the machine, where the system can."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, values: Any) -> None:
    """Write plain values as indented JSON, atomically."""
    write_atomically(path, json.dumps(values, indent=2, allow_nan=False) + "\n")
