"""Streams: where images come from, how they are corrupted, and in which order they arrive."""

from tta_lightning.data.batches import StreamBatch
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
from tta_lightning.data.stream import Stream
from tta_lightning.data.tasks import LabelledTasks, TaskBatch

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
    "LabelledTasks",
    "Plan",
    "Segment",
    "ShiftedBatch",
    "ShiftedImages",
    "Stream",
    "StreamBatch",
    "TaskBatch",
    "TorchvisionDataset",
    "UnlabelledImages",
]
