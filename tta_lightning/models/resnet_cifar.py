"""The ResNets for CIFAR of the original paper, with batch normalisation."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from tta_lightning.errors import InputError

WIDTHS = (16, 32, 64)  # channels of the three stages


class CIFARResNet(nn.Module):
    """ResNet-20, 32, 44, 56, 110, ... for 32 px images.

    He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016,
    https://arxiv.org/abs/1512.03385, section 4.2: a 3x3 convolution, three stages of
    ``(depth - 2) / 6`` blocks with 16, 32 and 64 channels, the first block of the second and of the
    third stage halving the side, and an average before the linear map. Shortcuts have no parameters
    (option A): every second pixel, and zeros for the channels that are new, half of them on each
    side. Names and this placing of the zeros are those of a widely used set of trained weights
    (``resnet20-12fca82f.th`` and its kin).

    Args:
        depth: ``6 n + 2`` layers.
        num_classes: Number of logits C.

    Raises:
        InputError: There is no network of this depth.
    """

    def __init__(self, depth: int = 20, num_classes: int = 10) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if blocks < 1 or rest:
            raise InputError(
                f"CIFARResNet has 6 n + 2 layers, got depth {depth}. Take 20, 32, 44, 56 or 110."
            )
        self.conv1 = nn.Conv2d(3, WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.layer1 = _stage(WIDTHS[0], WIDTHS[0], blocks)
        self.layer2 = _stage(WIDTHS[0], WIDTHS[1], blocks)
        self.layer3 = _stage(WIDTHS[1], WIDTHS[2], blocks)
        self.linear = nn.Linear(WIDTHS[2], num_classes)
        self.apply(_initialise)

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits ``[B, C]`` of images ``[B, 3, H, W]``."""
        features = self.bn1(self.conv1(images)).relu()
        features = self.layer3(self.layer2(self.layer1(features)))
        logits: Tensor = self.linear(features.mean(dim=(2, 3)))
        return logits


class _Block(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.stride, self.new = after // before, after - before
        self.conv1 = nn.Conv2d(before, after, 3, stride=self.stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        side = self.new // 2
        result: Tensor = (inner + F.pad(shortcut, (0, 0, 0, 0, side, side))).relu()
        return result


def _stage(before: int, after: int, blocks: int) -> nn.Sequential:
    first = _Block(before, after)
    return nn.Sequential(first, *(_Block(after, after) for _ in range(blocks - 1)))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.kaiming_normal_(module.weight)
