"""Find the blocks that a network is made of, and read a pooled feature vector after each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from tta_lightning.errors import InputError
from tta_lightning.models.classifier import Classifier, describe
from tta_lightning.models.norms import norm_layers

_LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


class BlockFeatures:
    """Reads one feature vector after each block of a network while it runs.

    * A vision transformer of timm or torchvision with a class token: the class token after each
      block, through the norm that comes next (the first norm of the following block, after the
      last block the final one), as MGTTA's published code reads it. Without a class token it is
      the mean over all tokens.
    * Any other network made of blocks: the output of each block, averaged over positions. Blocks
      are the elements of its lists (``nn.Sequential`` and the like) that hold normalisation layers:
      residual blocks, or convolution-norm-activation triples where there are no larger ones.
    * The rest: what enters each convolution and linear layer but the first.

    Args:
        network: Any network.

    Raises:
        InputError: There is nothing to read.
    """

    def __init__(self, network: nn.Module) -> None:
        self.name = describe(network).name
        inner = network.network if isinstance(network, Classifier) else network
        transformer = _transformer_norms(inner)
        self.reads_class_token = transformer is not None and _has_class_token(inner)
        self.modules: list[nn.Module] = transformer or _blocks(inner)
        self.reads_inputs = not self.modules
        if self.reads_inputs:
            weighted: list[nn.Module] = [m for m in inner.modules() if isinstance(m, _WEIGHTED)]
            self.modules = weighted[1:]
        if not self.modules:
            raise InputError(
                f"{self.name} has no blocks and no two convolutions or linear layers to read "
                "features between. Use a deeper network."
            )

    @contextmanager
    def capture(self) -> Iterator[list[Tensor]]:
        """Collect features while the block runs.

        Yields:
            A list that each forward pass fills with ``[B, D_i]`` tensors, attached to the graph,
            in the order of the network.
        """
        found: list[Tensor] = []
        read = self._reader(found)
        handles = [
            module.register_forward_pre_hook(read)
            if self.reads_inputs
            else module.register_forward_hook(read)
            for module in self.modules
        ]
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()

    def _reader(self, found: list[Tensor]) -> Any:
        modules = set(map(id, self.modules))  # a copy made meanwhile carries the hooks along

        def read(module: nn.Module, inputs: Any, output: Any = None) -> None:
            if id(module) in modules:
                found.append(self._pool(module, inputs[0] if self.reads_inputs else output))

        return read

    def _pool(self, module: nn.Module, output: Any) -> Tensor:
        if not isinstance(output, Tensor) or output.dim() < 2:
            raise InputError(
                f"A block ({type(module).__name__}) of {self.name} gives no tensor [B, ...] to "
                "read features from."
            )
        if output.dim() == 2:
            return output
        if output.dim() == 3:  # tokens [B, T, D]
            return output[:, 0] if self.reads_class_token else output.mean(dim=1)
        if _channels_are_last(module, output):
            return output.flatten(1, -2).mean(dim=1)
        return output.flatten(2).mean(dim=2)


def _transformer_norms(network: nn.Module) -> list[nn.Module] | None:
    """Return the norm after each block of a vision transformer; None for other networks."""
    blocks: Any = getattr(network, "blocks", None)
    joins_later = hasattr(network, "cls_attn_blocks") or hasattr(network, "blocks_token_only")
    if joins_later:  # XCiT and CaiT: the blocks see no class token
        return None
    if isinstance(blocks, nn.Sequential | nn.ModuleList) and hasattr(network, "cls_token"):
        firsts, final = [getattr(block, "norm1", None) for block in blocks], "norm"
    else:  # torchvision
        encoder: Any = getattr(network, "encoder", None)
        blocks = getattr(encoder, "layers", ())
        firsts, final = [getattr(block, "ln_1", None) for block in blocks], "ln"
        network = encoder
    norms = [*firsts[1:], getattr(network, final, None)]
    modules = [norm for norm in norms if isinstance(norm, nn.Module)]
    return modules if firsts and len(modules) == len(norms) else None


def _has_class_token(network: nn.Module) -> bool:
    """Say whether position 0 of the tokens is a class token."""
    token = getattr(network, "cls_token", getattr(network, "class_token", None))
    return isinstance(token, Tensor)


def _blocks(module: nn.Module) -> list[nn.Module]:
    """Return the blocks inside a module, in network order.

    Stages are opened, residual blocks are not, although both may hold lists: what a stage lists
    are blocks of their own class, what a residual block lists are triples at most.
    """
    found: list[nn.Module] = []
    for child in module.children():
        inside = _blocks(child)
        is_element = isinstance(module, _LISTS) and not _is_norm(child) and norm_layers(child)
        if is_element and (not inside or (not isinstance(child, _LISTS) and _are_lists(inside))):
            inside = [child]
        found += inside
    return found


def _are_lists(modules: list[nn.Module]) -> bool:
    return all(isinstance(module, _LISTS) for module in modules)


def _is_norm(module: nn.Module) -> bool:
    return list(norm_layers(module)) == [""]


def _channels_are_last(block: nn.Module, output: Tensor) -> bool:
    """Say whether a map is ``[B, H, W, C]``, judging by the widths inside the block."""
    layers = [m for m in block.modules() if isinstance(m, nn.LayerNorm | nn.Linear)]
    widths = {m.weight.shape[0] for m in layers if isinstance(m.weight, Tensor)}
    convolves = any(isinstance(m, nn.Conv2d) for m in block.modules())
    return output.shape[-1] in widths and (output.shape[1] not in widths or not convolves)
