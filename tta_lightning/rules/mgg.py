"""MGG: a learned optimizer, the same tiny network for every coordinate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Self, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tta_lightning.errors import InputError, unknown_name
from tta_lightning.functional import keep_float32
from tta_lightning.models.weights import load_strictly
from tta_lightning.rules.base import (
    RuleState,
    Tensors,
    UpdateRule,
    require,
    require_betas,
    step_counter,
)
from tta_lightning.rules.checkpoints import read_learned_rule
from tta_lightning.rules.memory import GradientMemoryLayer
from tta_lightning.rules.moments import BiasCorrection, normalise, require_bias_correction

EPS = 1e-8  # added to the root of the second moment
Form: TypeAlias = Literal["published", "extended"]


class MGG(UpdateRule):
    """Meta gradient generator: makes of each coordinate's gradient the step of that coordinate.

    Deng et al., "Learning to Generate Gradients for Test-Time Adaptation via Test-Time Training
    Layers", AAAI 2025, https://arxiv.org/abs/2412.16901. The same 164 weights serve every scalar of
    every parameter, whatever their number and shapes::

        m~, g~  = normalised momentum and gradient, from Adam's moments
        o, S    = GradientMemoryLayer((m~, g~), S)              S: memory, one for each scalar
        theta  <- theta - lr * u,    u = tanh(o)

    so no step is larger than ``lr``. The state is 72 numbers of memory and two moments for each
    adapted scalar: 296 bytes in float32, 11.4 MB for the 38,400 scalars of ViT-B. It is computed in
    float32 at least, under autocast too.

    ``form="extended"`` is our own, for ``unroll > 1`` in pre-training. ``m~`` and ``g~`` do not say
    how large a gradient is beside those of other coordinates, and ``tanh`` saturates. Therefore::

        r = root mean square of the gradients, over the coordinates that have one, decayed over time
        x = (m~, g~, asinh(m / r), asinh(g / r))                m: bias-corrected
        u = exp(s) * (GradientMemoryLayer(x, S) + x . c)        s: one for biases, one for the rest

    with learned ``s`` and ``c``, which start as 0 and (0.5, 0, 0, 0.5): half Adam, half gradient.

    Departs from the published code in ``mask_zero_gradients``: the published rule makes of a zero
    gradient ``u(0) = -0.996``, so a coordinate on which the loss does not depend drifts by ``lr`` a
    batch. In a vision transformer that never happens; in a network with ReLUs a channel can be
    dead, and should stay as it was trained. By default such a coordinate gets no update, while its
    memory and moments go on as published.

    Args:
        checkpoint: File with a trained rule: of :class:`~tta_lightning.meta.MGGPretraining`, or the
            published ``mgg_ckpt.pth``. None for random weights, to be trained.
        lr: Learning rate; None for the checkpoint's, else 1e-3.
        form: ``published`` or ``extended``; None for the checkpoint's, else ``published``.
        hidden: Width of the memory; None for the checkpoint's, else 8.
        betas: Decay of the first and the second moment, each in ``[0, 1)``; None for the
            checkpoint's, else (0.9, 0.99).
        bias_correction: ``published`` divides the moments at step t by ``1 - beta^(t+1)``, as the
            published code does and its checkpoint expects; ``exact`` by ``1 - beta^t``. None for
            the checkpoint's, else ``published``.
        mask_zero_gradients: Leave coordinates whose gradient is exactly zero where they are.

    Raises:
        InputError: A hyper-parameter is out of range, the file holds no such rule, or its rule is
            of another form or width than asked for.
    """

    def __init__(
        self,
        checkpoint: str | None = None,
        lr: float | None = None,
        form: Form | None = None,
        hidden: int | None = None,
        betas: tuple[float, float] | None = None,
        bias_correction: BiasCorrection | None = None,
        mask_zero_gradients: bool = True,
    ) -> None:
        super().__init__()
        self.checkpoint = checkpoint
        self.learned = None if checkpoint is None else read_learned_rule(checkpoint)
        stored = {} if self.learned is None else self.learned.options

        def choose(name: str, given: Any, default: Any) -> Any:
            return given if given is not None else stored.get(name, default)

        self.lr = require("lr", choose("lr", lr, 1e-3), 0.0)
        self.form: Form = choose("form", form, "published")
        self.hidden: int = choose("hidden", hidden, 8)
        self.betas = require_betas(choose("betas", betas, (0.9, 0.99)))
        self.bias_correction = require_bias_correction(
            choose("bias_correction", bias_correction, "published")
        )
        self.mask_zero_gradients = mask_zero_gradients
        if self.form not in ("published", "extended"):
            raise unknown_name("form of MGG", self.form, ("published", "extended"))
        if self.hidden < 1:
            raise InputError(f"hidden = {self.hidden} is out of range: expected 1 or more.")
        self.memory = GradientMemoryLayer(2 if self.form == "published" else 4, self.hidden)
        self.log_scale: nn.Parameter | None = None
        self.skip: nn.Parameter | None = None
        if self.form == "extended":
            self.log_scale = nn.Parameter(torch.zeros(2))  # of biases, of all other parameters
            self.skip = nn.Parameter(torch.tensor([0.5, 0.0, 0.0, 0.5]))
        if self.learned is not None:
            for name, value in (("form", form), ("hidden", hidden)):
                if value is not None and stored.get(name, value) != value:
                    raise InputError(
                        f"The rule in {self.learned.origin!r} has {name} = {stored[name]}, but "
                        f"{name} = {value} was asked for. Leave {name} out."
                    )
            advice = f"Expected an MGG of the form {self.form!r} with hidden = {self.hidden}."
            load_strictly(self, self.learned.weights, self.learned.origin, "rule", advice)

    @classmethod
    def from_checkpoint(cls, path: str, **options: Any) -> Self:
        """Load a trained rule, published or our own.

        Args:
            path: The file.
            options: Further arguments of the constructor.

        Returns:
            The rule.

        Raises:
            InputError: See the class.
        """
        return cls(checkpoint=path, **options)

    def options(self) -> dict[str, Any]:
        """Return the constructor arguments that belong to the weights, as plain values."""
        return {
            "lr": self.lr,
            "form": self.form,
            "hidden": self.hidden,
            "betas": list(self.betas),
            "bias_correction": self.bias_correction,
        }

    def init(self, params: Tensors) -> RuleState:
        """Make the state: a step counter, and two moments and a memory for each scalar.

        All parameters lie one after the other: with N scalars, ``m`` and ``v`` are ``[N]``, ``W``
        is ``[N, hidden, hidden]`` and ``b`` is ``[N, hidden]``.
        """
        step = step_counter(params)
        count = sum(param.numel() for param in params.values())
        zeros = torch.zeros(count, dtype=step.dtype, device=step.device)
        w, b = self.memory.initial_memory(count)
        return {"step": step, "m": zeros, "v": zeros.clone(), "W": w.to(zeros), "b": b.to(zeros)}

    def update(
        self, grads: Tensors, state: RuleState, params: Tensors
    ) -> tuple[dict[str, Tensor], RuleState]:
        """Compute ``-lr * u``; see :class:`UpdateRule`."""
        directions, state = self.generate(grads, state, params)
        return {
            name: (-self.lr * direction).to(params[name]) for name, direction in directions.items()
        }, state

    def generate(
        self, grads: Tensors, state: RuleState, params: Tensors
    ) -> tuple[dict[str, Tensor], RuleState]:
        """Compute ``u``, before any learning rate.

        Args:
            grads: As in :meth:`update`.
            state: As in :meth:`update`.
            params: As in :meth:`update`; must come in the order they had in :meth:`init`.

        Returns:
            ``u`` of each parameter that has a gradient, and the next state.
        """
        names = [name for name in params if name in grads]
        step = state["step"] + 1
        if not names:
            return {}, {**state, "step": step}
        grad = torch.cat([grads[name].reshape(-1) for name in names])
        dtype = torch.promote_types(state["m"].dtype, torch.float32)
        present = _positions(params, names, grad.device)
        part = {key: _take(state[key], present).to(dtype) for key in ("m", "v", "W", "b")}
        with torch.autocast(grad.device.type, enabled=False):
            x, part = self._inputs(grad.to(dtype), part, step)
            out, part["W"], part["b"] = self._memory(x, part["W"], part["b"])
            u = self._output(out[:, 0], x, params, names)
        if self.mask_zero_gradients:
            u = u.where(grad != 0, 0)
        pieces = u.split([params[name].numel() for name in names])
        directions = {
            name: piece.view_as(params[name]) for name, piece in zip(names, pieces, strict=True)
        }
        return directions, {
            "step": step,
            **{key: _put(state[key], present, value) for key, value in part.items()},
        }

    def _memory(self, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Run the memory layer in the precision of its inputs."""
        weights = {name: p.to(inputs[0]) for name, p in self.memory.named_parameters()}
        found: tuple[Tensor, Tensor, Tensor] = functional_call(self.memory, weights, inputs)
        return found

    def _inputs(self, grad: Tensor, state: RuleState, step: Tensor) -> tuple[Tensor, RuleState]:
        """Compute what the memory layer reads ``[N, inputs]``, and the next moments."""
        found = normalise(grad, state["m"], state["v"], step, self.betas, EPS, self.bias_correction)
        inputs = [found.momentum, found.gradient]
        if self.form == "extended":
            relative = found.scale / found.scale.square().mean().sqrt()
            inputs += [torch.asinh(value * relative) for value in inputs]
        return torch.stack(inputs, dim=1), {**state, "m": found.m, "v": found.v}

    def _output(self, out: Tensor, x: Tensor, params: Tensors, names: list[str]) -> Tensor:
        """Turn what the memory layer gives ``[N]`` into ``u`` ``[N]``."""
        if self.log_scale is None or self.skip is None:
            return torch.tanh(out)
        for_bias, for_rest = self.log_scale.exp()
        scales = [
            (for_bias if name.endswith("bias") else for_rest).expand(params[name].numel())
            for name in names
        ]
        return torch.cat(scales).to(x) * (out + x @ self.skip.to(x))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move along with a network, but keep the precision: the memory layer needs it."""
        return super()._apply(keep_float32(fn), recurse)  # type: ignore[no-untyped-call,no-any-return]


def _positions(params: Tensors, names: list[str], device: torch.device) -> Tensor | None:
    """Return where the named parameters lie among all scalars; None for all of them."""
    if len(names) == len(params):
        return None
    wanted = set(names)
    parts = [torch.full((p.numel(),), name in wanted, device=device) for name, p in params.items()]
    return torch.cat(parts).nonzero()[:, 0]


def _take(tensor: Tensor, positions: Tensor | None) -> Tensor:
    return tensor if positions is None else tensor.index_select(0, positions)


def _put(tensor: Tensor, positions: Tensor | None, part: Tensor) -> Tensor:
    return part if positions is None else tensor.to(part).index_copy(0, positions, part)
