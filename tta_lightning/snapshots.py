"""Copies of all that adaptation changes: to go back to, to save, to hand to another process."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tta_lightning.adapter import Adapter
from tta_lightning.contract import check_method
from tta_lightning.errors import InputError

Snapshot = dict[str, Any]
"""Part of an adapter's ``state_dict``: tensors by name, and nested plain values with tensors."""

_EXTRA = "_extra_state"  # torch's name for what get_extra_state returns
_FIXED = ("network.", "rule.")  # whose tensors stay as they were built, unless they move


def capture(adapter: Adapter) -> Snapshot:
    """Copy what adaptation changes, and what the method learnt from clean images.

    It has no copy of the weights that stay as they are, so it is as large as what moves: a few
    hundred kilobytes for the normalisation layers of a ResNet-50.

    Args:
        adapter: The method, between two steps.

    Returns:
        Tensors on the adapter's device, shared with nothing.
    """
    adapter.ready()
    moving = adapter.moving_tensors()
    return {
        name: _copied(value)
        for name, value in adapter.state_dict().items()
        if name in moving or not name.startswith(_FIXED)
    }


def restore(adapter: Adapter, snapshot: Snapshot) -> None:
    """Bring an adapter to where a snapshot was taken, bit for bit.

    Args:
        adapter: The method that the snapshot was taken of, or an equal one on the same network.
        snapshot: What :func:`capture` returned; it is copied, and can be used again.

    Raises:
        InputError: The snapshot is of another method or network; nothing was changed.
    """
    adapter.ready()
    own = {name: value for name, value in adapter.state_dict().items() if name != _EXTRA}
    moving = adapter.moving_tensors()
    expected = {name for name in own if name in moving or not name.startswith(_FIXED)}
    given = snapshot.keys() - {_EXTRA}
    problems = [f"missing {name}" for name in sorted(expected - given)]
    problems += [f"unexpected {name}" for name in sorted(given - expected)]
    problems += [
        f"shape of {name} is {list(snapshot[name].shape)}, not {list(moving[name].shape)}"
        for name in sorted(given & moving.keys())
        if snapshot[name].shape != moving[name].shape
    ]
    if problems or _EXTRA not in snapshot:
        listed = "; ".join(problems[:3]) + ("; ..." if len(problems) > 3 else "")
        raise InputError(
            f"This snapshot does not belong to {type(adapter).__name__} on this network "
            f"({listed or 'it has no state of a method'}). Restore it into the method and the "
            "network that it was taken of."
        )
    check_method(snapshot[_EXTRA], type(adapter).__name__)
    adapter.load_state_dict(_copied(snapshot), strict=False)


def size_in_bytes(snapshot: Any) -> int:
    """Return how much memory the tensors of a snapshot take, in bytes."""
    if isinstance(snapshot, Tensor):
        return snapshot.nbytes
    return sum(map(size_in_bytes, _items(snapshot)))


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(item) for item in value)
    return value


def _items(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return list(value) if isinstance(value, list | tuple) else []
