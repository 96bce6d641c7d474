"""Readers of ImageNet-C, ImageNet-R, ImageNet-A, ImageNet-Sketch and ImageNet-V2.

Classes carry their WordNet names (wnids, ``n01440764``), so a model's outputs can be matched.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tta_lightning.data.classes import imagenet_wnids, shorten
from tta_lightning.data.folders import (
    FileSource,
    StrPath,
    contents,
    existing_folder,
    label_by_folder,
    list_images,
    subfolders,
)
from tta_lightning.data.images import read_image
from tta_lightning.errors import InputError, unknown_name

_SEVERITIES = ("1", "2", "3", "4", "5")
_VARIANTS = ("r", "a", "sketch", "v2")


class ImageNetC(FileSource):
    """ImageNet-C as published: ``<corruption>/<severity>/<wnid>/*.JPEG``.

    arXiv:1903.12261. The same files must exist in every domain; this is checked when a domain is
    first read. Any number of corruptions, severities and classes may be present.

    Args:
        root: The folder with the corruptions' folders.

    Raises:
        InputError: The folder is missing or not laid out as above.
    """

    def __init__(self, root: StrPath) -> None:
        expected = "folders <corruption>/<severity 1 to 5>/<wnid>/ with images"
        folder = existing_folder(root, expected)
        self.domains = tuple(
            (corruption, int(severity))
            for corruption in subfolders(folder)
            for severity in subfolders(folder / corruption)
            if severity in _SEVERITIES
        )
        if not self.domains:
            raise InputError(
                f"{os.fspath(root)!r} holds {contents(folder)}. Expected {expected}: unpack the "
                "archives and give the folder that holds gaussian_noise, fog and so on."
            )
        first = _domain_folder(folder, *self.domains[0])
        wnids = subfolders(first)
        if not wnids:
            raise InputError(
                f"{str(first)!r} holds {contents(first)}. Expected one folder of images for each "
                "class, named by its wnid."
            )
        paths, labels = label_by_folder(first, wnids)
        super().__init__(root, paths, labels, wnids)
        self._complete = {self.domains[0]}

    def load(self, index: int, corruption: str = "none", severity: int = 0) -> NDArray[np.uint8]:
        """Read one image, see `ImageSource.load`."""
        self.check(index, corruption, severity)
        if (corruption, severity) not in self._complete:
            self._compare_files(corruption, severity)
            self._complete.add((corruption, severity))
        return read_image(self._folder / self.path(index, corruption, severity))

    def path(self, index: int, corruption: str = "none", severity: int = 0) -> str:
        """Return the path below `root`; without a domain the part that all domains share."""
        shared = self._paths[index]
        return shared if corruption == "none" else f"{corruption}/{severity}/{shared}"

    def _compare_files(self, corruption: str, severity: int) -> None:
        """Check that a domain holds the very files of the first one."""
        here = set(list_images(_domain_folder(self._folder, corruption, severity)))
        everywhere = set(self._paths)
        if here == everywhere:
            return
        assert self.domains is not None
        first = "/".join(map(str, self.domains[0]))
        missing, extra = sorted(everywhere - here), sorted(here - everywhere)
        differences = [f"{len(missing)} missing: {shorten(missing)}"] if missing else []
        differences += [f"{len(extra)} that {first} lacks: {shorten(extra)}"] if extra else []
        raise InputError(
            f"The files in {corruption}/{severity} of {self.root!r} differ from those in {first}; "
            f"{'; '.join(differences)}. Expected the same files in every domain: unpack the "
            "archives again, or remove the incomplete domain."
        )


class ImageNetVariant(FileSource):
    """New images of ImageNet's classes.

    * ``"r"``: ImageNet-R, renditions of 200 classes (arXiv:2006.16241), folders named by wnid.
    * ``"a"``: ImageNet-A, hard photographs of 200 classes (arXiv:1907.07174), same layout.
    * ``"sketch"``: ImageNet-Sketch, 1,000 classes (arXiv:1905.13549), same layout.
    * ``"v2"``: ImageNet-V2, 1,000 classes (arXiv:1902.10811), folders ``0`` to ``999`` named by
      the label. They are ordered as numbers here; as text, ``10`` would come before ``2``.

    `classes` are the wnids of the folders found, so a part of the classes can be read, too.

    Args:
        root: The folder that holds the class folders.
        name: Which of the four.

    Raises:
        InputError: The folder is missing, or a class folder is empty or not one of the data set's.
    """

    def __init__(self, root: StrPath, name: Literal["r", "a", "sketch", "v2"]) -> None:
        if name not in _VARIANTS:
            raise unknown_name("ImageNet variant", name, _VARIANTS)
        wnid_of = _wnids_by_folder(name)
        folder = existing_folder(root, f"the class folders of ImageNet-{name.upper()}")
        found = subfolders(folder)
        unknown = [entry for entry in found if entry not in wnid_of]
        if unknown or not found:
            problem = f"{len(unknown)} unknown folders: {shorten(unknown)}" if unknown else "none"
            raise InputError(
                f"{os.fspath(root)!r} does not look like ImageNet-{name.upper()}. Expected class "
                f"folders such as {shorten(list(wnid_of), 2)}; found {problem}. Give the folder "
                "that directly holds the class folders, and check `name`."
            )
        chosen = [entry for entry in wnid_of if entry in set(found)]
        paths, labels = label_by_folder(folder, chosen)
        super().__init__(root, paths, labels, [wnid_of[entry] for entry in chosen])
        self.name = name

    def describe(self) -> dict[str, Any]:
        """Describe the reader, see `ImageSource.describe`."""
        return {**super().describe(), "name": self.name}


def _wnids_by_folder(name: str) -> dict[str, str]:
    """Map the class folders that a variant may hold to wnids, in the order of the labels."""
    if name == "v2":
        return {str(label): wnid for label, wnid in enumerate(imagenet_wnids())}
    subset = "" if name == "sketch" else name
    return {wnid: wnid for wnid in imagenet_wnids(subset)}


def _domain_folder(root: Path, corruption: str, severity: int) -> Path:
    return root / corruption / str(severity)
