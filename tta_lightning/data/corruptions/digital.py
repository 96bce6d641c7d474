"""Corruptions of colour, geometry and coding.

Every corruption takes the image [H, W, 3] in [0, 1], the constants of one severity and the random
generator to draw from. It returns an image of the same shape; the caller clips it to [0, 1].
Scipy is imported where it is used: it is slow to load, and this module is loaded whenever the
command line starts.
"""

from __future__ import annotations

from io import BytesIO
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tta_lightning.data.corruptions.tables import Level, Pixels

_Grid: TypeAlias = NDArray[np.float64]

# Which channels lose light when a colour of hue 0 (red) is saturated. A gray pixel has no hue and
# counts as red, in the published generators too.
_RED_LOSES = np.array([0, 1, 1], dtype=np.float32)


def contrast(x: Pixels, level: Level, rng: np.random.Generator) -> Pixels:
    """Pull every value towards the mean of its channel, (x - mean) c + mean; level = (c,)."""
    mean = x.mean(axis=(0, 1), keepdims=True, dtype=np.float64).astype(np.float32)
    out: Pixels = (x - mean) * np.float32(level[0]) + mean
    return out


def brightness(x: Pixels, level: Level, rng: np.random.Generator) -> Pixels:
    """Add c to the HSV value, up to 1; level = (c,).

    With hue and saturation fixed, the three channels grow in proportion to the value, so no
    conversion is needed.
    """
    value = x.max(axis=2, keepdims=True)
    brighter = np.minimum(value + np.float32(level[0]), 1)
    scaled = x * (brighter / np.maximum(value, np.float32(1e-6)))
    out: Pixels = np.where(value > 0, scaled, brighter)
    return out


def saturate(x: Pixels, level: Level, rng: np.random.Generator) -> Pixels:
    """Map the HSV saturation S to a S + b, within [0, 1]; level = (a, b).

    With hue and value fixed, what each channel lacks to the value grows in proportion to S, so no
    conversion is needed.
    """
    factor, offset = level
    value = x.max(axis=2, keepdims=True)
    lacking = value - x
    saturation = lacking.max(axis=2, keepdims=True) / np.maximum(value, np.float32(1e-6))
    wanted = np.clip(saturation * np.float32(factor) + np.float32(offset), 0, 1)
    scaled = value - lacking * (wanted / np.maximum(saturation, np.float32(1e-6)))
    out: Pixels = np.where(saturation > 0, scaled, value - value * wanted * _RED_LOSES)
    return out


def jpeg_compression(x: Pixels, level: Level, rng: np.random.Generator) -> Pixels:
    """Encode as JPEG and decode; level = (quality,)."""
    file = BytesIO()
    _picture(x).save(file, "JPEG", quality=int(level[0]))
    return _pixels(Image.open(file))


def pixelate(x: Pixels, level: Level, rng: np.random.Generator) -> Pixels:
    """Shrink both sides to a fraction with a box filter and enlarge again; level = (fraction,)."""
    height, width = x.shape[:2]
    small = (int(width * level[0]), int(height * level[0]))
    shrunk = _picture(x).resize(small, Image.Resampling.BOX)
    return _pixels(shrunk.resize((width, height), Image.Resampling.BOX))


def _picture(x: Pixels) -> Image.Image:
    """Turn pixels [H, W, 3] in [0, 1] into an 8-bit picture."""
    return Image.fromarray(np.rint(x * 255).astype(np.uint8))


def _pixels(picture: Image.Image) -> Pixels:
    """Turn an 8-bit picture into pixels [H, W, 3] in [0, 1]."""
    return np.asarray(picture, dtype=np.float32) / np.float32(255)


def elastic_transform(x: Pixels, level: Level, rng: np.random.Generator) -> Pixels:
    """Skew at random, then let the image ripple; level = (m, s, jitter, unit).

    Three points of a centred square are moved by up to the jitter along each axis, which fixes an
    affine map. Then a displacement field uniform in (-1, 1), blurred by s and multiplied by m,
    moves every pixel. Both sample bilinearly and mirror the image at its border. m, s and the
    jitter are in units of ``unit`` shorter sides.
    """
    magnitude, sigma, jitter, unit = level
    length = unit * min(x.shape[:2])
    x = _sampled(x, _skewed_grid(x.shape[0], x.shape[1], jitter * length, rng), "mirror")
    grid: _Grid = np.indices(x.shape[:2], dtype=np.float64)
    field = rng.uniform(-1, 1, size=grid.shape)
    ripple = magnitude * length * reflecting_blur(field, sigma * length)
    return _sampled(x, grid + ripple, "reflect")


def _skewed_grid(height: int, width: int, jitter: float, rng: np.random.Generator) -> _Grid:
    """Draw an affine map and return where each pixel is taken from, [2, H, W] (row, column).

    The map carries three corners of a square, a third of the shorter side from the centre, to
    places uniform within the jitter (in pixels) of them.
    """
    centre = np.array([height // 2, width // 2])
    arm = min(height, width) // 3
    corners = centre + arm * np.array([[1, 1], [-1, 1], [-1, -1]])
    moved = corners + rng.uniform(-jitter, jitter, size=(3, 2))
    inverse = np.linalg.solve(np.column_stack([moved, np.ones(3)]), corners)  # [3, 2]
    rows, columns = np.arange(height)[:, None], np.arange(width)
    return np.stack([rows * a + columns * b + c for a, b, c in inverse.T])


def _sampled(x: Pixels, places: _Grid, mode: str) -> Pixels:
    """Read an image [H, W, 3] bilinearly at places [2, H, W]; mode is scipy's border rule."""
    from scipy.ndimage import map_coordinates

    planes = [map_coordinates(x[..., c], places, order=1, mode=mode) for c in range(x.shape[2])]
    return np.stack(planes, axis=2)


def reflecting_blur(field: _Grid, sigma: float) -> _Grid:
    """Blur with a Gaussian cut at three sigma, reflecting the field at its border.

    A cosine transform makes this blur a product, so that a sigma near the side, as the first
    severity has it, costs no more than a small one.

    Args:
        field: Planes [..., H, W].
        sigma: Standard deviation, in pixels; 0 leaves the field as it is.

    Returns:
        The blurred planes, same shape.
    """
    from scipy.fft import dctn, idctn

    if sigma == 0:
        return field
    taps = np.arange(-int(3 * sigma + 0.5), int(3 * sigma + 0.5) + 1)
    weights = np.exp(-(taps**2) / (2 * sigma**2))
    weights /= weights.sum()
    height, width = field.shape[-2:]
    damping = [np.cos(np.pi * np.outer(np.arange(n), taps) / n) @ weights for n in (height, width)]
    blurred: _Grid = idctn(dctn(field, axes=(-2, -1)) * np.outer(*damping), axes=(-2, -1))
    return blurred
