"""Adam as an update rule."""

from __future__ import annotations

import torch
from torch import Tensor

from tta_lightning.rules.base import (
    RuleState,
    Tensors,
    UpdateRule,
    require,
    require_betas,
    step_counter,
)
from tta_lightning.rules.moments import normalise


class Adam(UpdateRule):
    """Adam (Kingma & Ba, ICLR 2015), the equations of :class:`torch.optim.Adam`.

    ``m <- b1 m + (1 - b1) g``; ``v <- b2 v + (1 - b2) g^2``; update
    ``-lr * mhat / (sqrt(vhat) + eps)`` with ``mhat = m / (1 - b1^t)``, ``vhat = v / (1 - b2^t)``.

    Args:
        lr: Learning rate.
        betas: Decay of the first and the second moment, each in ``[0, 1)``.
        eps: Added to the root of the second moment.
        weight_decay: L2 penalty, added to the gradient.

    Raises:
        InputError: A hyper-parameter is out of range.
    """

    def __init__(
        self,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__()
        self.lr = require("lr", lr, 0.0)
        self.betas = require_betas(betas)
        self.eps = require("eps", eps, 0.0)
        self.weight_decay = require("weight_decay", weight_decay, 0.0)

    def init(self, params: Tensors) -> RuleState:
        """Make the state: a step counter, and two moments for each parameter, all zero."""
        return {
            "step": step_counter(params),
            "m": {name: torch.zeros_like(param) for name, param in params.items()},
            "v": {name: torch.zeros_like(param) for name, param in params.items()},
        }

    def update(
        self, grads: Tensors, state: RuleState, params: Tensors
    ) -> tuple[dict[str, Tensor], RuleState]:
        """Compute Adam's step; see :class:`UpdateRule`."""
        updates: dict[str, Tensor] = {}
        step, m, v = state["step"] + 1, dict(state["m"]), dict(state["v"])
        for name, grad in grads.items():
            g = grad + self.weight_decay * params[name] if self.weight_decay else grad
            found = normalise(g, m[name], v[name], step, self.betas, self.eps)
            m[name], v[name] = found.m, found.v
            updates[name] = -self.lr * found.momentum
        return updates, {"step": step, "m": m, "v": v}
