"""Labelled images for training: what ``fit`` learns from."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tta_lightning.data.datasets import ImageSource
from tta_lightning.data.geometry import Geometry, ImageSize, geometry
from tta_lightning.errors import InputError


class LabelledBatch(NamedTuple):
    """One batch for training.

    Attributes:
        images: ``[B, 3, H, W]`` float32 in [0, 1].
        labels: ``[B]`` int64.
    """

    images: Tensor
    labels: Tensor


class LabelledImages(LightningDataModule):
    """Training, validation and test images with labels.

    Args:
        train: Images to train on.
        val: Images to choose a checkpoint by; None splits ``val_fraction`` off the training images.
        test: Images for ``tta test``; never looked at during ``fit``.
        val_fraction: Part of the training images that is held out when ``val`` is None.
        batch_size: Images a batch.
        crop_padding: Pad by this many px on each side and crop at random; 0 for none.
        flip: Mirror half of the training images left to right.
        limit: Use only this many training images, drawn with the seed; None for all.
        image_size: Side in px; ``model`` for the size the model was made for, ``keep`` for none.
        crop_pct: Part of the resized image that the centre crop keeps; None for the model's own.
        num_workers: Processes that load images.
        seed: Decides split and subset.

    Raises:
        InputError: An argument is not possible, or images lack labels.
    """

    def __init__(
        self,
        train: ImageSource,
        val: ImageSource | None = None,
        test: ImageSource | None = None,
        val_fraction: float = 0.1,
        batch_size: int = 128,
        crop_padding: int = 0,
        flip: bool = False,
        limit: int | None = None,
        image_size: ImageSize = "model",
        crop_pct: float | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (("batch_size", batch_size), ("limit", 1 if limit is None else limit)):
            if value < 1:
                raise InputError(f"{name} = {value}: expected 1 or more.")
        if seed < 0:
            raise InputError(f"seed = {seed}: expected 0 or more.")
        if not 0 < val_fraction < 1:
            raise InputError(f"val_fraction = {val_fraction}: expected a number between 0 and 1.")
        self.train, self.val, self.test = train, val, test
        self.batch_size = batch_size
        self.crop_padding, self.flip = crop_padding, flip
        self.image_size, self.crop_pct = image_size, crop_pct
        self.num_workers = num_workers
        self.geometry = geometry(image_size, crop_pct, None, 1.0, "bilinear")
        self._check_sources()
        order = np.random.default_rng(seed).permutation(len(train))[:limit]
        held_out = 0 if val is not None else max(1, round(val_fraction * len(order)))
        self._train_indices, self._val_indices = order[held_out:], order[:held_out]
        if len(self._train_indices) == 0:
            raise InputError(
                f"{len(order)} training images leave none to train on after the validation split. "
                "Give more images, or a source for val."
            )

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the classes in the order of the labels."""
        return self.train.classes

    def suit(self, input_size: int | None, crop_pct: float, interpolation: str) -> None:
        """Take over what the model was made for; see :meth:`Stream.suit`."""
        self.geometry = geometry(
            self.image_size, self.crop_pct, input_size, crop_pct, interpolation
        )

    def train_dataloader(self) -> DataLoader[LabelledBatch]:
        """Serve augmented training images in a new random order each epoch."""
        dataset = LabelledDataset(
            self.train, self._train_indices, self.geometry, self.crop_padding, self.flip
        )
        return self._loader(dataset, shuffle=True)

    def val_dataloader(self) -> DataLoader[LabelledBatch]:
        """Serve the validation images as they are."""
        if self.val is not None:
            return self._evaluation(self.val, np.arange(len(self.val)))
        return self._evaluation(self.train, self._val_indices)

    def test_dataloader(self) -> DataLoader[LabelledBatch]:
        """Serve the test images as they are.

        Raises:
            InputError: There are none.
        """
        if self.test is None:
            raise InputError("There are no test images: set `test` of LabelledImages to a source.")
        return self._evaluation(self.test, np.arange(len(self.test)))

    def _evaluation(
        self, source: ImageSource, indices: NDArray[np.int64]
    ) -> DataLoader[LabelledBatch]:
        return self._loader(LabelledDataset(source, indices, self.geometry), shuffle=False)

    def _loader(self, dataset: Dataset[LabelledBatch], shuffle: bool) -> DataLoader[LabelledBatch]:
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            shuffle=shuffle,
            drop_last=shuffle and len(self._train_indices) > self.batch_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )

    def _check_sources(self) -> None:
        for name, source in (("train", self.train), ("val", self.val), ("test", self.test)):
            if source is None:
                continue
            if (np.asarray(source.labels) < 0).any():
                raise InputError(f"{name} holds images without labels; training needs them all.")
            if source.classes != self.train.classes:
                raise InputError(
                    f"{name} and train name different classes ({source.classes} and "
                    f"{self.train.classes}). Use sources with the same ones."
                )


class LabelledDataset(Dataset[LabelledBatch]):
    """Some images of a source with their labels, each a `LabelledBatch` without batch dimension.

    Args:
        source: The images.
        indices: ``[N]``, which of them, in this order.
        size: How they are brought to one size.
        crop_padding: As in :class:`LabelledImages`.
        flip: As in :class:`LabelledImages`.
    """

    def __init__(
        self,
        source: ImageSource,
        indices: NDArray[np.int64],
        size: Geometry,
        crop_padding: int = 0,
        flip: bool = False,
    ) -> None:
        self.source, self.indices, self.geometry = source, indices, size
        self.crop_padding, self.flip = crop_padding, flip

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, number: int) -> LabelledBatch:
        index = int(self.indices[number])
        pixels = self.geometry(self.source.load(index))
        image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1).float() / 255
        return LabelledBatch(self._augment(image), torch.tensor(int(self.source.labels[index])))

    def _augment(self, image: Tensor) -> Tensor:
        """Crop and flip with torch's generator, which Lightning seeds in every worker."""
        padding = self.crop_padding
        if padding:
            height, width = image.shape[1:]
            image = torch.nn.functional.pad(image, (padding,) * 4)
            top, left = torch.randint(0, 2 * padding + 1, (2,)).tolist()
            image = image[:, top : top + height, left : left + width]
        if self.flip and torch.rand(()) < 0.5:
            image = image.flip(2)
        return image
