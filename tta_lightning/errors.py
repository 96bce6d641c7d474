"""Errors that a user can cause: one sentence each, never a bare traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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
