"""A reader of the data sets that torchvision downloads."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tta_lightning.data.arrays import ArraySource, gray_to_rgb32
from tta_lightning.data.classes import DIGIT_NAMES
from tta_lightning.data.folders import StrPath
from tta_lightning.errors import InputError, unknown_name

TorchvisionName = Literal["CIFAR10", "CIFAR100", "MNIST", "FashionMNIST", "KMNIST", "SVHN", "STL10"]

_MNIST_FILES = (
    "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and "
    "t10k-labels-idx1-ubyte, unpacked"
)

# For each data set: the folder below `root` and the files that torchvision looks for in it.
_FILES = {
    "CIFAR10": ("cifar-10-batches-py", "data_batch_1 to data_batch_5, test_batch, batches.meta"),
    "CIFAR100": ("cifar-100-python", "train, test and meta"),
    "MNIST": ("MNIST/raw", _MNIST_FILES),
    "FashionMNIST": ("FashionMNIST/raw", _MNIST_FILES),
    "KMNIST": ("KMNIST/raw", _MNIST_FILES),
    "SVHN": ("", "train_32x32.mat and test_32x32.mat"),
    "STL10": (
        "stl10_binary",
        "train_X.bin, train_y.bin, unlabeled_X.bin, test_X.bin, test_y.bin and class_names.txt",
    ),
}


class TorchvisionDataset(ArraySource):
    """A data set of torchvision, read into memory.

    Gray images of 28 pixels are padded to 32 and get three equal channels. The classes of MNIST
    and SVHN are named ``0`` to ``9``, like those of `Digits`.

    Args:
        name: Name of the data set's class in ``torchvision.datasets``.
        root: Folder that holds the files or that they are downloaded to.
        split: ``"train"`` or ``"test"``.
        download: Download the files if they are not there.

    Raises:
        InputError: The files are not there, damaged, or cannot be downloaded.
    """

    def __init__(
        self,
        name: TorchvisionName,
        root: StrPath,
        split: Literal["train", "test"] = "test",
        download: bool = True,
    ) -> None:
        if name not in _FILES:
            raise unknown_name("torchvision data set", name, _FILES)
        if split not in ("train", "test"):
            raise unknown_name("split", split, ("train", "test"))
        dataset = _open(name, Path(root).expanduser(), split, download)
        super().__init__(_images(dataset), _labels(dataset), _classes(name, dataset))
        self.root = os.fspath(root)
        self.name = name
        self.split = split

    def path(self, index: int, corruption: str = "none", severity: int = 0) -> str:
        """Return data set, split and index, e.g. ``CIFAR10/test[7]``."""
        return f"{self.name}/{self.split}[{index}]"

    def describe(self) -> dict[str, Any]:
        """Describe the reader, see `ImageSource.describe`."""
        return {**super().describe(), "name": self.name, "split": self.split}


def _open(name: str, root: Path, split: str, download: bool) -> Any:
    """Open what is on the disk; only if that fails, download."""
    from torchvision import datasets

    kind = getattr(datasets, name)
    choice = {"split": split} if name in ("SVHN", "STL10") else {"train": split == "train"}
    failures = []
    for may_download in (False, True) if download else (False,):
        try:
            return kind(str(root), download=may_download, **choice)
        except (OSError, RuntimeError, ValueError, EOFError) as error:
            failures.append(error)
    below, files = _FILES[name]
    reason = str(failures[-1]).strip().splitlines()[0].rstrip(".:")
    attempt = "and could not be downloaded" if download else "and `download` is false"
    remedy = "Copy" if download else "Set `download` to true, or copy"
    raise InputError(
        f"The files of {name} are not complete in {str(root / below)!r} {attempt}: {reason}. "
        f"Expected there: {files}. {remedy} them there from a machine with internet access."
    ) from failures[-1]


def _images(dataset: Any) -> NDArray[np.uint8]:
    """Bring the images of any of the data sets to ``[N, H, W, 3]``."""
    images = np.asarray(dataset.data)
    if images.ndim == 3:
        return gray_to_rgb32(images)
    if images.shape[1] == 3:
        images = np.ascontiguousarray(images.transpose(0, 2, 3, 1))
    return images


def _labels(dataset: Any) -> NDArray[np.int64]:
    """Return the labels ``[N]``, which torchvision keeps under one of two names."""
    labels = dataset.targets if hasattr(dataset, "targets") else dataset.labels
    return np.asarray(labels).astype(np.int64)


def _classes(name: str, dataset: Any) -> tuple[str, ...]:
    """Return the names of the classes."""
    return DIGIT_NAMES if name in ("MNIST", "SVHN") else tuple(dataset.classes)
