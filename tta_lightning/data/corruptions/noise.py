"""Corruptions that draw every value on its own.

Every function takes the image [H, W, 3] in [0, 1], the constants of one severity and the random
generator to draw from. It returns an image of the same shape; the caller clips it to [0, 1].
"""

from __future__ import annotations

import numpy as np

from tta_lightning.data.corruptions.tables import Level, Pixels


def gaussian_noise(x: Pixels, level: Level, rng: np.random.Generator) -> Pixels:
    """Add N(0, s²) to every value; level = (s,)."""
    return x + np.float32(level[0]) * rng.standard_normal(x.shape, dtype=np.float32)


def shot_noise(x: Pixels, level: Level, rng: np.random.Generator) -> Pixels:
    """Replace every value by a Poisson count of mean c x, divided by c; level = (c,)."""
    counts = rng.poisson(x * np.float32(level[0]))
    return (counts / level[0]).astype(np.float32)


def impulse_noise(x: Pixels, level: Level, rng: np.random.Generator) -> Pixels:
    """Set a fraction of the values to 0 or 1, with equal chance; level = (fraction,).

    Channels are struck independently of each other, so the specks are coloured.
    """
    chance = rng.random(x.shape, dtype=np.float32)
    fraction = np.float32(level[0])
    noisy = np.where(chance < fraction, np.float32(0), x)
    return np.where(chance < fraction / 2, np.float32(1), noisy)


def speckle_noise(x: Pixels, level: Level, rng: np.random.Generator) -> Pixels:
    """Add noise N(0, s²) in proportion to the value itself; level = (s,)."""
    return x + x * np.float32(level[0]) * rng.standard_normal(x.shape, dtype=np.float32)
