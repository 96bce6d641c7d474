"""A network that carries its own normalisation constants and knows where it came from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tta_lightning.errors import InputError


@dataclass(frozen=True)
class ModelInfo:
    """What is known about a network besides its weights.

    Attributes:
        name: Where the network comes from, e.g. ``"timm:resnet50_gn.a1h_in1k"``,
            ``"package:efficientnet_lite0"`` or a class path.
        num_classes: Number of logits, or None when unknown.
        class_names: One name per logit (WordNet ids for ImageNet-1k models), or None.
        input_size: Side in pixels of the images the network was made for, or None when unknown.
        interpolation: How images were resized for it, ``"bilinear"`` or ``"bicubic"``.
        crop_pct: Side of the centre crop as a fraction of the resized image's side.
        mean: Per-channel mean that is subtracted, for images in [0, 1].
        std: Per-channel standard deviation that is divided by, for images in [0, 1].
        spec: The mapping from which ``load_model`` builds the network again, plain Python values
            only. None for a module that was handed over as an object.
    """

    name: str
    num_classes: int | None = None
    class_names: tuple[str, ...] | None = None
    input_size: int | None = None
    interpolation: str = "bilinear"
    crop_pct: float = 1.0
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    spec: Mapping[str, Any] | None = None


class Classifier(nn.Module):
    """Normalise images, then classify them with the wrapped network.

    Args:
        network: Module from normalised images ``[B, 3, H, W]`` to logits ``[B, C]``.
        info: Facts about the network. Its ``mean`` and ``std`` become buffers of this module.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, info: ModelInfo) -> None:
        super().__init__()
        self.network = network
        self.info = info
        self.register_buffer("mean", torch.tensor(info.mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(info.std).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits ``[B, C]`` of float images ``[B, 3, H, W]`` in [0, 1].

        Raises:
            InputError: The images have another shape or are not floating point.
        """
        if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise InputError(
                f"The network got images of shape {list(images.shape)} and type {images.dtype}; it "
                "expects floating-point images [B, 3, H, W] in [0, 1]. Convert 8-bit images with "
                "`images.float() / 255` and grey ones with `images.expand(-1, 3, -1, -1)`."
            )
        logits: Tensor = self.network((images - self.mean) / self.std)
        return logits


def class_path(module: nn.Module) -> str:
    """Return the dotted path of a module's class."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def describe(module: nn.Module) -> ModelInfo:
    """Return what is known about a network.

    For a module that says so itself (`Classifier`, `BYOLHeads`) that is its ``info``. Of any other
    only the class is known: it is taken to need no normalisation (mean 0, standard deviation 1),
    everything else is None.
    """
    module = getattr(module, "_orig_mod", module)  # what torch.compile was given
    info = getattr(module, "info", None)
    if isinstance(info, ModelInfo):
        return info
    return ModelInfo(name=class_path(module))


def weights_hash(module: nn.Module) -> str:
    """Compute the SHA-256 of a module's weights as 64 hexadecimal digits.

    Covers every tensor of the state dict, in the order of its name: name, type, shape and bytes.
    The device does not matter. Entries that are no tensors (a module's extra state) are not
    weights and stay out.
    """
    module = getattr(module, "_orig_mod", module)  # what torch.compile was given
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        if not isinstance(value, Tensor):
            continue
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        # numpy has no bfloat16, so the bytes are read as uint8; a scalar needs a dimension first
        flat = value.detach().cpu().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
