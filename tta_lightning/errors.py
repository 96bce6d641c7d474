"""Errors that a user can cause: one sentence each, never a bare traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class InputError(RuntimeError):
    """Something the user gave is wrong.

    The message says what was wrong, what was expected and what to do. The command line prints it
    without a traceback and exits with a code other than 0.
    """


def unknown_name(kind: str, name: object, known: Iterable[str]) -> InputError:
    """Build the error for a name that is not among the known ones, suggesting the nearest.

    Args:
        kind: What the name stands for, e.g. ``"corruption"``.
        name: What was given.
        known: The names that exist.

    Returns:
        The error, to be raised by the caller.
    """
    names = sorted(known)
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return InputError(f"Unknown {kind} {name!r}.{hint} Known: {', '.join(names)}.")


def nearest_path(path: str | Path) -> str:
    """Suggest the file or folder that a path may have meant.

    Args:
        path: A path that does not exist.

    Returns:
        `` Did you mean 'runs/tent'?``, of those that lie where it should; empty where none is near.
    """
    given = Path(path)
    try:
        names = [entry.name for entry in given.parent.iterdir()]
    except (OSError, ValueError):  # no such folder, a name that is too long, a zero byte
        return ""
    close = difflib.get_close_matches(given.name, names, n=1, cutoff=0.6)
    return f" Did you mean {str(given.with_name(close[0]))!r}?" if close else ""
