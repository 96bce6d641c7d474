"""Corruptions that average neighbouring pixels.

Every corruption takes the image [H, W, 3] in [0, 1], the constants of one severity and the random
generator to draw from. It returns an image of the same shape; the caller clips it to [0, 1].
Lengths are in pixels. Scipy is imported where it is used: it is slow to load, and this module is
loaded whenever the command line starts.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tta_lightning.data.corruptions.tables import Level, Pixels

# Keeps an exact 8-bit value from falling one step when float32 arithmetic lands just below it.
ROUNDING = 1e-3


def smooth(x: Pixels, sigma: float) -> Pixels:
    """Blur with a Gaussian cut at four sigma, repeating the border pixels outwards.

    Args:
        x: Image [H, W, 3] or a single plane [H, W].
        sigma: Standard deviation, in pixels.

    Returns:
        The blurred image, same shape.
    """
    from scipy.ndimage import gaussian_filter

    blurred: Pixels = gaussian_filter(x, sigma, mode="nearest", truncate=4, axes=(0, 1))
    return blurred


def gaussian_blur(x: Pixels, level: Level, rng: np.random.Generator) -> Pixels:
    """Blur with a Gaussian; level = (sigma,)."""
    return smooth(x, level[0])


def defocus_blur(x: Pixels, level: Level, rng: np.random.Generator) -> Pixels:
    """Average over a disc with softened rim; level = (radius, softening sigma).

    The image is mirrored at its border, the border pixels themselves not repeated.
    """
    from scipy.signal import oaconvolve

    kernel = disc(level[0], level[1])
    reach = kernel.shape[0] // 2
    padded = np.pad(x, ((reach, reach), (reach, reach), (0, 0)), mode="reflect")
    blurred: Pixels = oaconvolve(padded, kernel[..., None], mode="valid", axes=(0, 1))
    return blurred


@lru_cache(maxsize=32)
def disc(radius: float, softening: float) -> Pixels:
    """Build the kernel of defocus_blur: a disc, softened by a Gaussian of 3 or 5 taps.

    Args:
        radius: Radius of the disc, in pixels.
        softening: Standard deviation of the Gaussian, in pixels. It has 3x3 taps up to a radius
            of 8 and 5x5 above, and mirrors the square that holds the disc at its border.

    Returns:
        Kernel [K, K], K odd; rows and columns of zeros are cut off. Its sum is 1 unless the disc
        touches the border of its square (radius 8 and 10): mirroring then adds up to 1.3 %,
        which the published images have as well.
    """
    from scipy.ndimage import correlate1d

    half = max(8, math.ceil(radius))
    taps = np.arange(-1, 2) if radius <= 8 else np.arange(-2, 3)
    y, x = np.mgrid[-half : half + 1, -half : half + 1]
    kernel = (x**2 + y**2 <= radius**2).astype(np.float64)
    kernel /= kernel.sum()
    weights = np.exp(-(taps**2) / (2 * softening**2))
    weights /= weights.sum()
    for axis in (0, 1):
        kernel = correlate1d(kernel, weights, axis=axis, mode="mirror")
    used = np.flatnonzero(kernel.max(axis=0) > 1e-12)
    kernel = kernel[used[0] : used[-1] + 1, used[0] : used[-1] + 1]
    trimmed: Pixels = kernel.astype(np.float32)
    return trimmed


def glass_blur(x: Pixels, level: Level, rng: np.random.Generator) -> Pixels:
    """Blur, scatter pixels over their neighbourhood, blur; level = (sigma, reach d, passes).

    A pass visits the rows and columns inside a margin d in descending order. Each visited pixel
    takes the present value of the one at an offset uniform in [-d, d) along each axis.
    """
    height, width = x.shape[:2]
    reach, passes = int(level[1]), int(level[2])
    rows = np.arange(height - reach, reach, -1)
    columns = np.arange(width - reach, reach, -1)
    visited = (rows[:, None] * width + columns).ravel()
    steps = rng.integers(-reach, reach, size=(2, passes, visited.size))
    sources = visited + steps[0] * width + steps[1]
    # One flat list of pixel numbers carries all passes, so the image is gathered only once.
    origin = list(range(height * width))
    for source_of_pass in sources.tolist():
        for pixel, source in zip(visited.tolist(), source_of_pass, strict=True):
            origin[pixel] = origin[source]
    eight_bit = np.floor(smooth(x, level[0]) * 255 + ROUNDING) / np.float32(255)
    scattered = eight_bit.reshape(-1, 3)[origin].reshape(x.shape)
    return smooth(scattered, level[0])


def motion_blur(x: Pixels, level: Level, rng: np.random.Generator) -> Pixels:
    """Smear along a line at an angle uniform in [-45°, 45°); level = (radius, sigma)."""
    return smear(x, int(level[0]), level[1], rng.uniform(-45, 45))


def smear(x: Pixels, radius: int, sigma: float, angle: float) -> Pixels:
    """Average along one direction with the falling half of a Gaussian.

    The output at a pixel is the weighted mean of the 2 radius + 1 pixels at distances
    0, 1, ..., 2 radius from it, rounded to whole pixels. Border pixels repeat outwards.

    Args:
        x: Image [H, W, 3] or a single plane [H, W].
        radius: Half the number of steps, in pixels.
        sigma: Standard deviation of the weights, in pixels.
        angle: Direction the pixels are taken from, in degrees clockwise from the right.

    Returns:
        The smeared image, same shape.
    """
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    weights = (weights / weights.sum()).astype(np.float32)
    down = np.ceil(steps * math.sin(math.radians(angle)) - 0.5).astype(int)
    right = np.ceil(steps * math.cos(math.radians(angle)) - 0.5).astype(int)
    top, left = -min(0, down.min()), -min(0, right.min())
    margins = [(top, max(0, down.max())), (left, max(0, right.max()))] + [(0, 0)] * (x.ndim - 2)
    padded = np.pad(x, margins, mode="edge")
    height, width = x.shape[:2]
    out = np.zeros_like(x)
    for weight, dy, dx in zip(weights, down + top, right + left, strict=True):
        out += weight * padded[dy : dy + height, dx : dx + width]
    return out


def zoom_blur(x: Pixels, level: Level, rng: np.random.Generator) -> Pixels:
    """Average the image and its zooms about the centre; level = (largest zoom, step).

    The zooms start at 1, so the image itself counts twice.
    """
    height, width = x.shape[:2]
    # arange decides whether the last zoom is included, as in the published generators: rounding
    # lets it in for 1.06 and 1.11 although the bound is meant to be exclusive.
    zooms = tuple(np.arange(1, level[0], level[1]).tolist())
    count = len(zooms)
    stacked = zoom_matrices(height, zooms) @ x.reshape(height, -1)
    by_column = stacked.reshape(count, height, width, 3).transpose(0, 2, 1, 3)
    total = _side_by_side(width, zooms) @ by_column.reshape(count * width, -1)
    total = total.reshape(width, height, 3).transpose(1, 0, 2)
    mean: Pixels = (x + total) / np.float32(count + 1)
    return mean


def zoomed(plane: Pixels, zoom: float) -> Pixels:
    """Zoom one plane [H, W] about its centre with linear interpolation, same shape."""
    height, width = plane.shape
    rows = zoom_matrices(height, (zoom,)) @ plane
    out: Pixels = (zoom_matrices(width, (zoom,)) @ rows.T).T
    return out


@lru_cache(maxsize=64)
def zoom_matrices(side: int, zooms: tuple[float, ...]) -> Any:
    """Build the sparse matrices that zoom one axis, one below the other.

    The central ceil(side / zoom) pixels are stretched so that the first and the last of them keep
    the ends, and the result is trimmed evenly to the side.

    Args:
        side: Length of the axis, in pixels.
        zooms: Z factors, at least 1.

    Returns:
        Sparse matrix [Z * side, side]; it maps an axis to its Z zooms.
    """
    from scipy.sparse import csr_array

    values, columns = [], []
    for zoom in zooms:
        kept = math.ceil(side / zoom)
        stretched = round(kept * zoom)
        pixels = np.arange(side) + (stretched - side) // 2
        position = pixels * (kept - 1) / max(stretched - 1, 1)
        lower = np.minimum(np.floor(position).astype(int), kept - 2)
        share = position - lower
        values.append(np.stack([1 - share, share], axis=1))
        columns.append(np.stack([lower, lower + 1], axis=1) + (side - kept) // 2)
    count = len(zooms) * side
    starts = np.arange(0, 2 * count + 1, 2)
    entries: NDArray[np.float32] = np.concatenate(values).astype(np.float32).ravel()
    return csr_array((entries, np.concatenate(columns).ravel(), starts), shape=(count, side))


@lru_cache(maxsize=64)
def _side_by_side(side: int, zooms: tuple[float, ...]) -> Any:
    """Build the matrix [side, Z * side] that zooms Z stacked axes, each by its own, and sums."""
    from scipy.sparse import hstack

    return hstack([zoom_matrices(side, (zoom,)) for zoom in zooms], format="csr")
