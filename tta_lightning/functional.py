"""Quantities that several methods share, as pure functions of tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


def entropy(logits: Tensor) -> Tensor:
    """Shannon entropy of the softmax distribution of each sample.

    Computed in float32 at least, so that it keeps its meaning under bfloat16 autocast.

    Args:
        logits: Unnormalised scores, ``[B, C]``.

    Returns:
        Entropy in nats, ``[B]``, between 0 and ``ln C``.
    """
    if logits.dtype in HALF:
        logits = logits.float()
    return -(logits.softmax(dim=1) * logits.log_softmax(dim=1)).sum(dim=1)


def keep_float32(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Make what a module applies to its tensors move them, but never to less than float32.

    For ``Module._apply`` of parts that need their precision whatever the network around them has.
    """

    def move(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        return tensor.to(moved.device) if moved.dtype in HALF else moved

    return move


def all_finite(*tensors: Tensor) -> bool:
    """Tell whether no element of any tensor is NaN or infinite.

    One number travels to the host however many tensors there are, so a check a step does not
    stall an accelerator more than once.
    """
    largest = [tensor.detach().abs().max() for tensor in tensors if tensor.numel()]
    if not largest:
        return True
    common = torch.stack([value.to(torch.float32) for value in largest])
    return bool(torch.isfinite(common).all())


@dataclass(frozen=True)
class Predictions:
    """What logits say of each sample.

    Attributes:
        label: ``[B]`` int64, the most likely class; -1 where the logits are not finite.
        confidence: ``[B]``, its probability.
        entropy: ``[B]``, in nats.
        finite: ``[B]`` bool.
    """

    label: Tensor
    confidence: Tensor
    entropy: Tensor
    finite: Tensor


def predictions(logits: Tensor) -> Predictions:
    """Read the predictions off logits.

    Args:
        logits: ``[B, C]``.

    Returns:
        Label, confidence and entropy of each sample.
    """
    logits = logits.detach().float()
    finite = torch.isfinite(logits).all(dim=1)
    confidence, label = logits.softmax(dim=1).max(dim=1)
    return Predictions(label.where(finite, -1), confidence, entropy(logits), finite)
