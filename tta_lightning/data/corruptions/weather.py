"""Corruptions that lay weather over the image.

Every corruption takes the image [H, W, 3] in [0, 1], the constants of one severity and the random
generator to draw from. It returns an image of the same shape; the caller clips it to [0, 1].
Lengths are in pixels. Scipy is imported where it is used: it is slow to load, and this module is
loaded whenever the command line starts.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from tta_lightning.data.corruptions.blur import ROUNDING, smear, smooth, zoomed
from tta_lightning.data.corruptions.tables import Level, Pixels

_LUMINANCE = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601
_WATER: Pixels = np.array([175, 238, 238], dtype=np.float32) / np.float32(255)  # pale turquoise
_MUD: Pixels = np.array([63, 42, 20], dtype=np.float32) / np.float32(255)
_EMBOSS = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]])
_REACH_OF_SHEEN = 20  # pixels from a drop's outline beyond which the sheen no longer changes

_FROST_SIDE = 256
_FROST_TINT = np.array([0.88, 1.01, 1.11], dtype=np.float32)
# (mean, standard deviation) of each texture: frost photographs differ most in brightness.
_FROST_TONES = ((0.42, 0.15), (0.52, 0.14), (0.6, 0.11), (0.68, 0.1), (0.78, 0.08))
# (width of the needles in pixels, weight): mostly fine crystals over a few broad plumes.
_FROST_SCALES = ((1.4, 1.0), (4.0, 0.7), (12.0, 0.6), (40.0, 0.5))


def snow(x: Pixels, level: Level, rng: np.random.Generator) -> Pixels:
    """Whiten the image and let flakes fall; level = (m, s, zoom, threshold, radius, sigma, k).

    Noise N(m, s²) is zoomed, zeroed below the threshold and smeared downwards. It is added
    together with its half-turn to k x + (1 - k) max(x, 1.5 gray + 0.5).
    """
    mean, spread, zoom, threshold, radius, sigma, kept = level
    flakes = mean + spread * rng.standard_normal(x.shape[:2], dtype=np.float32)
    flakes = zoomed(flakes, zoom)
    flakes = np.where(flakes < threshold, np.float32(0), np.clip(flakes, 0, 1))
    flakes = smear(flakes, int(radius), sigma, rng.uniform(-135, -45))[..., None]
    gray = (x @ _LUMINANCE)[..., None]
    whitened = np.float32(kept) * x + np.float32(1 - kept) * np.maximum(x, 1.5 * gray + 0.5)
    out: Pixels = whitened + flakes + np.rot90(flakes, k=2)
    return out


def frost(x: Pixels, level: Level, rng: np.random.Generator) -> Pixels:
    """Mix with a frosted pane: a x + b frost; level = (a, b, scale of the pane).

    The published generators cut from photographs that are not ours to ship. The pane here is
    procedural, see :func:`frost_texture`; one of five is cut at a random place and mirrored at
    random. It repeats every 256 px, without a seam.
    """
    keep, mix, scale = level
    texture = frost_texture(int(rng.integers(len(_FROST_TONES))), scale)
    place = rng.integers(_FROST_SIDE, size=2)
    flip = rng.choice([-1, 1], size=2)
    rows = (place[0] + flip[0] * np.arange(x.shape[0])) % _FROST_SIDE
    columns = (place[1] + flip[1] * np.arange(x.shape[1])) % _FROST_SIDE
    pane = np.minimum(texture[np.ix_(rows, columns)][..., None] * _FROST_TINT, 1)
    out: Pixels = np.float32(keep) * x + np.float32(mix) * pane
    return out


@lru_cache(maxsize=32)
def frost_texture(number: int, scale: float) -> Pixels:
    """Synthesise one frosted pane: bright ridges of ice needles, coarse over fine.

    At each of four scales, noise is stretched along three directions 60° apart, as ice grows.
    Its zero lines, where the absolute value is least, become bright ridges; the brightest of the
    three directions wins.

    Args:
        number: Which of the five panes; they differ in pattern, brightness and contrast.
        scale: Size relative to the photographs of ImageNet-C at 224 px; 0.2 for 32 px.

    Returns:
        Luminance [256, 256] in [0, 1], periodic along both axes. The five have together a mean
        of 0.6 and a standard deviation of 0.17.
    """
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([1903, number])))
    fy = np.fft.fftfreq(_FROST_SIDE)[:, None]
    fx = np.fft.rfftfreq(_FROST_SIDE)
    first_angle = rng.uniform(0, math.pi / 3)
    pane = np.zeros((_FROST_SIDE, _FROST_SIDE))
    for width, weight in _FROST_SCALES:
        ridges = np.full_like(pane, -np.inf)
        for angle in first_angle + np.arange(3) * math.pi / 3:
            along = fx * math.cos(angle) + fy * math.sin(angle)
            across = fy * math.cos(angle) - fx * math.sin(angle)
            stretched = (4 * along) ** 2 + across**2  # needles are four times as long as wide
            filtered = np.exp(-2 * (math.pi * width * scale) ** 2 * stretched)
            noise = np.fft.rfft2(rng.standard_normal(pane.shape)) * filtered
            field = np.fft.irfft2(noise, s=pane.shape)
            ridges = np.maximum(ridges, -np.abs(field - field.mean()) / field.std())
        pane += weight * (ridges - ridges.mean()) / ridges.std()
    mean, spread = _FROST_TONES[number]
    pane = mean + spread * (pane - pane.mean()) / pane.std()
    luminance: Pixels = np.clip(pane, 0, 1).astype(np.float32)
    return luminance


def fog(x: Pixels, level: Level, rng: np.random.Generator) -> Pixels:
    """Add c times a plasma fractal and rescale by max(x) / (max(x) + c); level = (c, decay)."""
    height, width = x.shape[:2]
    side = 1 << (max(height, width) - 1).bit_length()
    brightest = float(x.max())
    thickness, decay = level
    haze = plasma_fractal(side, decay, rng)[:height, :width, None]
    scale = np.float32(brightest / (brightest + thickness))
    out: Pixels = scale * (x + np.float32(thickness) * haze)
    return out


def plasma_fractal(side: int, decay: float, rng: np.random.Generator) -> Pixels:
    """Draw a periodic height map with the diamond-square algorithm.

    Every round halves the grid: the centre of each square becomes the mean of its four corners,
    then the middle of each edge the mean of its four neighbours, both plus uniform noise whose
    amplitude falls by decay² a round.

    Args:
        side: Side of the map, a power of two.
        decay: Root of the factor by which the noise falls; small values give rough maps.
        rng: The generator to draw from.

    Returns:
        Map [side, side] that spans [0, 1].
    """
    heights = np.zeros((side, side), dtype=np.float32)
    amplitude, step = 1.0, side
    while step >= 2:
        half = step // 2
        noise = rng.random((3, side // step, side // step), dtype=np.float32) * 2 - 1
        noise *= np.float32(amplitude)
        corners = heights[::step, ::step]
        pairs = corners + np.roll(corners, -1, axis=0)
        centres = (pairs + np.roll(pairs, -1, axis=1)) / 4 + noise[0]
        heights[half::step, half::step] = centres
        # The four neighbours of an edge's middle: its two corners and the two centres beside it.
        across = corners + np.roll(corners, -1, axis=1) + centres + np.roll(centres, 1, axis=0)
        heights[::step, half::step] = across / 4 + noise[1]
        down = pairs + centres + np.roll(centres, 1, axis=1)
        heights[half::step, ::step] = down / 4 + noise[2]
        amplitude /= decay**2
        step = half
    heights -= heights.min()
    normalised: Pixels = heights / heights.max()
    return normalised


def spatter(x: Pixels, level: Level, rng: np.random.Generator) -> Pixels:
    """Splash water or mud; level = (m, s, sigma, threshold, i, 0 water | 1 mud).

    Noise N(m, s²), blurred by sigma, is liquid where it reaches the threshold. Water adds pale
    turquoise with intensity i; mud covers the image, its rim blurred by i and cut at 0.8.
    """
    mean, spread, sigma, threshold, strength, is_mud = level
    liquid = mean + spread * rng.standard_normal(x.shape[:2], dtype=np.float32)
    liquid = smooth(liquid, sigma)
    wet = liquid >= threshold
    if not wet.any():
        return x
    if is_mud:
        cover = smooth(wet.astype(np.float32), strength)[..., None]
        muddy: Pixels = np.where(cover < 0.8, x, x + cover * (_MUD - x))
        return muddy
    shine = drop_sheen(np.where(wet, np.minimum(liquid * 255, 255), 0).astype(np.uint8))
    return x + np.float32(strength) * shine[..., None] * _WATER


def drop_sheen(liquid: NDArray[np.uint8]) -> Pixels:
    """Shade drops as if lit from one side, from the distance to their outlines.

    Args:
        liquid: Depth of the liquid [H, W], 0 where it is dry.

    Returns:
        Brightness [H, W] with maximum 1.
    """
    from scipy.ndimage import correlate, distance_transform_edt, uniform_filter

    edges = outlines(liquid)
    distance = np.full(liquid.shape, float(_REACH_OF_SHEEN))
    if edges.any():
        distance = np.minimum(distance_transform_edt(~edges), _REACH_OF_SHEEN)
    steps = (uniform_filter(distance, 3, mode="mirror") + ROUNDING).astype(np.uint8)
    embossed = np.clip(correlate(_equalised(steps), _EMBOSS, mode="mirror"), 0, 255)
    shine = liquid * uniform_filter(embossed.astype(np.float32), 3, mode="mirror")
    brightness: Pixels = shine / max(float(shine.max()), 1e-6)
    return brightness


def outlines(plane: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Find edges as Canny does: crests of the gradient that hang together with a steep one.

    The gradient is Sobel's, its strength the sum of the absolute values along both axes. A crest
    is no weaker than its two neighbours across the edge, in the nearest of four directions. It
    counts above a strength of 50 if it is connected to a crest above 150.

    Args:
        plane: Grey levels [H, W].

    Returns:
        Where the edges are [H, W].
    """
    from scipy.ndimage import label, sobel

    down = sobel(plane.astype(np.int64), axis=0, mode="nearest")
    right = sobel(plane.astype(np.int64), axis=1, mode="nearest")
    strength = np.abs(down) + np.abs(right)
    height, width = plane.shape
    padded = np.pad(strength, 1)

    def neighbour(dy: int, dx: int) -> NDArray[np.int64]:
        return padded[1 + dy : 1 + dy + height, 1 + dx : 1 + dx + width]

    flat = np.abs(down) < math.tan(math.pi / 8) * np.abs(right)
    steep = np.abs(down) > math.tan(3 * math.pi / 8) * np.abs(right)
    # Of two equal neighbours along an axis the first is the crest; on diagonals neither is.
    crest = np.select(
        [flat, steep, down * right < 0],
        [
            (strength > neighbour(0, -1)) & (strength >= neighbour(0, 1)),
            (strength > neighbour(-1, 0)) & (strength >= neighbour(1, 0)),
            (strength > neighbour(-1, 1)) & (strength > neighbour(1, -1)),
        ],
        (strength > neighbour(-1, -1)) & (strength > neighbour(1, 1)),
    )
    parts, _ = label(crest & (strength > 50), structure=np.ones((3, 3)))
    steep_parts = np.unique(parts[crest & (strength > 150)])
    edges: NDArray[np.bool_] = np.isin(parts, steep_parts)
    return edges


def _equalised(plane: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Spread the grey levels of a plane [H, W] so that their ranks are even over 0..255."""
    counts = np.bincount(plane.ravel(), minlength=256)
    lowest = counts[plane.min()]
    ranks = (np.cumsum(counts) - lowest) / max(plane.size - lowest, 1)
    levels: NDArray[np.int64] = np.rint(255 * ranks).astype(np.int64)
    return levels[plane]
