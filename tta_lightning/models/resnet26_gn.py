"""ResNet-26 with group normalisation, the network of test-time training on CIFAR-10."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tta_lightning.errors import InputError

UNITS = 4  # of each of the three stages: 26 = 6 * 4 + 2 layers
HIDDEN = 256  # width of the layer before the head


class ResNet26GN(nn.Module):
    """Pre-activation ResNet-26 for 32 px images, group-normalised throughout.

    Bartler et al., "MT3: Meta Test-Time Training for Self-Supervised Test-Time Adaption", AISTATS
    2022, https://arxiv.org/abs/2103.16201: width 32, 16 groups, no normalisation of the images, a
    hidden layer of 256 before the head. Width 16 with 8 groups is the size of Sun et al.,
    "Test-Time Training with Self-Supervision for Generalization under Distribution Shifts", ICML
    2020, https://arxiv.org/abs/1909.13231. Three stages of four units have w, 2w and 4w channels;
    the first unit of the second and of the third halves the image's side. Shortcuts have no
    parameters: average pooling, and zeros for the channels that are new.

    Departs from the published code in: strided convolutions pad both sides by one pixel, where
    TensorFlow pads the lower right alone.

    Args:
        num_classes: Number of logits C.
        width: Channels w of the first stage.
        groups: Of every GroupNorm; divides ``width``.
        in_channels: Channels of the images.
        head_bias: Whether the head has a bias. In the paper's code all networks have one but the
            supervised baseline.

    Raises:
        InputError: ``groups`` does not divide ``width``.
    """

    def __init__(
        self,
        num_classes: int = 10,
        width: int = 32,
        groups: int = 16,
        in_channels: int = 3,
        head_bias: bool = True,
    ) -> None:
        super().__init__()
        if width < 1 or groups < 1 or width % groups:
            raise InputError(
                f"ResNet26GN got width {width} with {groups} groups; expected positive numbers, "
                "the groups dividing the width. Take for example width=16, groups=8."
            )
        self.stem = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        widths = [width] * (UNITS + 1) + [2 * width] * UNITS + [4 * width] * UNITS
        self.blocks = nn.Sequential(
            *(_Unit(widths[i], widths[i + 1], groups, first=i == 0) for i in range(3 * UNITS))
        )
        self.norm = nn.GroupNorm(groups, 4 * width, eps=1e-3)
        self.hidden = nn.Linear(4 * width, HIDDEN, bias=False)
        self.head = nn.Linear(HIDDEN, num_classes, bias=head_bias)
        self.apply(initialise)

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits ``[B, C]`` of images ``[B, in_channels, H, W]``.

        Raises:
            InputError: The sides of the images are no multiples of 4.
        """
        if images.shape[-1] % 4 or images.shape[-2] % 4 or 0 in images.shape[-2:]:
            raise InputError(
                f"ResNet26GN halves images twice, but these have {images.shape[-2]} x "
                f"{images.shape[-1]} px. Give sides that are multiples of 4; it was made for 32."
            )
        pooled = self.norm(self.blocks(self.stem(images))).relu().mean(dim=(2, 3))
        logits: Tensor = self.head(self.hidden(pooled).relu())
        return logits


class _Unit(nn.Module):
    """Norm, ReLU and convolution, twice, beside a shortcut."""

    def __init__(self, channels: int, out_channels: int, groups: int, *, first: bool) -> None:
        super().__init__()
        self.first = first
        self.new_channels = out_channels - channels
        stride = 2 if self.new_channels else 1
        self.norm1 = nn.GroupNorm(groups, channels, eps=1e-3)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, stride=stride, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-3)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)

    def forward(self, inputs: Tensor) -> Tensor:
        active = self.norm1(inputs).relu()
        residual: Tensor = self.conv2(self.norm2(self.conv1(active)).relu())
        shortcut = active if self.first else inputs
        if self.new_channels:
            half = self.new_channels // 2
            shortcut = nn.functional.avg_pool2d(shortcut, 2)
            shortcut = nn.functional.pad(shortcut, (0, 0, 0, 0, half, self.new_channels - half))
        return shortcut + residual


def initialise(module: nn.Module) -> None:
    """Set a layer to Glorot-uniform weights and zero biases, TensorFlow's defaults."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            torch.nn.init.zeros_(module.bias)
