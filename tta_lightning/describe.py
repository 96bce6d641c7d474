"""What an object was made with, as plain values for a manifest."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


def plain(value: Any) -> Any:
    """Turn a value into what JSON can hold; an object becomes its class and its arguments."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    return {"class": type(value).__name__, **constructor_arguments(value)}


def constructor_arguments(obj: object, skip: tuple[str, ...] = ()) -> dict[str, Any]:
    """Read an object's constructor arguments back from its attributes.

    The package keeps each constructor argument under its own name; arguments that an object does
    not keep are left out.

    Args:
        obj: Any object whose class follows that habit.
        skip: Argument names to leave out.

    Returns:
        Argument name to plain value.
    """
    parameters = inspect.signature(type(obj).__init__).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return {
        name: plain(getattr(obj, name))
        for name in names
        if name != "self" and name not in skip and hasattr(obj, name)
    }
