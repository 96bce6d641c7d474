"""Random views of one image for MEMO: a crop, a flip, and a mixture of chains of operations.

Hendrycks et al., "AugMix: A Simple Data Processing Method to Improve Robustness and Uncertainty",
ICLR 2020, https://arxiv.org/abs/1912.02781, at the severity that MEMO's published code uses it. All
random numbers are drawn on the host, so that they are the same on every device; all views of an
image are computed together. Operations work on 8 bits and equal Pillow's, pixel by pixel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import grid_sample
from torchvision.transforms.v2 import functional as F

from tta_lightning.functional import wide

Crop: TypeAlias = Literal["pad", "resized"]

OPERATIONS = (
    "autocontrast",
    "equalize",
    "rotate",
    "solarize",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "posterize",
)
_GEOMETRIC = tuple(n for n in OPERATIONS if n.startswith(("rotate", "shear", "translate")))
_CHAINS, _LONGEST = 3, 3  # of a view; operations in a chain
_LEVELS = (0.1, 1.0)  # of 10, the strongest
_DEGREES, _SHEAR, _INVERTED = 30, 0.3, 256  # at level 10; translate shifts by a third of the side
_HIGH_BITS = 0xF0  # posterize keeps 4 - int(0.4 level) = 4 bits at these levels
_FILL = 128  # what comes in at the edges
_ROUNDING = 1e-9  # so that 99.9999999999 is not cut down to 99
_PADDING = 8  # one px of zeros on each edge for so many px of the side: 4 for 32
_AREA, _RATIO, _ATTEMPTS = (0.08, 1.0), (3 / 4, 4 / 3), 10  # of a resized crop


@dataclass(frozen=True)
class Drawn:
    """The random numbers of B views.

    Attributes:
        boxes: ``[B, 4]`` int, top, left, height and width of the crop in px; of ``pad``, in the
            padded image.
        flips: ``[B]`` bool, left to right.
        lengths: ``[B, 3]`` int, of the chains, 1 to 3.
        kinds: ``[B, 3, 3]`` int, positions in ``OPERATIONS``, the last axis along the chain.
        levels: ``[B, 3, 3]``, in [0.1, 1).
        signs: ``[B, 3, 3]``, 1 or -1.
        weights: ``[B, 3]``, of the chains; their sum is 1.
        shares: ``[B]`` in [0, 1], of the crop in the view.
    """

    boxes: NDArray[np.int64]
    flips: NDArray[np.bool_]
    lengths: NDArray[np.int64]
    kinds: NDArray[np.int64]
    levels: NDArray[np.float64]
    signs: NDArray[np.int64]
    weights: NDArray[np.float64]
    shares: NDArray[np.float64]


def augmix(image: Tensor, count: int, draws: np.random.Generator, crop: Crop = "pad") -> Tensor:
    """Draw views of an image.

    A random crop, flipped with probability 0.5, is ``x``. Three chains of 1 to 3 operations each,
    drawn from ``OPERATIONS``, start from it. The view is ``m x + (1 - m) sum_i w_i chain_i(x)``
    with ``m`` from Beta(1, 1) and ``w`` from Dirichlet(1, 1, 1). An operation's level is drawn from
    U(0.1, 1), 10 being the strongest one: rotation by at most 3 degrees, shear by 0.03 and shift by
    side / 30, where angle and shift are rounded to whole numbers towards zero.

    Args:
        image: ``[3, H, W]`` in [0, 1]; quantised to 8 bits.
        count: B.
        draws: Random numbers.
        crop: ``pad`` shifts by up to an eighth of the side, zeros coming in (4 px of 32);
            ``resized`` takes 8 to 100 % of the area, at a ratio of 3/4 to 4/3, to the image's size.

    Returns:
        ``[B, 3, H, W]`` in [0, 1], of the image's dtype.
    """
    height, width = image.shape[-2:]
    drawn = draw(count, height, width, draws, crop)
    pixels = (wide(image).clamp(0, 1) * 255).round().to(torch.uint8)
    cropped = _cropped(pixels, drawn, crop)
    return _mixed(cropped, drawn, wide(image).dtype).to(image.dtype)


def draw(count: int, height: int, width: int, draws: np.random.Generator, crop: Crop) -> Drawn:
    """Draw the random numbers of ``count`` views of an image of ``height`` x ``width`` px."""
    each = (count, _CHAINS, _LONGEST)
    boxes = _shifted if crop == "pad" else _resized
    return Drawn(
        boxes=boxes(count, height, width, draws),
        flips=draws.random(count) < 0.5,
        lengths=draws.integers(1, _LONGEST + 1, (count, _CHAINS)),
        kinds=draws.integers(0, len(OPERATIONS), each),
        levels=draws.uniform(*_LEVELS, each),
        signs=2 * draws.integers(0, 2, each) - 1,
        weights=draws.dirichlet(np.ones(_CHAINS), count),
        shares=draws.beta(1.0, 1.0, count),
    )


def _shifted(count: int, height: int, width: int, draws: np.random.Generator) -> NDArray[np.int64]:
    """Draw boxes of the image's size in the padded image."""
    top = draws.integers(0, 2 * (height // _PADDING) + 1, count)
    left = draws.integers(0, 2 * (width // _PADDING) + 1, count)
    return np.stack([top, left, np.full(count, height), np.full(count, width)], axis=1)


def _resized(count: int, height: int, width: int, draws: np.random.Generator) -> NDArray[np.int64]:
    """Draw boxes by area and ratio, the first of ten attempts that fits; else a central one."""
    area = height * width * draws.uniform(*_AREA, (count, _ATTEMPTS))
    ratio = np.exp(draws.uniform(math.log(_RATIO[0]), math.log(_RATIO[1]), (count, _ATTEMPTS)))
    wides, highs = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    place = draws.random((2, count))
    fits = (wides >= 1) & (wides <= width) & (highs >= 1) & (highs <= height)
    first = fits.argmax(axis=1)[:, None]
    some = fits.any(axis=1)
    largest = min(height, round(width / _RATIO[0])), min(width, round(height * _RATIO[1]))
    high = np.where(some, np.take_along_axis(highs, first, 1)[:, 0], largest[0])
    wide_ = np.where(some, np.take_along_axis(wides, first, 1)[:, 0], largest[1])
    place = np.where(some, place, 0.5)
    top = np.floor(place[0] * (height - high + some))
    left = np.floor(place[1] * (width - wide_ + some))
    return np.stack([top, left, high, wide_], axis=1).astype(np.int64)


def _cropped(pixels: Tensor, drawn: Drawn, crop: Crop) -> Tensor:
    """Cut the boxes out of an image ``[C, H, W]``: ``[B, C, H, W]``, all uint8."""
    height, width = pixels.shape[-2:]
    if crop == "pad":
        padded = F.pad(pixels, [width // _PADDING, height // _PADDING])
        boxes = torch.from_numpy(drawn.boxes).to(pixels.device)
        rows = boxes[:, 0, None] + torch.arange(height, device=pixels.device)
        columns = boxes[:, 1, None] + torch.arange(width, device=pixels.device)
        parts = padded[:, rows[:, :, None], columns[:, None, :]].transpose(0, 1)
    else:
        boxes = drawn.boxes.tolist()
        parts = torch.stack([F.resized_crop(pixels, *box, [height, width]) for box in boxes])
    flips = torch.from_numpy(drawn.flips).to(pixels.device).view(-1, 1, 1, 1)
    return torch.where(flips, parts.flip(-1), parts)


def _mixed(cropped: Tensor, drawn: Drawn, dtype: torch.dtype) -> Tensor:
    """Mix crops ``[B, C, H, W]`` uint8 with what their chains make of them, in [0, 1]."""
    chains = cropped.repeat_interleave(_CHAINS, dim=0)  # [3B, C, H, W]
    lengths = drawn.lengths.reshape(-1)
    kinds, levels, signs = (
        numbers.reshape(-1, _LONGEST) for numbers in (drawn.kinds, drawn.levels, drawn.signs)
    )
    for place in range(_LONGEST):
        alive = lengths > place
        for kind, name in enumerate(OPERATIONS):
            rows = np.flatnonzero(alive & (kinds[:, place] == kind))
            if len(rows):
                where = torch.from_numpy(rows).to(chains.device)
                made = _operate(name, chains[where], levels[rows, place], signs[rows, place])
                chains[where] = made
    weights = torch.from_numpy(drawn.weights).to(chains.device, dtype).view(-1, _CHAINS, 1, 1, 1)
    shares = torch.from_numpy(drawn.shares).to(chains.device, dtype).view(-1, 1, 1, 1)
    mixture: Tensor = (weights * chains.unflatten(0, (-1, _CHAINS)).to(dtype)).sum(dim=1)
    return (shares * cropped.to(dtype) + (1 - shares) * mixture) / 255


def _operate(
    name: str, images: Tensor, levels: NDArray[np.float64], signs: NDArray[np.int64]
) -> Tensor:
    """Apply one operation to images ``[N, C, H, W]`` uint8, each at its own level and sign."""
    if name in _GEOMETRIC:
        size = images.shape[-2:]
        pairs = zip(levels.tolist(), signs.tolist(), strict=True)
        maps = [_matrix(name, level, sign, *size) for level, sign in pairs]
        return _resampled(images, torch.tensor(maps, dtype=torch.float64, device=images.device))
    if name == "autocontrast":
        return _autocontrast(images)
    if name == "equalize":
        made: Tensor = F.equalize(images)
        return made
    if name == "posterize":
        return images & _HIGH_BITS
    values = 256 - (levels * _INVERTED / 10).astype(np.int64)
    threshold = torch.from_numpy(values).to(images.device).view(-1, 1, 1, 1)
    return torch.where(images < threshold, images, 255 - images)


def _matrix(name: str, level: float, sign: int, height: int, width: int) -> list[list[float]]:
    """Say where each pixel comes from: places ``(x, y, 1)`` of the result to those of the image."""
    if name == "rotate":
        angle = math.radians(sign * int(level * _DEGREES / 10))
        cos, sin = math.cos(angle), math.sin(angle)
        x, y = width / 2, height / 2
        return [[cos, -sin, x - cos * x + sin * y], [sin, cos, y - sin * x - cos * y]]
    shear, axis = sign * level * _SHEAR / 10, name[-1]
    if name.startswith("shear"):
        return [[1, shear, 0], [0, 1, 0]] if axis == "x" else [[1, 0, 0], [shear, 1, 0]]
    side = width if axis == "x" else height
    shift = sign * int(level * (side / 3) / 10)
    return [[1, 0, shift], [0, 1, 0]] if axis == "x" else [[1, 0, 0], [0, 1, shift]]


def _resampled(images: Tensor, maps: Tensor) -> Tensor:
    """Read images ``[N, C, H, W]`` uint8 bilinearly at the places that ``maps [N, 2, 3]`` give.

    In float64, so that whole numbers stay what they are.
    """
    height, width = images.shape[-2:]
    size = torch.tensor([width, height], dtype=torch.float64, device=images.device)
    across = torch.arange(width, dtype=torch.float64, device=images.device) + 0.5
    down = torch.arange(height, dtype=torch.float64, device=images.device) + 0.5
    y, x = torch.meshgrid(down, across, indexing="ij")
    places = torch.stack([x, y, torch.ones_like(x)], dim=-1)  # [H, W, 3]
    source = torch.einsum("hwk,nak->nhwa", places, maps)
    inside = ((source >= 0) & (source < size)).all(dim=-1)[:, None]
    grid = 2 * source / size - 1
    read = grid_sample(images.double(), grid, padding_mode="border", align_corners=False)
    return torch.where(inside, (read + _ROUNDING).floor(), _FILL).to(torch.uint8)


def _autocontrast(images: Tensor) -> Tensor:
    """Stretch each channel of images ``[N, C, H, W]`` uint8 to 0 to 255; flat ones stay."""
    values = images.double()
    low, high = values.amin(dim=(2, 3), keepdim=True), values.amax(dim=(2, 3), keepdim=True)
    top = torch.full_like(low, 255)  # a tensor: torch multiplies a number by the reciprocal
    scale = top / (high - low).clamp_min(1)
    stretched = (values * scale - low * scale).clamp(0, 255).to(torch.uint8)
    return torch.where(high > low, stretched, images)
