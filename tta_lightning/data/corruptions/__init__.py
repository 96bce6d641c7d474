"""The 15 common corruptions and 4 extra ones, in five severities and two tables.

``corrupt(image, "fog", 3, index=7)`` corrupts one 8-bit image. The result depends on the image,
the corruption, the severity, the table, the index of the sample and the seed, and on nothing
else: neither on the order of the calls nor on batch size, process or global random state.

Table ``"imagenet"`` holds the severities of ImageNet-C, made for 224 px; table ``"cifar"`` the
milder ones of CIFAR-10-C, made for 32 px. Any image of at least 28 px a side works with both;
lengths stay those of the table and do not scale with the image.

Source: Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions
and Perturbations", ICLR 2019, https://arxiv.org/abs/1903.12261. The published files were made
with unseeded randomness: what can agree with them is the distribution, not the pixels.

Departs from the published generators in:

================== =============================================================================
corruption         how
================== =============================================================================
frost              Five procedural panes in place of photographs. Their mean is 0.6, their standard
                   deviation 0.17, near those of the photographs. They repeat every 256 px.
spatter            Distances to the rim of a drop are exact (there: approximate, on a grid). An
                   image without liquid stays as it is (there: NaN).
motion_blur, snow  Own code for ImageMagick's motion blur; no rounding to 8 bits in between.
elastic_transform  The affine map samples exactly (there: to 1/32 px). The unit of length follows
                   the shorter side, so that it is the published one at 32 and at 224 px.
all                Values are cut to 8 bits as there, but first lifted by 0.001/255, so that a
                   value which is exact on paper does not fall one step through rounding.
================== =============================================================================

Kept as published, although it may look like a mistake: glass_blur copies a neighbour where it
means to swap (both sides of the swap are views of one array), so its pixels are no permutation;
zoom_blur counts the image twice, and its last zoom where rounding lets it in; defocus_blur
brightens by 1 % at radius 8 and 10; saturate turns gray pixels reddish when it adds saturation.
Nor does every severity do more than the one before: elastic_transform, glass_blur, frost, spatter
and saturate fall back at some step, in both tables.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tta_lightning.data.corruptions import blur, digital, noise, weather
from tta_lightning.data.corruptions.tables import (
    ALL,
    COMMON,
    EXTRA,
    LEVELS,
    SEVERITIES,
    TABLES,
    Level,
    Pixels,
)
from tta_lightning.errors import InputError, unknown_name

__all__ = ["ALL", "CLEAN", "COMMON", "EXTRA", "MIN_SIDE", "TABLES", "check", "corrupt"]

CLEAN: Final = "none"
"""The name that stands for the image as it is, with severity 0."""

MIN_SIDE: Final = 28
"""The smallest height and width that can be corrupted, in pixels."""

_FUNCTIONS: Final[dict[str, Callable[[Pixels, Level, np.random.Generator], Pixels]]] = {
    "gaussian_noise": noise.gaussian_noise,
    "shot_noise": noise.shot_noise,
    "impulse_noise": noise.impulse_noise,
    "defocus_blur": blur.defocus_blur,
    "glass_blur": blur.glass_blur,
    "motion_blur": blur.motion_blur,
    "zoom_blur": blur.zoom_blur,
    "snow": weather.snow,
    "frost": weather.frost,
    "fog": weather.fog,
    "brightness": digital.brightness,
    "contrast": digital.contrast,
    "elastic_transform": digital.elastic_transform,
    "pixelate": digital.pixelate,
    "jpeg_compression": digital.jpeg_compression,
    "speckle_noise": noise.speckle_noise,
    "gaussian_blur": blur.gaussian_blur,
    "spatter": weather.spatter,
    "saturate": digital.saturate,
}


def corrupt(
    image: NDArray[np.uint8],
    corruption: str,
    severity: int,
    *,
    index: int,
    seed: int = 0,
    table: str = "imagenet",
) -> NDArray[np.uint8]:
    """Corrupt one image.

    Args:
        image: Image [H, W, 3], 8 bit, both sides at least 28 px. It is not modified.
        corruption: A name from :data:`ALL`, or ``"none"``.
        severity: 1 (weak) to 5 (strong); 0 for ``"none"``.
        index: Number of the sample in its dataset, at least 0. Each has noise of its own.
        seed: Seed of the whole stream, at least 0.
        table: ``"imagenet"`` or ``"cifar"``: which severities to use.

    Returns:
        The corrupted image [H, W, 3], 8 bit, in memory of its own.

    Raises:
        InputError: A name, the severity, the index, the seed or the image is not as above.
    """
    check(corruption, severity, table)
    _check_image(image)
    if corruption == CLEAN:
        return image.copy()
    _check_side(image)
    for name, number in (("index", index), ("seed", seed)):
        if number < 0:
            raise InputError(f"{name} is {number}, expected a whole number of at least 0.")
    entropy = np.random.SeedSequence([seed, index, ALL.index(corruption), severity])
    rng = np.random.Generator(np.random.Philox(entropy))
    pixels = image.astype(np.float32) / np.float32(255)
    out = _FUNCTIONS[corruption](pixels, LEVELS[table][corruption][severity - 1], rng)
    return (np.clip(out, 0, 1) * 255 + blur.ROUNDING).astype(np.uint8)


def check(corruption: str, severity: int, table: str = "imagenet") -> None:
    """Refuse names and severities that do not exist, before any image is read.

    Args:
        corruption: A name from :data:`ALL`, or ``"none"``.
        severity: 1 to 5; 0 for ``"none"``.
        table: ``"imagenet"`` or ``"cifar"``.

    Raises:
        InputError: One of them does not exist; the message names what does.
    """
    if table not in TABLES:
        raise unknown_name("severity table", table, TABLES)
    if corruption == CLEAN:
        if severity != 0:
            raise InputError(
                f"severity {severity} for {CLEAN!r}, expected 0: clean images have no severity. "
                "Set it to 0 or name a corruption."
            )
        return
    if corruption not in ALL:
        raise unknown_name("corruption", corruption, (CLEAN, *ALL))
    if not isinstance(severity, int | np.integer) or severity not in SEVERITIES:
        raise InputError(
            f"severity {severity} for {corruption!r}, expected 1 to 5. "
            f"For the clean image use corruption {CLEAN!r} with severity 0."
        )


def _check_image(image: NDArray[np.uint8]) -> None:
    """Refuse what is not an 8-bit colour image [H, W, 3]."""
    if not isinstance(image, np.ndarray):
        raise InputError(
            f"The image is a {type(image).__name__}, expected a NumPy array [H, W, 3] of uint8. "
            "Convert a PIL image with np.asarray(image.convert('RGB'))."
        )
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise InputError(
            f"The image is {image.dtype} of shape {list(image.shape)}, expected uint8 of shape "
            "[H, W, 3]. Bring values to 0..255, channels to the end and gray images to 3 channels."
        )


def _check_side(image: NDArray[np.uint8]) -> None:
    """Refuse an image that is smaller than the corruptions can reach."""
    height, width = image.shape[:2]
    if min(height, width) < MIN_SIDE:
        raise InputError(
            f"The image is {height} x {width} px, expected at least {MIN_SIDE} px on each side. "
            "Pad or resize it before it is corrupted."
        )
