"""Quantities that several methods share, as pure functions of tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    logits = wide(logits)
    return -(logits.softmax(dim=1) * logits.log_softmax(dim=1)).sum(dim=1)


def entropy_logit_gradient(logits: Tensor) -> Tensor:
    """Differentiate the entropy of a prediction by its logits.

    Args:
        logits: ``z [B, C]``.

    Returns:
        ``a [B, C]``, ``a_k = -p_k (log p_k + H)``, in nats. Sums to zero over classes, is not
        positive at the arg-max, and is zero for uniform and for one-hot predictions.
    """
    gradient, log_scale = scaled_logit_gradient(logits)
    return gradient * log_scale.exp()


def scaled_logit_gradient(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Differentiate the entropy by the logits, in numbers that confident samples do not lose.

    Args:
        logits: ``z [B, C]``, two classes or more.

    Returns:
        ``a exp(-s) [B, C]`` and ``s [B, 1]``, the largest ``log p_k`` of the classes behind the
        arg-max, without graph. The entry of the arg-max is minus the sum of the others, which
        holds even where its own formula is rounded to nothing.
    """
    log_p, surprised = surprise(logits)
    best = logits.detach().argmax(dim=1, keepdim=True)
    others = log_p.scatter(1, best, -torch.inf)
    log_scale = others.detach().amax(dim=1, keepdim=True)
    gradient = -(others - log_scale).exp() * surprised
    return gradient.scatter(1, best, -gradient.sum(dim=1, keepdim=True)), log_scale


def surprise(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``log p`` and ``log p + H``, both ``[B, C]`` in nats and in float32 at least."""
    log_p = wide(logits).log_softmax(dim=1)
    return log_p, log_p - (log_p.exp() * log_p).sum(dim=1, keepdim=True)


def has_direction(logits: Tensor) -> Tensor:
    """Say of each row ``[C]`` whether it differs from a constant by more than rounding, ``[B]``."""
    low, high = logits.aminmax(dim=1)
    rounding = (2 if logits.dtype in HALF else 16) * torch.finfo(logits.dtype).eps
    return high - low > rounding * torch.maximum(high, -low)


def wide(tensor: Tensor) -> Tensor:
    """Bring half precision to float32 and leave wider tensors as they are."""
    return tensor.float() if tensor.dtype in HALF else tensor


def keep_float32(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Make what a module applies to its tensors move them, but never to less than float32.

    For ``Module._apply`` of parts that need their precision whatever the network around them has.
    """

    def move(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        return tensor.to(moved.device) if moved.dtype in HALF else moved

    return move


@contextmanager
def without_cast_cache() -> Iterator[None]:
    """Keep autocast from remembering parameters: those that change inside are cast each time."""
    was_enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(was_enabled)


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


RELIABLE = 0.4  # of ln C: the customary margin below which a prediction counts as sure


def entropy_margin(given: float | None, fraction: float, classes: int) -> float:
    """Say which entropy separates sure predictions from the others.

    Args:
        given: In nats; None for the fraction.
        fraction: Of ``ln C``, the largest possible entropy.
        classes: C.

    Returns:
        In nats.
    """
    return fraction * math.log(classes) if given is None else given
