"""Names of classes, and where the classes of a data set are among those of a model."""

from __future__ import annotations

import difflib
import importlib.util
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from tta_lightning.errors import InputError

DIGIT_NAMES = ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")

_CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck"
CIFAR10_NAMES = tuple(_CIFAR10.split())

# The fine labels of CIFAR-100 are numbered in alphabetical order.
_CIFAR100 = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly
camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile
cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp
lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom
oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake
spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor
train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""
CIFAR100_NAMES = tuple(_CIFAR100.split())


@cache
def imagenet_wnids(subset: str = "") -> tuple[str, ...]:
    """Return the WordNet names (``n01440764``, ...) of ImageNet-1k or of a part of it.

    The lists are text files of timm. They are read without importing timm, which takes seconds.

    Args:
        subset: ``""`` for all 1,000 in the order of the labels, ``"r"`` or ``"a"`` for the 200 of
            ImageNet-R or ImageNet-A.
    """
    spec = importlib.util.find_spec("timm")
    assert spec is not None, "timm is a requirement of this package"
    assert spec.submodule_search_locations is not None
    name = f"imagenet_{subset}_synsets.txt" if subset else "imagenet_synsets.txt"
    file = Path(spec.submodule_search_locations[0]) / "data" / "_info" / name
    return tuple(file.read_text(encoding="utf-8").split())


def class_indices(folder_names: Sequence[str], model_names: Sequence[str]) -> list[int]:
    """Find the classes of a data set among the outputs of a model.

    Args:
        folder_names: Names of the data set's classes, in the order of its labels.
        model_names: Names of the model's outputs, in their order.

    Returns:
        For each data set class the index of the model's output.

    Raises:
        InputError: A class is unknown to the model, or its name stands for several outputs.
    """
    position = {name: index for index, name in enumerate(model_names)}
    unknown = [name for name in folder_names if name not in position]
    if unknown:
        close = difflib.get_close_matches(unknown[0], model_names, n=1, cutoff=0.5)
        hint = f" Nearest to {unknown[0]!r}: {close[0]!r}." if close else ""
        raise InputError(
            f"{len(unknown)} of {len(folder_names)} classes of the data are unknown to the model: "
            f"{shorten(unknown)}.{hint} The model knows {len(model_names)}: "
            f"{shorten(model_names)}. Rename the class folders, leave out those that the model "
            "does not know, or use a model that was trained on these classes."
        )
    uses = Counter(model_names)
    ambiguous = [name for name in folder_names if uses[name] > 1]
    if ambiguous:
        raise InputError(
            f"{len(ambiguous)} class names stand for more than one output of the model: "
            f"{shorten(ambiguous)}. Expected one output a name: give the model distinct "
            "class names."
        )
    return [position[name] for name in folder_names]


def shorten(names: Sequence[str], limit: int = 5) -> str:
    """List the first few names for a message, and say that there are more."""
    shown = ", ".join(repr(name) for name in names[:limit])
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown
