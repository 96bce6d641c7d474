"""A small convolutional network for images of digit or CIFAR size."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from tta_lightning.errors import InputError, unknown_name

GROUPS = 8  # of every GroupNorm layer


class SmallConvNet(nn.Module):
    """Six 3x3 convolutions, each followed by a norm and a ReLU, and a linear head.

    The widths are w, w, 2w, 2w, 4w, 4w. The second convolution of each pair halves the image's
    side, so 32 px become 4 px before the global average pool.

    Args:
        num_classes: Number of logits C.
        norm: ``"batch"`` for BatchNorm, ``"group"`` for GroupNorm with 8 groups.
        width: Channels w of the first two convolutions; with GroupNorm a multiple of 8.
        in_channels: Channels of the images.

    Raises:
        InputError: ``norm`` is unknown or ``width`` does not suit it.
    """

    def __init__(
        self,
        num_classes: int = 10,
        norm: Literal["batch", "group"] = "batch",
        width: int = 32,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        if norm not in ("batch", "group"):
            raise unknown_name("norm of SmallConvNet", norm, ("batch", "group"))
        if width < 1 or (norm == "group" and width % GROUPS):
            raise InputError(
                f"SmallConvNet got width {width}; it expects a positive number, and a multiple of "
                f"{GROUPS} with GroupNorm. Take for example width=32."
            )
        widths = [in_channels, width, width, 2 * width, 2 * width, 4 * width, 4 * width]
        self.blocks = nn.Sequential(
            *(_block(widths[i], widths[i + 1], norm=norm, stride=1 + i % 2) for i in range(6))
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(4 * width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits ``[B, C]`` of images ``[B, in_channels, H, W]``."""
        features = self.pool(self.blocks(images)).flatten(1)
        logits: Tensor = self.head(features)
        return logits


def _block(in_channels: int, out_channels: int, *, norm: str, stride: int) -> nn.Sequential:
    """Build convolution, norm and ReLU; the norm's shift makes a convolution bias needless."""
    conv = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
    if norm == "batch":
        return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU())
    return nn.Sequential(conv, nn.GroupNorm(GROUPS, out_channels), nn.ReLU())
