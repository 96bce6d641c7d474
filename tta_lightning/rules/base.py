"""The contract of an update rule."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from tta_lightning.describe import constructor_arguments
from tta_lightning.errors import InputError
from tta_lightning.models.classifier import weights_hash

Tensors: TypeAlias = Mapping[str, Tensor]
RuleState: TypeAlias = dict[str, Any]  # nested dicts of tensors, nothing else


class UpdateRule(nn.Module, ABC):
    """Two pure functions: make a state, and turn gradients into updates.

    A rule holds its hyper-parameters, and a learned rule its weights; what changes from step to
    step is in the state that goes in and comes out. Nothing is modified in place and nothing is
    detached, so the same :meth:`update` runs without a graph when a model adapts and with one when
    the rule is meta-trained.
    """

    def describe(self) -> dict[str, Any]:
        """Say what rule this is, as plain values for a manifest."""
        described = {"name": type(self).__name__, **constructor_arguments(self)}
        if any(True for _ in self.parameters()):
            described["weights_sha256"] = weights_hash(self)
        return described

    @abstractmethod
    def init(self, params: Tensors) -> RuleState:
        """Make the state before the first step.

        Args:
            params: Parameter name to tensor; gives shapes, dtypes and devices.

        Returns:
            Nested dicts of tensors.
        """

    @abstractmethod
    def update(
        self, grads: Tensors, state: RuleState, params: Tensors
    ) -> tuple[dict[str, Tensor], RuleState]:
        """Turn gradients into updates.

        Args:
            grads: Gradient of each parameter, same shapes. A parameter without an entry took no
                part in the loss: it gets no update and its state stays.
            state: What :meth:`init` or the step before returned.
            params: The parameters that the gradients belong to.

        Returns:
            Updates, which are *added* to the parameters, and the next state.
        """


def step_counter(params: Tensors) -> Tensor:
    """Make a counter of steps at 0, on the device of the parameters.

    It has their widest precision: the bias corrections of Adam are computed from it.
    """
    tensors = list(params.values())
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    device = tensors[0].device if tensors else None
    return torch.zeros((), dtype=torch.float64 if wide else torch.float32, device=device)


def require(name: str, value: float, low: float, high: float | None = None) -> float:
    """Return a hyper-parameter that lies in ``[low, high)``, else raise.

    Raises:
        InputError: Names the hyper-parameter, its value and its range.
    """
    upper = math.inf if high is None else high
    if not low <= value < upper:
        raise InputError(
            f"{name} = {value} is out of range: expected {_text(low)} <= {name} < {_text(upper)}."
        )
    return value


def require_fraction(name: str, value: float) -> float:
    """Return a hyper-parameter that lies in ``[0, 1]``, else raise.

    Raises:
        InputError: Names the hyper-parameter, its value and its range.
    """
    if not 0 <= value <= 1:
        raise InputError(f"{name} = {value} is out of range: expected 0 <= {name} <= 1.")
    return value


def require_whole(name: str, value: int, low: int, high: int | None = None) -> int:
    """Return a hyper-parameter that is a whole number in ``[low, high)``, else raise.

    Raises:
        InputError: Names the hyper-parameter, its value and its range.
    """
    require(name, value, low, high)
    if not isinstance(value, int) or isinstance(value, bool):
        raise InputError(f"{name} = {value} is out of range: expected a whole number.")
    return value


def _text(bound: float) -> str:
    """Write a bound out, whole numbers in full."""
    return str(int(bound)) if float(bound).is_integer() else f"{bound:g}"


def require_betas(betas: tuple[float, float]) -> tuple[float, float]:
    """Return the decays of two moments if each lies in ``[0, 1)``, else raise.

    Raises:
        InputError: Names the decay and its range.
    """
    if len(betas) != 2:
        raise InputError(f"betas = {betas}: expected two numbers, such as (0.9, 0.99).")
    first, second = betas
    return require("betas[0]", first, 0.0, 1.0), require("betas[1]", second, 0.0, 1.0)
