"""Normalisation layers of any model: finding them, and choosing whose statistics they use."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, TypeAlias

from torch import Tensor, nn

BatchNorm: TypeAlias = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_NORMS = (
    *_BATCH_NORMS,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)


def norm_layers(network: nn.Module) -> dict[str, nn.Module]:
    """Find every normalisation layer that has an affine weight.

    Layers of libraries that do not derive from torch's classes (timm's ``RmsNorm``, say) are
    recognised by a class name that contains "norm" and a one-dimensional weight of their own.

    Args:
        network: Any module.

    Returns:
        Module name to layer, in the order of ``named_modules``.
    """
    return {name: module for name, module in network.named_modules() if _is_affine_norm(module)}


def batch_norm_layers(network: nn.Module) -> dict[str, BatchNorm]:
    """Find every batch-normalisation layer, affine or not.

    Args:
        network: Any module.

    Returns:
        Module name to layer, in the order of ``named_modules``.
    """
    return {
        name: module for name, module in network.named_modules() if isinstance(module, _BATCH_NORMS)
    }


def use_batch_statistics(layers: Iterable[BatchNorm]) -> None:
    """Make layers normalise by the statistics of the batch they are given.

    Running statistics stay in their buffers, untouched and unused, except that a layer which sees
    a single value a channel (one image at one pixel) has no batch statistics and falls back on
    them. A batch of one image is allowed, its statistics being those of its pixels; both cases are
    warned of once.

    Args:
        layers: Batch-normalisation layers.
    """
    guard = _Guard()
    for layer in layers:
        layer.train()
        layer.track_running_stats = False
        hooks = layer._forward_pre_hooks.values()
        if layer.running_mean is not None and not any(isinstance(h, _Guard) for h in hooks):
            layer.register_forward_pre_hook(guard)


def use_source_statistics(layers: Iterable[BatchNorm]) -> None:
    """Make layers normalise by their running statistics, and leave those as they are.

    Args:
        layers: Batch-normalisation layers.
    """
    for layer in layers:
        layer.eval()
        layer.track_running_stats = layer.running_mean is not None


def warn_of_a_single_image() -> None:
    """Warn that batch statistics are taken from one image."""
    warnings.warn(
        "Batch statistics of a single image: each batch-normalisation layer uses the statistics of "
        "that image's pixels alone (source statistics where it has only one pixel). Use a larger "
        "batch size, or a model with group or layer normalisation.",
        stacklevel=3,
    )


def _is_affine_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter):
        return False
    return isinstance(module, _NORMS) or (
        "norm" in type(module).__name__.lower() and weight.dim() == 1
    )


class _Guard:
    """Forward pre-hook: source statistics where a batch has none, and one warning."""

    def __init__(self) -> None:
        self.warned = False

    def __call__(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        if layer.track_running_stats:  # switched back to source statistics since
            return
        inputs: Tensor = args[0]
        layer.training = inputs.numel() > inputs.shape[1]
        if inputs.shape[0] == 1 and not self.warned:
            self.warned = True
            warn_of_a_single_image()
