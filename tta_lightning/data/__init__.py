"""Streams: where images come from, how they are corrupted, and in which order they arrive."""

from tta_lightning.data.datasets import (
    CIFAR10C,
    CIFAR100C,
    ArraySource,
    BadImageError,
    Digits,
    ImageFolder,
    ImageNetC,
    ImageNetVariant,
    ImageSource,
    TorchvisionDataset,
    UnlabelledImages,
)
from tta_lightning.data.labelled import LabelledImages
from tta_lightning.data.plan import Domain, Plan, Segment
from tta_lightning.data.shifted import ShiftedBatch, ShiftedImages
from tta_lightning.data.stream import Stream, StreamBatch

__all__ = [
    "CIFAR10C",
    "CIFAR100C",
    "ArraySource",
    "BadImageError",
    "Digits",
    "Domain",
    "ImageFolder",
    "ImageNetC",
    "ImageNetVariant",
    "ImageSource",
    "LabelledImages",
    "Plan",
    "Segment",
    "ShiftedBatch",
    "ShiftedImages",
    "Stream",
    "StreamBatch",
    "TorchvisionDataset",
    "UnlabelledImages",
]
