"""Stochastic gradient descent as an update rule."""

from __future__ import annotations

import torch
from torch import Tensor

from tta_lightning.errors import InputError
from tta_lightning.rules.base import RuleState, Tensors, UpdateRule, require, step_counter


class SGD(UpdateRule):
    """SGD with momentum, the equations of :class:`torch.optim.SGD`.

    ``g <- grad + weight_decay * theta``; ``b <- momentum * b + (1 - dampening) * g``, but ``b = g``
    at the first step; update ``-lr * b``, or ``-lr * (g + momentum * b)`` with Nesterov momentum.

    Args:
        lr: Learning rate.
        momentum: Momentum factor, in ``[0, 1)``.
        dampening: Dampening of the momentum.
        weight_decay: L2 penalty.
        nesterov: Use Nesterov momentum; needs ``momentum > 0`` and ``dampening = 0``.

    Raises:
        InputError: A hyper-parameter is out of range.
    """

    def __init__(
        self,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        super().__init__()
        self.lr = require("lr", lr, 0.0)
        self.momentum = require("momentum", momentum, 0.0, 1.0)
        self.dampening = dampening
        self.weight_decay = require("weight_decay", weight_decay, 0.0)
        self.nesterov = nesterov
        if nesterov and (momentum == 0 or dampening != 0):
            raise InputError(
                "nesterov = true needs momentum > 0 and dampening = 0, got "
                f"momentum = {momentum}, dampening = {dampening}."
            )

    def init(self, params: Tensors) -> RuleState:
        """Make the state: a step counter and, with momentum, a buffer for each parameter."""
        if self.momentum == 0:
            return {}
        buffers = {name: torch.zeros_like(param) for name, param in params.items()}
        return {"step": step_counter(params), "b": buffers}

    def update(
        self, grads: Tensors, state: RuleState, params: Tensors
    ) -> tuple[dict[str, Tensor], RuleState]:
        """Compute ``-lr`` times the (momentum of the) gradient; see :class:`UpdateRule`."""
        updates: dict[str, Tensor] = {}
        buffers = dict(state.get("b", {}))
        for name, grad in grads.items():
            direction = grad
            if self.weight_decay:
                direction = direction + self.weight_decay * params[name]
            if self.momentum:
                current = direction
                direction = self._accumulate(current, buffers[name], state["step"])
                buffers[name] = direction
                if self.nesterov:
                    direction = current + self.momentum * direction
            updates[name] = -self.lr * direction
        return updates, ({"step": state["step"] + 1, "b": buffers} if self.momentum else {})

    def _accumulate(self, grad: Tensor, buffer: Tensor, step: Tensor) -> Tensor:
        if self.dampening == 0:  # the zero buffer of the first step then gives exactly the gradient
            return self.momentum * buffer + grad
        later = self.momentum * buffer + (1 - self.dampening) * grad
        return torch.where(step == 0, grad, later)
