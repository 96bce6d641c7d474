"""SAR: sharpness-aware entropy minimisation on reliable samples, with recovery from collapse."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tta_lightning.adapter import Adapter
from tta_lightning.contract import Outputs, StepReport, not_finite
from tta_lightning.errors import InputError
from tta_lightning.functional import RELIABLE, entropy, entropy_margin
from tta_lightning.models.norms import fix_upper_norms
from tta_lightning.rules import UpdateRule
from tta_lightning.rules.base import require

COLLAPSED = 0.2  # nats: e0 of the published code
_DECAY = 0.9  # of the moving average of entropies
_AVERAGE = "entropy"  # its name in the memory: a scalar in nats
_NOTHING_KEPT = "no sample is sure enough to learn from"


class SAR(Adapter):
    """Descend, from where the entropy of sure samples is highest nearby, to a flat minimum.

    Niu, Wu, Zhang, Wen, Chen, Zhao, Tan, "Towards Stable Test-Time Adaptation in Dynamic Wild
    World", ICLR 2023, https://arxiv.org/abs/2302.12400 (equations 2 to 5). For each batch::

        S1    = {i : H_i(theta) < E0}
        g1    = gradient at theta of  mean_{i in S1} H_i
        theta' = theta + rho * g1 / ||g1||
        S2    = {i in S1 : H_i(theta') < E0}
        L     = mean_{i in S2} H_i(theta')

    and one step of the rule from ``theta`` along the gradient of ``L`` at ``theta'``. ``H_i`` is
    the entropy of sample ``i`` in nats, E0 = ``margin_e0``, rho = ``rho``; the norm runs over all
    adapted parameters together. These are the affine parameters of normalisation layers, those in
    the last quarter of the network excepted; see
    :func:`~tta_lightning.models.norms.upper_norm_layers`.

    Recovery: ``m = 0.9 * m + 0.1 * L`` after each step, starting at the first ``L``. Where ``m``
    falls below ``reset_constant`` the model has collapsed to sure and equal predictions, and
    returns to its source. The prediction of a batch is that of ``theta`` before its update.

    Attached terms are added to both losses, each computed from its own forward pass and its own
    kept samples. The filters and ``m`` see the entropy alone.

    Departs from the published code in:

    * ``reset_constant`` is honoured; the published code resets at 0.2 whatever is asked. A reset
      forgets ``m``; the published code keeps it, and so resets after every batch until ``m`` is
      above the threshold again. ``legacy=True`` does both as published; only a reset from outside
      then forgets ``m``.
    * Where S1 or S2 is empty nothing moves, with ``legacy=True`` neither. The published code steps
      along a gradient of zero there, that is, momentum and weight decay go on.
    * The last quarter is found by the structure of the network; the published code knows the names
      ``layer4``, ``blocks.9`` to ``blocks.11`` and ``norm``, those of timm's ResNets and ViT-B.
    * A batch whose loss or gradient is not finite changes nothing. Dropout is off and the running
      statistics of batch normalisation are kept unused, as in
      :class:`Tent <tta_lightning.methods.Tent>`.

    The paper's rules for ImageNet-C: ``SGD(lr=2.5e-4, momentum=0.9)`` for a ResNet-50, which is the
    default, and ``lr=1e-3`` for ViT-B, both at batch 64.

    Args:
        network: Images ``[B, 3, H, W]`` in [0, 1] to logits ``[B, C]``; see :class:`Adapter`.
        rule: How gradients become updates.
        margin_e0: E0 in nats; None for ``0.4 ln C``.
        rho: Length of the ascent, in the units of the parameters.
        reset_constant: Threshold of ``m`` in nats; 0 for no recovery.
        legacy: Recover as the published code does. The other departures stay, that of an empty
            S1 or S2 among them.
        skip_top: Leave the last quarter of the network fixed.

    Raises:
        InputError: A hyper-parameter is out of range, or ``legacy`` meets another threshold than
            its own.
    """

    def __init__(
        self,
        network: str | dict[str, Any] | nn.Module,
        rule: UpdateRule | None = None,
        margin_e0: float | None = None,
        rho: float = 0.05,
        reset_constant: float = COLLAPSED,
        legacy: bool = False,
        skip_top: bool = True,
    ) -> None:
        super().__init__(network, rule)
        self.margin_e0 = None if margin_e0 is None else require("margin_e0", margin_e0, 0.0)
        self.rho = require("rho", rho, 0.0)
        self.reset_constant = require("reset_constant", reset_constant, 0.0)
        if legacy and reset_constant != COLLAPSED:
            raise InputError(
                f"reset_constant = {reset_constant} has no effect with legacy=True: the published "
                f"code resets at {COLLAPSED} whatever is asked. Leave one of the two out."
            )
        self.legacy = legacy
        self.skip_top = skip_top

    def configure(self) -> None:
        """Let affine normalisation parameters move, without those of the last quarter."""
        super().configure()
        if self.skip_top:
            fix_upper_norms(self.network)

    def loss(self, out: Outputs, images: Tensor) -> Tensor | None:
        """Compute the mean entropy of the sure samples in nats.

        Args:
            out: A forward pass; of the samples it has ``selected`` already, if any, only those
                that are sure stay selected.
            images: ``[B, 3, H, W]`` in [0, 1].

        Returns:
            A scalar, or None where no sample is left.
        """
        entropies = entropy(out.logits)
        margin = entropy_margin(self.margin_e0, RELIABLE, out.logits.shape[1])
        sure = entropies.detach() < margin
        out.selected = sure if out.selected is None else sure & out.selected
        return entropies[out.selected].mean() if out.selected.any() else None

    def learn(self, out: Outputs, images: Tensor) -> StepReport:
        """Ascend, differentiate there, and step from the original point."""
        first = self.loss(out, images)
        if first is None:
            return StepReport(reason=_NOTHING_KEPT)
        first = self.with_terms(first, out)
        ascent = self.gradients(first)
        if ascent is None:
            return not_finite(first)
        with self._moved_along(ascent):
            there = self.outputs(images)
            there.selected = out.selected
            second = self.loss(there, images)
            if second is None:
                return StepReport(reason=_NOTHING_KEPT)
            total = self.with_terms(second, there)
            grads = self.gradients(total)
        if grads is None or not self.move(grads):
            return not_finite(total)
        return self._watch(second.detach(), StepReport(updated=True, loss=total.detach()))

    @contextmanager
    def _moved_along(self, grads: Mapping[str, Tensor]) -> Iterator[None]:
        """Hold the parameters at ``theta + rho * g / ||g||`` while the block runs."""
        kept = {name: self._adapted[name].detach().clone() for name in grads}
        norm = torch.stack([grad.norm() for grad in grads.values()]).norm()
        try:
            with torch.no_grad():
                for name, grad in grads.items():
                    self._adapted[name].add_(grad * (self.rho / (norm + 1e-12)))
            yield
        finally:
            with torch.no_grad():
                for name, tensor in kept.items():
                    self._adapted[name].copy_(tensor)

    def _watch(self, entropy_there: Tensor, report: StepReport) -> StepReport:
        """Follow the entropy after a step, and recover from a collapse."""
        before = self.memory.get(_AVERAGE)
        after = entropy_there
        if before is not None:
            after = _DECAY * before + (1 - _DECAY) * entropy_there
        self.memory = {_AVERAGE: after}
        if after >= self.reset_constant:
            return report
        self.reset()
        if self.legacy:
            self.memory = {_AVERAGE: after}
        reason = f"the entropy fell below {self.reset_constant:g}: reset to the source model"
        return StepReport(loss=report.loss, reason=reason, reset=True)
