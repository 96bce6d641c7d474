"""Normalisation layers of any model: finding them, and choosing whose statistics they use."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

from torch import Tensor, nn

BatchNorm: TypeAlias = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_MAP_NORMS = (  # of feature maps, channels first
    *_BATCH_NORMS,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.GroupNorm,
)
_NORMS = (*_MAP_NORMS, nn.LayerNorm, nn.RMSNorm)
_STAGES = 4
_GROUPS = 32  # of group normalisation, as in its paper


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


def upper_norm_layers(network: nn.Module) -> set[str]:
    """Find the normalisation layers in the last quarter of a network, which SAR leaves fixed.

    The quarter is read off how the network is built, not off the names of one library:

    * A network of four stages that grow wider (ResNet, ConvNeXt, Swin, DenseNet): all layers after
      the third stage.
    * A transformer, that is a list of blocks of one class with linear layers and a norm over
      tokens: the last quarter of its blocks (9 to 11 of 12), and what comes after them.
    * Any other, such as CIFAR ResNets of three stages and plain chains of convolutions: none.

    "After" is the order of ``named_modules``.

    Args:
        network: Any module.

    Returns:
        Names, as :func:`norm_layers` gives them.
    """
    layers = norm_layers(network)
    for module in network.modules():
        parts = _four_stages(module) or _transformer_blocks(module)
        held = [set(norm_layers(part).values()) for part in parts]
        if 2 * sum(map(len, held)) > len(layers):  # the trunk, not a part of it
            lower = set.union(*held[: len(parts) - len(parts) // _STAGES])
            last = max(i for i, layer in enumerate(layers.values()) if layer in lower)
            return set(list(layers)[last + 1 :])
    return set()


def fix_upper_norms(network: nn.Module) -> None:
    """Let the affine parameters of :func:`upper_norm_layers` no longer move.

    Args:
        network: Any module.
    """
    layers = norm_layers(network)
    for name in upper_norm_layers(network):
        for parameter in layers[name].parameters(recurse=False):
            parameter.requires_grad_(False)


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


def use_group_norm(network: nn.Module) -> None:
    """Put a group normalisation in the place of every batch normalisation.

    Groups: 32 or fewer, of four channels at least; one for ``BatchNorm1d``, whose inputs may be
    vectors, of which a small group says nothing. Affine parameters are kept; what timm's layers do
    after the normalisation (dropout, activation) still follows it.

    Args:
        network: Any module; changed in place.
    """
    exchanged: dict[nn.Module, nn.Module] = {}  # a layer may stand in several places
    for name, layer in list(network.named_modules(remove_duplicate=False)):
        if isinstance(layer, _BATCH_NORMS):
            exchanged.setdefault(layer, _in_groups(layer))
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, exchanged[layer])


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
        if layer.running_mean is not None and not _guards(layer):
            layer.register_forward_pre_hook(guard)


@contextmanager
def without_advice(layers: Iterable[BatchNorm]) -> Iterator[None]:
    """Do not warn of a single image while the block runs; a later one is still warned of.

    For forward passes of a part of a batch, where a larger batch is no remedy.

    Args:
        layers: Batch-normalisation layers.
    """
    before = {guard: guard.warned for layer in layers for guard in _guards(layer)}
    for guard in before:
        guard.warned = True
    try:
        yield
    finally:
        for guard, warned in before.items():
            guard.warned = warned


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


def _in_groups(layer: BatchNorm) -> nn.Module:
    """Make the group normalisation that stands for a batch normalisation."""
    channels = layer.num_features
    groups = 1 if isinstance(layer, nn.BatchNorm1d) else math.gcd(_GROUPS, max(1, channels // 4))
    group = nn.GroupNorm(groups, channels, layer.eps, layer.affine)
    if layer.affine:
        group.weight, group.bias = layer.weight, layer.bias
    followers = [module for module in layer.children() if not isinstance(module, nn.Identity)]
    return nn.Sequential(group, *followers).train(layer.training) if followers else group


def _four_stages(module: nn.Module) -> list[nn.Module]:
    """Return the children that are stages, where there are four that grow wider; else none.

    A stage is made of blocks, so its norms lie two levels down; those of a stem or of a
    downsampling layer are its own children.
    """
    stages = [
        child for child in module.children() if any("." in name for name in norm_layers(child))
    ]
    widths = [max(_width(layer) for layer in norm_layers(stage).values()) for stage in stages]
    grows = widths == sorted(widths) and widths[:1] < widths[-1:]
    return stages if len(stages) == _STAGES and grows else []


def _transformer_blocks(module: nn.Module) -> list[nn.Module]:
    """Return the elements of a list of transformer blocks; none of any other module."""
    blocks = list(module.children()) if isinstance(module, nn.Sequential | nn.ModuleList) else []
    alike = len(blocks) > 1 and len({type(block) for block in blocks}) == 1
    return blocks if alike and all(map(_mixes_tokens, blocks)) else []


def _mixes_tokens(block: nn.Module) -> bool:
    """Say whether a block has linear layers and norms over tokens."""
    over_tokens = any(not isinstance(m, _MAP_NORMS) for m in norm_layers(block).values())
    return over_tokens and any(isinstance(m, nn.Linear) for m in block.modules())


def _width(layer: nn.Module) -> int:
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    return weight.numel()


def _is_affine_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter):
        return False
    return isinstance(module, _NORMS) or (
        "norm" in type(module).__name__.lower() and weight.dim() == 1
    )


def _guards(layer: BatchNorm) -> list[_Guard]:
    return [hook for hook in layer._forward_pre_hooks.values() if isinstance(hook, _Guard)]


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
