"""Adam's moments, and gradients normalised by them: what several rules start from."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from tta_lightning.errors import unknown_name

BiasCorrection: TypeAlias = Literal["published", "exact"]


class Normalised(NamedTuple):
    """A gradient in units of its own size, coordinate by coordinate; shapes are the gradient's.

    Attributes:
        momentum: ``mhat / (sqrt(vhat) + eps)``, Adam's direction.
        gradient: ``g / (sqrt(vhat) + eps)``.
        m: The first moment, for the next step.
        v: The second moment.
        scale: ``sqrt(vhat) + eps``, the size that both are divided by.
    """

    momentum: Tensor
    gradient: Tensor
    m: Tensor
    v: Tensor
    scale: Tensor


def one_minus_power(beta: float, step: Tensor) -> Tensor:
    """Compute ``1 - beta^step`` without the cancellation that float32 suffers at small steps."""
    if beta == 0:
        return torch.ones_like(step)
    return -torch.expm1(step * math.log(beta))


def bias_exponent(step: Tensor, bias_correction: BiasCorrection) -> Tensor:
    """Return the exponent of the bias correction at a step that is counted from 1."""
    return step if bias_correction == "exact" else step + 1


def require_bias_correction(value: BiasCorrection) -> BiasCorrection:
    """Return a bias correction that exists, else raise.

    Raises:
        InputError: Names it and those that exist.
    """
    if value not in ("published", "exact"):
        raise unknown_name("bias correction", value, ("published", "exact"))
    return value


def normalise(
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    step: Tensor,
    betas: tuple[float, float],
    eps: float,
    bias_correction: BiasCorrection = "exact",
) -> Normalised:
    """Update the moments of a gradient and divide by the root of the second.

    Args:
        grad: Gradient, any shape.
        m: First moment before this step, same shape.
        v: Second moment before this step.
        step: Number of this step, counted from 1, a scalar.
        betas: Decay of the moments.
        eps: Added to the root of the second moment.
        bias_correction: ``exact`` divides by ``1 - beta^t`` as Adam does, ``published`` by
            ``1 - beta^(t+1)`` as the code of MGTTA does.
    """
    b1, b2 = betas
    exponent = bias_exponent(step, bias_correction)
    m = b1 * m + (1 - b1) * grad
    v = b2 * v + (1 - b2) * grad * grad
    scale = (v / one_minus_power(b2, exponent)).sqrt() + eps
    return Normalised(m / one_minus_power(b1, exponent) / scale, grad / scale, m, v, scale)
