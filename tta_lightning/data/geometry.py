"""Bringing images to the size a model was made for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tta_lightning.data.images import BadImageError
from tta_lightning.errors import InputError


class ImageSizeError(BadImageError):
    """An image cannot be brought to a size; who knows its name adds it."""


_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}

MOST_PIXELS = 100_000_000
LEAST_CROP = 0.01

ImageSize = int | Literal["model", "keep"]


@dataclass(frozen=True)
class Geometry:
    """Resize the shorter side, then crop the centre: the usual evaluation transform.

    An image that already has the wanted size is left as it is, so files that were made at the
    model's size (ImageNet-C, CIFAR-10-C) are not resampled.

    Attributes:
        size: Side of the square result in px; None leaves every image as it is.
        crop_pct: The shorter side becomes ``round(size / crop_pct)`` px before the crop.
        interpolation: ``nearest``, ``bilinear``, ``bicubic`` or ``lanczos``.
    """

    size: int | None = None
    crop_pct: float = 1.0
    interpolation: str = "bilinear"

    def __call__(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Bring one image ``[H, W, 3]`` to ``[size, size, 3]``.

        Raises:
            ImageSizeError: It is so long and narrow, or the size so large, that the resized image
                could exhaust the memory.
        """
        size = self.size
        height, width = image.shape[:2]
        if size is None or (height, width) == (size, size):
            return image
        scale = round(size / self.crop_pct) / min(height, width)
        wide, high = max(size, round(width * scale)), max(size, round(height * scale))
        if wide * high > MOST_PIXELS:
            raise ImageSizeError(
                f"An image of {width} x {height} px would be {wide} x {high} px before its centre "
                f"is cut out. Expected at most {MOST_PIXELS:,} pixels: check image_size and "
                "crop_pct, or remove images that are long and narrow."
            )
        resized = Image.fromarray(image).resize(
            (wide, high), _FILTERS.get(self.interpolation, Image.Resampling.BILINEAR)
        )
        left, top = (resized.width - size) // 2, (resized.height - size) // 2
        return np.array(resized.crop((left, top, left + size, top + size)))


def geometry(
    image_size: ImageSize,
    crop_pct: float | None,
    model_size: int | None,
    model_crop_pct: float,
    interpolation: str,
) -> Geometry:
    """Choose the geometry from what the user asked for and what the model was made for.

    Args:
        image_size: Side in px, ``"model"`` for the model's own, ``"keep"`` for none.
        crop_pct: As in :class:`Geometry`; None for the model's own.
        model_size: The model's input side in px, None if it takes any.
        model_crop_pct: The model's own crop.
        interpolation: The model's own interpolation.

    Returns:
        The geometry.

    Raises:
        InputError: ``image_size`` or ``crop_pct`` is out of range.
    """
    if isinstance(image_size, int) and image_size < 1:
        raise InputError(f"image_size = {image_size}: expected a side in px, model or keep.")
    if crop_pct is not None and not LEAST_CROP <= crop_pct <= 1:
        raise InputError(f"crop_pct = {crop_pct}: expected a number above 0: {LEAST_CROP} to 1.")
    size = (
        {"model": model_size, "keep": None}.get(image_size)
        if isinstance(image_size, str)
        else image_size
    )
    return Geometry(size, model_crop_pct if crop_pct is None else crop_pct, interpolation)
