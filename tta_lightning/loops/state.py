"""What a run that goes on in another process has to know."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback

from tta_lightning.checkpoints import random_state, set_random_state
from tta_lightning.errors import InputError
from tta_lightning.loops.window import SlidingWindow
from tta_lightning.snapshots import capture, restore

if TYPE_CHECKING:
    from tta_lightning.loops.adaptation import AdaptationLoop

_COUNTERS = ("served", "drawn", "nonfinite_batches", "recoveries", "images_without_step")


def state_of(loop: AdaptationLoop) -> dict[str, Any]:
    """Collect all that the rest of a run depends on; call it between two batches.

    Args:
        loop: The loop that runs.

    Returns:
        Tensors and plain values: of the loop, the adapter, the callbacks with a ``state_dict`` and
        the random number generators.
    """
    plan, segment, window = loop.plan, loop.segment, loop.window
    own = {
        **{name: getattr(loop, name) for name in _COUNTERS},
        "batches": loop.completed_batches,
        "bad_images": [list(pair) for pair in loop.bad_images],
        "nonfinite": [dict(each) for each in loop.nonfinite],
        "segment": None if plan is None or segment is None else plan.segments.index(segment),
        "window": None if window is None else window.state(),
        "finished": plan is not None and loop.served >= len(plan),
    }
    states = {name: callback.state_dict() for name, callback in _stateful(loop).items()}
    return {
        "loop": own,
        "adapter": capture(loop.adapter),
        "callbacks": {name: state for name, state in states.items() if state},
        "random": random_state(),
    }


def go_on(loop: AdaptationLoop, state: dict[str, Any]) -> None:
    """Take over what :func:`state_of` returned; the callbacks have been started.

    Args:
        loop: A loop at the start of the same run.
        state: The state.

    Raises:
        InputError: A callback is missing, or cannot take over its state.
    """
    callbacks = _stateful(loop)
    for name in state["callbacks"]:
        if name not in callbacks:
            raise InputError(
                f"The run had the callback {name}, which is missing now. Resume with the callbacks "
                "that it was begun with."
            )
    for name, callback in callbacks.items():
        if name not in state["callbacks"] and callback.state_dict():
            raise InputError(
                f"The checkpoint knows nothing of the callback {name}. Resume with the callbacks "
                "that the run was begun with, or from an earlier checkpoint."
            )
    restore(loop.adapter, state["adapter"])
    for name, held in state["callbacks"].items():
        callbacks[name].load_state_dict(held)
    own, plan = state["loop"], loop.plan  # last: with it, the run has something to lose
    for name in _COUNTERS:
        setattr(loop, name, own[name])
    loop.bad_images = [(position, reason) for position, reason in own["bad_images"]]
    loop.nonfinite = list(own["nonfinite"])
    done = dict.fromkeys(("ready", "started", "processed", "completed"), own["batches"])
    loop.batch_progress.load_state_dict({"total": done, "current": done, "is_last_batch": False})
    loop._seen_batches_per_dataloader[0] = own["batches"]
    if plan is not None and own["segment"] is not None:
        loop.segment = plan.segments[own["segment"]]
    if own["window"] is not None:
        loop.window = SlidingWindow.from_state(own["window"], loop.adapter.device)
    set_random_state(state["random"])
    loop.resumed = {"loop": own}  # the rest is in its place: no second copy of it


def _stateful(loop: AdaptationLoop) -> dict[str, Callback]:
    """Name the callbacks whose state belongs to the run: all but Lightning's own."""
    trainer: Any = loop.trainer
    seen: Counter[str] = Counter()
    named = {}
    for callback in trainer.callbacks:
        name = callback.state_key
        if not type(callback).__module__.startswith("lightning."):
            seen[name] += 1
            named[name if seen[name] == 1 else f"{name} ({seen[name]})"] = callback
    return named
