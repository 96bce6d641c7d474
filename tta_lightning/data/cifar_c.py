"""Readers of CIFAR-10-C and CIFAR-100-C (Hendrycks and Dietterich, 2019, arXiv:1903.12261)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tta_lightning.data.classes import CIFAR10_NAMES, CIFAR100_NAMES
from tta_lightning.data.folders import StrPath, contents, existing_folder
from tta_lightning.data.source import ImageSource
from tta_lightning.errors import InputError

_SEVERITIES = 5
_LABELS = "labels.npy"


class _CIFARC(ImageSource):
    """What both data sets share.

    Each corruption is one array ``[5 N, H, W, 3]``: first all N images at severity 1, then all at
    severity 2 and so on. ``labels.npy`` is ``[5 N]`` in the same order.
    """

    classes: tuple[str, ...]

    def __init__(self, root: StrPath) -> None:
        self.root = os.fspath(root)
        expected = f"a folder with one <corruption>.npy for each corruption and {_LABELS}"
        self._folder = existing_folder(root, expected)
        self._arrays: dict[str, NDArray[Any]] = {}
        names = sorted(file.stem for file in self._folder.glob("[!.]*.npy") if file.name != _LABELS)
        if not names or not (self._folder / _LABELS).is_file():
            raise InputError(
                f"{self.root!r} holds {contents(self._folder)}. Expected {expected}: unpack the "
                f"archive of {type(self).__name__} and give the folder with the .npy files."
            )
        labels = _open_array(self._folder / _LABELS)
        for name in names:
            _check_images(self._folder / f"{name}.npy", len(labels))
        self.labels = self._labels_of_one_severity(labels)
        self.domains = tuple((name, level + 1) for name in names for level in range(_SEVERITIES))

    def load(self, index: int, corruption: str = "none", severity: int = 0) -> NDArray[np.uint8]:
        """Read one image, see `ImageSource.load`."""
        self.check(index, corruption, severity)
        if corruption not in self._arrays:
            self._arrays[corruption] = _open_array(self._folder / f"{corruption}.npy")
        return np.array(self._arrays[corruption][self._row(index, severity)], dtype=np.uint8)

    def path(self, index: int, corruption: str = "none", severity: int = 0) -> str:
        """Return file and row, e.g. ``fog.npy[20007]``; without a domain those of the label."""
        if corruption == "none":
            return f"{_LABELS}[{index}]"
        return f"{corruption}.npy[{self._row(index, severity)}]"

    def _row(self, index: int, severity: int) -> int:
        return (severity - 1) * len(self) + index

    def _labels_of_one_severity(self, stored: NDArray[Any]) -> NDArray[np.int64]:
        """Check the labels ``[5 N]`` and return those of one severity, ``[N]``."""
        if stored.ndim != 1 or stored.dtype.kind not in "iu":
            raise InputError(
                f"{_LABELS} in {self.root!r} is {stored.dtype} of shape {list(stored.shape)}. "
                "Expected integers of shape [5 N]: download the data set again."
            )
        levels: NDArray[np.int64] = stored.reshape(_SEVERITIES, -1).astype(np.int64)
        if (levels != levels[0]).any():
            raise InputError(
                f"{_LABELS} in {self.root!r} differs between severities. Expected the same labels "
                "five times, once for each severity: download the data set again."
            )
        if levels.min() < 0 or levels.max() >= len(self.classes):
            raise InputError(
                f"{_LABELS} in {self.root!r} goes from {levels.min()} to {levels.max()}. Expected "
                f"0 to {len(self.classes) - 1} for {type(self).__name__}: is this folder another "
                "data set?"
            )
        return np.array(levels[0], dtype=np.int64)

    def __getstate__(self) -> dict[str, Any]:
        # Pickling an open memory map would copy the whole file; each process opens its own.
        return {**self.__dict__, "_arrays": {}}


class CIFAR10C(_CIFARC):
    """CIFAR-10-C as published: ``<corruption>.npy`` and ``labels.npy`` in one folder.

    The arrays are mapped, not read as a whole. Any number of corruptions may be present, and any
    number of images that is the same in all files.

    Args:
        root: The folder with the ``.npy`` files.

    Raises:
        InputError: The folder or a file is missing or not as published.
    """

    classes = CIFAR10_NAMES


class CIFAR100C(_CIFARC):
    """CIFAR-100-C as published, with the fine labels; otherwise like `CIFAR10C`.

    Args:
        root: The folder with the ``.npy`` files.

    Raises:
        InputError: The folder or a file is missing or not as published.
    """

    classes = CIFAR100_NAMES


def _open_array(file: Path) -> NDArray[Any]:
    """Map an array into memory."""
    try:
        array: NDArray[Any] = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(
            f"Cannot read {str(file)!r}: {error}. Expected a complete .npy file: download the "
            "data set again."
        ) from error
    return array


def _check_images(file: Path, label_count: int) -> None:
    """Check the shape of one corruption's images against the labels."""
    images = _open_array(file)
    shape = list(images.shape)
    if images.dtype != np.uint8 or images.ndim != 4 or shape[3] != 3 or not images.size:
        raise InputError(
            f"{str(file)!r} is {images.dtype} of shape {shape}. Expected uint8 of shape "
            "[5 N, H, W, 3], [50000, 32, 32, 3] as published."
        )
    if shape[0] % _SEVERITIES:
        raise InputError(
            f"{str(file)!r} holds {shape[0]} images. Expected a multiple of 5, the images of "
            "severity 1 to 5 one after the other: download the data set again."
        )
    if shape[0] != label_count:
        raise InputError(
            f"{_LABELS} has {label_count} labels, but {file.name!r} has {shape[0]} images. "
            "Expected one label for each image: are both files of the same data set?"
        )
