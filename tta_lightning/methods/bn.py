"""Batch-normalisation statistics re-estimated on the test stream."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tta_lightning.adapter import Adapter
from tta_lightning.contract import Outputs, StepReport, writable
from tta_lightning.errors import InputError
from tta_lightning.functional import all_finite
from tta_lightning.models.classifier import describe
from tta_lightning.models.norms import (
    BatchNorm,
    batch_norm_layers,
    use_batch_statistics,
    warn_of_a_single_image,
)
from tta_lightning.rules.base import require_fraction


class BNStats(Adapter):
    """Normalise by statistics of the test images instead of those of the training set.

    Nado et al., "Evaluating Prediction-Time Batch Normalization for Robustness under Covariate
    Shift", 2020, https://arxiv.org/abs/2006.10963 (``alpha = 1``), and Schneider et al., "Improving
    robustness against common corruptions by covariate shift adaptation", NeurIPS 2020,
    https://arxiv.org/abs/2006.16971 (``alpha < 1``).

    Each layer normalises by ``mean = (1 - alpha) * mean_ref + alpha * mean_batch``, and the
    variance alike. The reference is the source statistics or, with ``running``, the blend of the
    batch before: an exponential average along the stream that starts at the source. Schneider's
    ``n / (N + n)`` with prior ``N`` and batch ``n`` is ``alpha``. No parameter moves.

    Departs from common code in: the batch variance is the biased one, as batch normalisation itself
    uses it; a batch with a NaN or an infinite pixel leaves the running average as it was.

    Args:
        network: Images ``[B, 3, H, W]`` in [0, 1] to logits ``[B, C]``; see :class:`Adapter`.
        alpha: Weight of the batch, in [0, 1].
        running: Carry the blend along the stream.

    Raises:
        InputError: ``alpha`` is out of range, or (when adaptation starts) the network has no batch
            normalisation with running statistics.
    """

    def __init__(
        self,
        network: str | dict[str, Any] | nn.Module,
        alpha: float = 1.0,
        running: bool = False,
    ) -> None:
        super().__init__(network)
        self.alpha = require_fraction("alpha", alpha)
        self.running = running
        self._warned = False

    def configure(self) -> None:
        """Let no parameter move; choose whose statistics normalise."""
        layers = self._layers()
        if not layers:
            raise InputError(
                f"BNStats re-estimates batch normalisation, but {describe(self.network).name} has "
                "no such layer with running statistics. Use a batch-normalised network, or another "
                "method."
            )
        if not self._blends:
            use_batch_statistics(layers.values())

    def adapt_step(self, images: Tensor) -> Tensor:
        """Predict a batch; with ``running``, keep the statistics it was predicted with.

        Args:
            images: ``[B, 3, H, W]`` in [0, 1].

        Returns:
            Logits ``[B, C]``.
        """
        self.ready()
        with torch.inference_mode(False), torch.no_grad(), self.phase("inference"):
            images = writable(images)
            if self._blends:
                return self._outputs_with_blend(images, carry_on=self.running).logits
            self.report = StepReport(reason="statistics only, no parameter moves")
            return super().outputs(images).logits

    def outputs(self, images: Tensor) -> Outputs:
        """Run the network once, with the statistics of these images but without keeping them."""
        if self._blends:
            return self._outputs_with_blend(images, carry_on=False)
        return super().outputs(images)

    def moving_tensors(self) -> dict[str, Tensor]:
        """Name the running statistics, which move with ``running``."""
        moving = super().moving_tensors()
        if self.running:
            for name, layer in self._layers().items():
                assert layer.running_mean is not None
                assert layer.running_var is not None
                moving[f"network.{name}.running_mean"] = layer.running_mean
                moving[f"network.{name}.running_var"] = layer.running_var
        return moving

    def _layers(self) -> dict[str, BatchNorm]:
        layers = batch_norm_layers(self.network)
        return {name: layer for name, layer in layers.items() if layer.running_mean is not None}

    @property
    def _blends(self) -> bool:
        return self.alpha != 1 or self.running

    @torch.no_grad()
    def _outputs_with_blend(self, images: Tensor, carry_on: bool) -> Outputs:
        """Run the network with each layer's statistics blended just before it normalises."""
        if len(images) == 1 and not self._warned:
            self._warned = True
            warn_of_a_single_image()
        layers = self._layers().values()
        reference = [(_mean(layer).clone(), _var(layer).clone()) for layer in layers]
        hooks = [layer.register_forward_pre_hook(self._blend) for layer in layers]
        keep = False
        try:
            out = super().outputs(images)
            keep = carry_on and all_finite(*map(_mean, layers), *map(_var, layers))
        finally:
            for hook in hooks:
                hook.remove()
            if not keep:
                for layer, (mean, var) in zip(layers, reference, strict=True):
                    _mean(layer).copy_(mean)
                    _var(layer).copy_(var)
        reason = "" if keep else "no statistics were carried on"
        self.report = StepReport(updated=keep, reason=reason)
        return out

    def _blend(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        inputs: Tensor = args[0]
        dims = [d for d in range(inputs.dim()) if d != 1]
        var, mean = torch.var_mean(inputs, dim=dims, correction=0)
        for buffer, batch in ((layer.running_mean, mean), (layer.running_var, var)):
            assert isinstance(buffer, Tensor)
            buffer.lerp_(batch.to(buffer.dtype), self.alpha)


def _mean(layer: BatchNorm) -> Tensor:
    assert layer.running_mean is not None
    return layer.running_mean


def _var(layer: BatchNorm) -> Tensor:
    assert layer.running_var is not None
    return layer.running_var
