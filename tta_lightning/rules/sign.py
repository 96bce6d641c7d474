"""The sign of momentum plus gradient: the rule that a published MGG nearly is."""

from __future__ import annotations

import torch
from torch import Tensor

from tta_lightning.rules.base import RuleState, Tensors, UpdateRule, require, step_counter
from tta_lightning.rules.moments import (
    BiasCorrection,
    bias_exponent,
    one_minus_power,
    require_bias_correction,
)


class Sign(UpdateRule):
    """Update ``-lr * sign(m~ + g~)``, the sign of what MGG reads.

    A control for learned rules: the published MGG gives this sign in nearly all cases, at nearly
    full size. Normalised momentum and gradient have the same divisor, so the sign is that of the
    bias-corrected momentum plus the gradient. A coordinate where both are zero stays.

    Args:
        lr: Size of every step.
        momentum: Decay of the first moment, in ``[0, 1)``.
        bias_correction: As in :class:`~tta_lightning.rules.MGG`.

    Raises:
        InputError: A hyper-parameter is out of range.
    """

    def __init__(
        self,
        lr: float = 1e-3,
        momentum: float = 0.9,
        bias_correction: BiasCorrection = "published",
    ) -> None:
        super().__init__()
        self.lr = require("lr", lr, 0.0)
        self.momentum = require("momentum", momentum, 0.0, 1.0)
        self.bias_correction = require_bias_correction(bias_correction)

    def init(self, params: Tensors) -> RuleState:
        """Make the state: a step counter, and a zero momentum for each parameter."""
        buffers = {name: torch.zeros_like(param) for name, param in params.items()}
        return {"step": step_counter(params), "m": buffers}

    def update(
        self, grads: Tensors, state: RuleState, params: Tensors
    ) -> tuple[dict[str, Tensor], RuleState]:
        """Compute a step of size ``lr`` in every coordinate; see :class:`UpdateRule`."""
        updates: dict[str, Tensor] = {}
        step, m = state["step"] + 1, dict(state["m"])
        correction = one_minus_power(self.momentum, bias_exponent(step, self.bias_correction))
        for name, grad in grads.items():
            m[name] = self.momentum * m[name] + (1 - self.momentum) * grad
            updates[name] = -self.lr * torch.sign(m[name] / correction + grad)
        return updates, {"step": step, "m": m}
