"""Small streams that tests adapt to."""

import numpy as np

from tta_lightning.data import ArraySource, Stream

CLASSES = tuple("abcdefghij")


def make_source(images: int = 12, seed: int = 0, classes=CLASSES) -> ArraySource:
    """Random images of 32 px with random labels."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, size=(images, 32, 32, 3), dtype=np.uint8)
    return ArraySource(pixels, rng.integers(0, len(classes), size=images), classes)


def make_stream(images: int = 12, **options) -> Stream:
    """Two corruptions over a dozen images, in batches of 5."""
    given = {"corruptions": ["contrast", "gaussian_noise"], "severity": 3, "batch_size": 5}
    return Stream(make_source(images), **{**given, **options})
