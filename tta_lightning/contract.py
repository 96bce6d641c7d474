"""What adapters, their terms and their loops exchange."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tta_lightning.errors import InputError
from tta_lightning.models.heads import Head
from tta_lightning.rules import RuleState


@dataclass
class Outputs:
    """What one forward pass gives to a method's loss.

    Attributes:
        logits: ``[B, C]``, restricted to the classes of the stream where it has a subset.
        features: ``[B, D]``, the input of the final linear map; None where the network has no
            such head.
        selected: ``[B]`` bool, the samples that the method learns from, filled in by its loss;
            None stands for all.
    """

    logits: Tensor
    features: Tensor | None = None
    selected: Tensor | None = None


Term = Callable[[Outputs, Head], Tensor]
"""A scalar that is added to a method's loss, computed from a forward pass and the head."""


@dataclass
class StepReport:
    """What the last :meth:`Adapter.adapt_step` did.

    Attributes:
        updated: Whether the parameters moved.
        loss: The loss that was minimised, a detached scalar; None where there was none.
        finite: Whether loss and gradients were; if not, nothing moved. Of a method that takes
            images one by one (RoTTA, LAME, T3A): whether all of them were.
        reason: Why nothing moved, or why images were left out; else empty.
        reset: Whether the method itself returned to the source model.
        failed: Number of images that were left out, of a method that takes them one by one.
    """

    updated: bool = False
    loss: Tensor | None = None
    finite: bool = True
    reason: str = ""
    reset: bool = False
    failed: int = 0


def not_finite(loss: Tensor) -> StepReport:
    """Warn of a batch whose loss, gradient or step is not finite, and report that nothing moved."""
    warnings.warn(
        "A batch gave a loss, a gradient or a step that is not finite; it was predicted, but "
        "nothing was learnt from it.",
        stacklevel=3,
    )
    return StepReport(
        loss=loss.detach(), finite=False, reason="loss, gradient or step is not finite"
    )


def unobserved(phase: str) -> AbstractContextManager[None]:
    """Let a phase of a step pass unmeasured: what ``Adapter.phase`` is by default."""
    return nullcontext()


_NOT_THE_IMAGES = ("CUDA", "allocate memory")  # in messages of a device that has failed


def logits_of(network: nn.Module, images: Tensor) -> Tensor:
    """Run a network on images ``[B, 3, H, W]`` and return its logits ``[B, C]``.

    Raises:
        InputError: It cannot take such images, or it gives something else. What the network raised
            is the cause.
    """
    try:
        logits = network(images)
    except (InputError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, ValueError, IndexError) as error:
        if any(words in str(error) for words in _NOT_THE_IMAGES):
            raise
        own = next(network.parameters(), images)
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise InputError(
            f"The network failed on images {list(images.shape)} of {images.dtype} on "
            f"{images.device}: {reason}. Expected images [B, 3, H, W] in [0, 1], large enough for "
            f"the network, of {own.dtype} on {own.device}."
        ) from error
    return checked_logits(logits)


def checked_logits(logits: Any) -> Tensor:
    """Return what a network gave if it is logits ``[B, C]``, else raise.

    Raises:
        InputError: It is something else.
    """
    if isinstance(logits, Tensor) and logits.dim() == 2:
        return logits
    got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    raise InputError(
        f"The network gave {got} where logits [B, C] are expected. Wrap it in a module that "
        "returns the logits alone."
    )


def restricted(logits: Tensor, classes: Tensor | None) -> Tensor:
    """Keep the logits of some classes.

    Args:
        logits: ``[B, C]``.
        classes: ``[K]`` int64, positions among the C; None for all.

    Returns:
        ``[B, K]``.

    Raises:
        InputError: The network has fewer classes.
    """
    if classes is None:
        return logits
    if int(classes.max()) >= logits.shape[1]:
        raise InputError(
            f"The network gives {logits.shape[1]} logits, but is said to know "
            f"{int(classes.max()) + 1} classes or more. Correct its class names."
        )
    return logits.index_select(1, classes.to(logits.device))


def check_method(state: dict[str, Any], name: str) -> None:
    """Refuse the extra state of another method.

    Raises:
        InputError: Names both.
    """
    if state["method"] != name:
        raise InputError(
            f"This is the state of {state['method']}, not of {name}: load it into the method that "
            "it was saved from."
        )


CLASSES = "classes"  # in a memory: the classes that it is about, ``[C]`` int64


def class_positions(logits: Tensor, classes: Tensor | None) -> Tensor:
    """Return which of the network's classes logits ``[B, C]`` are of: ``[C]`` int64."""
    if classes is None:
        return torch.arange(logits.shape[1], device=logits.device)
    return classes.to(logits.device)


def check_classes(memory: RuleState, now: Tensor, name: str) -> None:
    """Refuse to go on with a memory of predictions over other classes.

    Args:
        memory: Of a method; has the classes under :data:`CLASSES`, once there are any.
        now: What :func:`class_positions` says of the batch.
        name: Of the method.

    Raises:
        InputError: The classes differ.
    """
    before = memory.get(CLASSES)
    if before is None or torch.equal(before.to(now.device), now):
        return
    others = "" if len(before) != len(now) else " others"
    raise InputError(
        f"{name} remembers earlier predictions, and there were {len(before)} classes then and are "
        f"{len(now)}{others} now. Call reset() when the classes of the stream change."
    )


def kind_of(value: Any) -> str:
    """Name shape and type of a tensor, or the type of anything else, for messages."""
    if isinstance(value, Tensor):
        return f"{list(value.shape)} {value.dtype} on {value.device}"
    return type(value).__name__


def writable(images: Tensor) -> Tensor:
    """Return images that a network may write to and a graph may keep.

    Those that were made under ``torch.inference_mode`` are copied; call it outside of that mode.

    Raises:
        InputError: They are something else than floating-point images ``[B, 3, H, W]``.
    """
    if not isinstance(images, Tensor) or images.dim() != 4 or not images.is_floating_point():
        raise InputError(f"Expected floating-point images [B, 3, H, W], got {kind_of(images)}.")
    if 0 in images.shape[2:]:
        raise InputError(f"The images have no pixels: their shape is {list(images.shape)}.")
    if images.is_meta:
        raise InputError("The images are on the device 'meta', where tensors hold no values.")
    return images.clone() if images.is_inference() else images


def keep_counter(moved: Tensor, tensor: Tensor) -> Tensor:
    """Keep the precision of a counter: bfloat16 counts to 256 only."""
    return moved.to(tensor.dtype) if tensor.dim() == 0 else moved


def map_tensors(fn: Callable[[Tensor], Tensor], state: RuleState) -> RuleState:
    """Apply a function to every tensor of nested dicts."""
    return {
        key: map_tensors(fn, value) if isinstance(value, dict) else fn(value)
        for key, value in state.items()
    }


def tensors_in(state: RuleState) -> Iterator[Tensor]:
    """Yield every tensor of nested dicts."""
    for value in state.values():
        if isinstance(value, dict):
            yield from tensors_in(value)
        else:
            yield value
