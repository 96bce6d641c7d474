"""The augmentations of MT3, on tensors: views for self-supervision, shifts that a task shares.

Bartler et al., "MT3: Meta Test-Time Training for Self-Supervised Test-Time Adaption", AISTATS 2022,
https://arxiv.org/abs/2103.16201, with the semantics of the published TensorFlow code, which differ
from torchvision's: brightness is added, contrast is scaled around the mean of each channel, and
saturation and hue are changed in HSV. All random numbers come from a generator on the CPU, so that
views are the same on every device and in every precision. They are computed in the images' own
precision, also under autocast: in bfloat16 the noise of a task would be rounded away.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2.functional import gaussian_blur

from tta_lightning.errors import InputError

GREY = (0.2989, 0.587, 0.114)  # weights of red, green and blue
JITTER, DROP_COLOUR = 0.8, 0.2  # probabilities
STRENGTH, HUE = 0.16, 0.04  # largest change of brightness, contrast and saturation; of the hue
BLUR, BRIGHTNESS, NOISE = 0.2, 0.2, 0.02  # of a task: probability, largest change, deviation


@dataclass(frozen=True)
class ViewOptions:
    """How the views of MT3 are drawn.

    Attributes:
        crop: Smallest and largest side of the crop in px. None for 5/8 of the image's side up to
            one pixel less than it: the published 20 to 31 px for images of 32 px.
        flips: Turn half of the views, and half of the tasks, upside down, and half of the tasks
            left to right, as published. Not for digits and letters.

    Raises:
        InputError: ``crop`` is not two whole numbers from 1 on, the smaller one first.
    """

    crop: tuple[int, int] | None = None
    flips: bool = True

    def __post_init__(self) -> None:
        if self.crop is None:
            return
        sides = self.crop if isinstance(self.crop, list | tuple) else (self.crop,)
        is_pair = len(sides) == 2 and all(isinstance(side, int) for side in sides)
        if not is_pair or not 1 <= sides[0] <= sides[1]:
            raise InputError(
                f"crop = {self.crop} is out of range: expected the smallest and the largest side "
                "of a square in px, such as [20, 31]."
            )
        object.__setattr__(self, "crop", (sides[0], sides[1]))

    def sides(self, images: Tensor) -> tuple[int, int]:
        """Return the smallest and the largest side of a crop of images ``[..., H, W]``, in px.

        Raises:
            InputError: The images are too small.
        """
        side = min(images.shape[-2:])
        low, high = (5 * side // 8, side - 1) if self.crop is None else self.crop
        if not 1 <= low <= high <= side:
            raise InputError(
                f"The views are crops of {low} to {high} px, but the images have "
                f"{images.shape[-2]} x {images.shape[-1]} px. Give larger images, or another "
                "`crop`."
            )
        return low, high


def generator(*numbers: int) -> torch.Generator:
    """Make a generator on the CPU from any numbers from 0 on, such as a seed and an index."""
    # the length too: SeedSequence takes trailing zeros for nothing
    state = np.random.SeedSequence((len(numbers), *numbers)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]) >> 1)


def ssl_views(images: Tensor, draws: torch.Generator, options: ViewOptions) -> Tensor:
    """Draw one view of each image for self-supervision, ``A_ssl`` of MT3.

    A random square, resized bilinearly to the image's size; upside down with probability 0.5; with
    probability 0.8 brightness + U(-0.16, 0.16), contrast and saturation x U(0.84, 1.16), hue +
    U(-0.04, 0.04) turns, clipped; grey with probability 0.2. No flip from left to right.

    Args:
        images: ``[V, 3, H, W]`` in [0, 1].
        draws: Random numbers; 10 for each view.
        options: What may vary.

    Returns:
        ``[V, 3, H, W]`` in [0, 1].

    Raises:
        InputError: The images are smaller than the crop.
    """
    low, high = options.sides(images)
    drawn = _uniform((len(images), 10), draws).to(images.device, torch.float64)
    side = low + (drawn[:, 0] * (high + 1 - low)).floor()
    top, left = (
        (drawn[:, i] * (length - side + 1)).floor()
        for i, length in ((1, images.shape[-2]), (2, images.shape[-1]))
    )
    views = crop_and_resize(images, top, left, side)
    if options.flips:
        views = torch.where(_each(drawn[:, 3] < 0.5), views.flip(2), views)
    signed = (2 * drawn[:, 5:9] - 1).to(views.dtype)
    jittered = jitter(
        views,
        brightness=STRENGTH * signed[:, 0],
        contrast=1 + STRENGTH * signed[:, 1],
        saturation=1 + STRENGTH * signed[:, 2],
        hue=HUE * signed[:, 3],
    )
    views = torch.where(_each(drawn[:, 4] < JITTER), jittered, views)
    return torch.where(_each(drawn[:, 9] < DROP_COLOUR), grey(views), views)


def supervised_views(images: Tensor, draws: torch.Generator, padding: int = 2) -> Tensor:
    """Shift each image by up to ``padding`` px, zeros coming in: ``A_sup`` of MT3.

    Args:
        images: ``[K, 3, H, W]``.
        draws: Random numbers.
        padding: Zeros on each side, before a random crop of the image's size.

    Returns:
        ``[K, 3, H, W]``.
    """
    height, width = images.shape[-2:]
    padded = F.pad(images, (padding,) * 4)
    corners = torch.randint(0, 2 * padding + 1, (len(images), 2), generator=draws).tolist()
    return torch.stack(
        [
            image[:, top : top + height, left : left + width]
            for image, (top, left) in zip(padded, corners, strict=True)
        ]
    )


def shift_together(images: Tensor, draws: torch.Generator, options: ViewOptions) -> Tensor:
    """Give all images of a task one small shift, ``A_task`` of MT3.

    One draw for all: upside down with probability 0.5; left to right with probability 0.5; Gaussian
    blur (3 px, deviation 1) with probability 0.2; brightness + U(-0.2, 0.2); noise of a deviation
    drawn from U(0, 0.02), whose values are each pixel's own; clipped.

    Args:
        images: ``[..., 3, H, W]`` in [0, 1]: every view of every image of a task.
        draws: Random numbers.
        options: What may vary.

    Returns:
        Images in [0, 1], of the same shape.
    """
    upside_down, mirrored, blurred, brightness, deviation = _uniform((5,), draws).tolist()
    if options.flips and upside_down < 0.5:
        images = images.flip(-2)
    if options.flips and mirrored < 0.5:
        images = images.flip(-1)
    if blurred < BLUR:
        shape = images.shape
        with torch.autocast(images.device.type, enabled=False):
            images = gaussian_blur(images.reshape(-1, *shape[-3:]), [3, 3], [1.0, 1.0]).view(shape)
    noise = torch.randn(images.shape, generator=draws, dtype=torch.float32).to(images)
    images = images + BRIGHTNESS * (2 * brightness - 1) + NOISE * deviation * noise
    return images.clamp(0, 1)


def crop_and_resize(images: Tensor, top: Tensor, left: Tensor, side: Tensor) -> Tensor:
    """Cut a square out of each image and resize it bilinearly to the image's size.

    As ``interpolate(mode="bilinear", align_corners=False)`` of each crop, but for all at once.

    Args:
        images: ``[V, C, H, W]``.
        top: ``[V]``, the first row of the square in px.
        left: ``[V]``, its first column.
        side: ``[V]``, its side.

    Returns:
        ``[V, C, H, W]``.
    """
    rows = _interpolation(images.shape[-2], top, side).to(images.dtype)
    columns = _interpolation(images.shape[-1], left, side).to(images.dtype)
    with torch.autocast(images.device.type, enabled=False):
        return rows[:, None] @ images @ columns[:, None].transpose(2, 3)


def jitter(
    images: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor, hue: Tensor
) -> Tensor:
    """Change the colours of each image, in the order of the arguments, and clip to [0, 1].

    Args:
        images: ``[V, 3, H, W]`` in [0, 1].
        brightness: ``[V]``, added.
        contrast: ``[V]``, factor of the distance to the mean of the channel over the image.
        saturation: ``[V]``, factor of the S of HSV.
        hue: ``[V]``, added to the H of HSV, in turns.

    Returns:
        ``[V, 3, H, W]`` in [0, 1].
    """
    images = images + _each(brightness)
    mean = images.mean(dim=(2, 3), keepdim=True)
    images = (images - mean) * _each(contrast) + mean
    value, smallest = images.amax(dim=1), images.amin(dim=1)  # [V, H, W]
    turns = _hue(images, value, smallest) + hue.view(-1, 1, 1)
    positive = torch.where(value > 0, value, torch.ones_like(value))
    share = torch.where(value > 0, (value - smallest) / positive, torch.zeros_like(value))
    smallest = value * (1 - (share * saturation.view(-1, 1, 1)).clamp(0, 1))
    channels = [_channel(turns, offset) for offset in (5, 3, 1)]
    return (value[:, None] - (value - smallest)[:, None] * torch.stack(channels, 1)).clamp(0, 1)


def grey(images: Tensor) -> Tensor:
    """Give all channels of images ``[V, 3, H, W]`` their luminance."""
    weights = torch.tensor(GREY, dtype=images.dtype, device=images.device).view(1, 3, 1, 1)
    return (images * weights).sum(dim=1, keepdim=True).expand_as(images)


def _uniform(shape: tuple[int, ...], draws: torch.Generator) -> Tensor:
    """Draw numbers from [0, 1), the same ones whatever torch's default type is."""
    return torch.rand(shape, generator=draws, dtype=torch.float32)


def _each(values: Tensor) -> Tensor:
    """Line ``[V]`` up with images ``[V, 3, H, W]``."""
    return values.view(-1, 1, 1, 1)


def _interpolation(length: int, start: Tensor, side: Tensor) -> Tensor:
    """Build the matrices ``[V, length, length]`` that resize ``side`` px from ``start`` on."""
    places = torch.arange(length, device=start.device, dtype=torch.float64)
    source = ((places + 0.5) * (side / length)[:, None] - 0.5).clamp_min(0)
    last = side[:, None] - 1
    below = torch.minimum(source.floor(), last)
    share = torch.where(below < last, source - below, 0)
    matrix = torch.zeros(len(start), length, length, dtype=torch.float64, device=start.device)
    for weights, place in ((1 - share, below), (share, torch.minimum(below + 1, last))):
        matrix.scatter_add_(2, (start[:, None] + place).long()[..., None], weights[..., None])
    return matrix


def _hue(images: Tensor, value: Tensor, smallest: Tensor) -> Tensor:
    """Return the hue of images ``[V, 3, H, W]`` in turns, ``[V, H, W]``; 0 for grey."""
    red, green, blue = images.unbind(dim=1)
    spread = value - smallest
    divisor = torch.where(spread > 0, spread, torch.ones_like(spread)) * 6
    turns = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(
            value == green, (blue - red) / divisor + 1 / 3, (red - green) / divisor + 2 / 3
        ),
    )
    return torch.where(spread > 0, turns, torch.zeros_like(turns))


def _channel(turns: Tensor, offset: int) -> Tensor:
    """Say how far a channel lies below the largest, as a share of the spread, in [0, 1]."""
    k = (offset + 6 * turns) % 6
    return torch.minimum(k, 4 - k).clamp(0, 1)
