"""Decoding: one picture file to one array, whatever the file holds."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from tta_lightning.errors import InputError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")

# By their content, whatever the suffix says. Not every format that Pillow knows: for EPS it would
# start another program.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO")

# What brings a picture upright, by the value of its EXIF orientation tag (EXIF 2.32, tag 0x0112).
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


PathOrFile = str | os.PathLike[str] | IO[bytes]


class BadImageError(InputError):
    """A file cannot be read as an image; the message names the file and the reason."""


def read_image(path: PathOrFile) -> NDArray[np.uint8]:
    """Read one picture as 8-bit RGB.

    The orientation noted by the camera (EXIF) is applied. Gray, palette and CMYK pictures are
    converted; of 16-bit gray the upper 8 bits are kept. Transparent pixels are laid on white, the
    paper that drawings with transparency are made for. Of an animation the first frame is read.

    Args:
        path: The file, or one that is open for reading bytes. Its content decides how it
            is read, not its suffix.

    Returns:
        Pixels ``[H, W, 3]``, writable.

    Raises:
        BadImageError: The file is missing, empty, damaged, cut off, no image, or so large that
            decoding it could exhaust the memory (``PIL.Image.MAX_IMAGE_PIXELS``).
    """
    try:
        with warnings.catch_warnings():
            # Remarks on odd metadata would be repeated for every file; only the size matters.
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            _check_regular(path)
            with Image.open(path, formats=FORMATS) as image:
                image.load()
                return np.array(_to_rgb(_upright(image)), dtype=np.uint8)
    except Exception as error:  # on damaged bytes a decoder raises whatever it stumbles upon
        raise BadImageError(
            f"Cannot read the image{_name(path)}: {_reason(path, error)}. "
            "Expected a complete JPEG, PNG, WebP or BMP file: replace it or remove it."
        ) from error


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged metadata is no reason to lose a picture that decoded well
        return image
    method = _UPRIGHT.get(orientation)
    return image if method is None else image.transpose(method)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert any Pillow mode to RGB, see `read_image`."""
    if image.mode.startswith("I"):  # 16-bit gray; some formats deliver it in 32-bit integers
        wide = np.asarray(image).astype(np.int64).clip(0, 65535)
        image = Image.fromarray((wide >> 8).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("its pixels are floats of unknown range; save it with 8 bits a channel")
    if image.has_transparency_data:
        picture = image.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        image = Image.alpha_composite(white, picture)
    return image.convert("RGB")


def _check_regular(path: PathOrFile) -> None:
    """Refuse to open what is no file: a pipe would be waited for without end."""
    if isinstance(path, str | os.PathLike):
        file = Path(path)
        if file.exists() and not file.is_file():
            raise OSError("it is a directory or a device, not a file")


def _name(path: PathOrFile) -> str:
    return f" {os.fspath(path)!r}" if isinstance(path, str | os.PathLike) else ""


def _reason(path: PathOrFile, error: Exception) -> str:
    """Say in a few words why a file could not be read."""
    if isinstance(error, FileNotFoundError):
        return "the file does not exist (any more)"
    if isinstance(path, str | os.PathLike) and _is_empty(Path(path)):
        return "the file is empty"
    if isinstance(error, UnidentifiedImageError):
        return "its content is not an image"
    if isinstance(error, Image.DecompressionBombWarning | Image.DecompressionBombError):
        return f"it has too many pixels ({error})"
    return str(error).rstrip(".") or type(error).__name__


def _is_empty(file: Path) -> bool:
    try:
        return file.is_file() and file.stat().st_size == 0
    except (OSError, ValueError):  # a name that no file can have
        return False
