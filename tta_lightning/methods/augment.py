"""One random view of a batch of images, which CoTTA, RoTTA and ROID learn from."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from tta_lightning.functional import wide

Padding = Literal["edge", "reflect"]
SEED_STRIDE = 1_000_003  # between the seeds of two steps; seeds of methods are below it


def generator_of_step(seed: int, step: int, device: torch.device) -> torch.Generator:
    """Make the random numbers of a step, the same whenever it is repeated on the same device.

    Args:
        seed: Of the method, below :data:`SEED_STRIDE`.
        step: How many there were since the last reset.
        device: Where the numbers are drawn.
    """
    return torch.Generator(device).manual_seed(seed + SEED_STRIDE * step)


def augment(
    images: Tensor,
    generator: torch.Generator,
    padding: Padding = "edge",
    blur_and_noise: bool = True,
) -> Tensor:
    """Draw one augmented view of a batch, as CoTTA's published code for CIFAR does.

    In this order: brightness x 0.6 to 1.4, contrast x 0.7 to 1.3, saturation x 0.5 to 1.5, hue
    -0.06 to 0.06 turns and gamma 0.7 to 1.3, shuffled; half the side of padding; rotation by
    up to 15 degrees, shift by up to 1/16 of the padded side, scale 0.9 to 1.1; Gaussian blur with 5
    taps and a deviation of 0.001 to 0.5 px; centre crop; horizontal flip with probability 0.5;
    Gaussian noise of deviation 0.005. Computed in float32 at least, also under autocast: in half
    precision the grid of the rotation is too coarse, and pixels of padded images come out as NaN.

    Args:
        images: ``[B, 3, H, W]`` in [0, 1]; other values are clipped.
        generator: On the device of the images.
        padding: Repeat the ``edge`` of the images, or ``reflect`` them.
        blur_and_noise: Take these two steps.

    Returns:
        A view ``[B, 3, H, W]`` in [0, 1], of the images' dtype. All images of the batch share the
        numbers that were drawn; the noise alone is each pixel's own.
    """
    with torch.autocast(images.device.type, enabled=False):
        return _view(wide(images), generator, padding, blur_and_noise).to(images.dtype)


def _view(
    images: Tensor, generator: torch.Generator, padding: Padding, blur_and_noise: bool
) -> Tensor:
    """Draw a view of images that are not in half precision."""
    drawn = torch.rand(16, generator=generator, device=generator.device).tolist()
    height, width = images.shape[-2:]
    view = _jitter(images.clamp(0, 1), shuffle=drawn[:5], strength=drawn[5:10])
    view = F.pad(view, [width // 2, height // 2], padding_mode=padding)
    angle, right, down, scale, deviation, flip = drawn[10:]
    view = F.affine(
        view,
        angle=_between(-15, 15, angle),
        translate=[
            round(_between(-1, 1, right) * view.shape[-1] / 16),
            round(_between(-1, 1, down) * view.shape[-2] / 16),
        ],
        scale=_between(0.9, 1.1, scale),
        shear=[0.0, 0.0],
        interpolation=InterpolationMode.BILINEAR,
    )
    if blur_and_noise:
        view = F.gaussian_blur(view, [5, 5], [_between(0.001, 0.5, deviation)] * 2)
    view = F.center_crop(view, [height, width])
    if flip < 0.5:
        view = F.horizontal_flip(view)
    if not blur_and_noise:
        return torch.clamp(view, 0, 1)
    noise = torch.randn(
        view.shape, generator=generator, device=generator.device, dtype=images.dtype
    )
    return torch.clamp(view + 0.005 * noise, 0, 1)


def _jitter(images: Tensor, shuffle: list[float], strength: list[float]) -> Tensor:
    """Change the colours in five ways, one after the other in the order of ``shuffle``."""
    ways = [
        lambda view: F.adjust_brightness(view, _between(0.6, 1.4, strength[0])),
        lambda view: F.adjust_contrast(view, _between(0.7, 1.3, strength[1])),
        lambda view: F.adjust_saturation(view, _between(0.5, 1.5, strength[2])),
        lambda view: F.adjust_hue(view, _between(-0.06, 0.06, strength[3])),
        lambda view: F.adjust_gamma(view, _between(0.7, 1.3, strength[4])),
    ]
    for place in sorted(range(len(ways)), key=shuffle.__getitem__):
        images = ways[place](images)
    return images


def _between(low: float, high: float, drawn: float) -> float:
    """Map a number drawn from [0, 1) to [low, high)."""
    return low + (high - low) * drawn
