"""All readers of images, by the names that configurations use."""

from tta_lightning.data.arrays import ArraySource, Digits
from tta_lightning.data.cifar_c import CIFAR10C, CIFAR100C
from tta_lightning.data.classes import class_indices
from tta_lightning.data.folders import ImageFolder, UnlabelledImages
from tta_lightning.data.imagenet import ImageNetC, ImageNetVariant
from tta_lightning.data.images import BadImageError, read_image
from tta_lightning.data.source import ImageSource
from tta_lightning.data.torchvision_source import TorchvisionDataset

__all__ = [
    "CIFAR10C",
    "CIFAR100C",
    "ArraySource",
    "BadImageError",
    "Digits",
    "ImageFolder",
    "ImageNetC",
    "ImageNetVariant",
    "ImageSource",
    "TorchvisionDataset",
    "UnlabelledImages",
    "class_indices",
    "read_image",
]
