"""Readers of image files in folders."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tta_lightning.data.classes import shorten
from tta_lightning.data.images import IMAGE_SUFFIXES, read_image
from tta_lightning.data.source import ImageSource
from tta_lightning.errors import InputError, unknown_name

StrPath = str | os.PathLike[str]


def existing_folder(root: StrPath, expected: str) -> Path:
    """Return `root` as a path, with ``~`` expanded.

    Raises:
        InputError: There is no such folder; the message says what was `expected` there.
    """
    try:
        folder = Path(root).expanduser()
        if folder.is_dir():
            return folder
        is_there = folder.exists()
    except (OSError, RuntimeError) as error:  # too long a name, or the home of nobody
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"{os.fspath(root)[:200]!r} cannot be a folder ({reason}). Expected {expected}."
        ) from error
    if is_there:
        found = "is a file, not a folder; unpack it first if it is an archive"
    else:
        found = "does not exist"
    raise InputError(f"{os.fspath(root)!r} {found}. Expected {expected}.")


def subfolders(folder: Path) -> list[str]:
    """List the names of the folders in a folder, sorted, without hidden ones.

    Raises:
        InputError: The folder may not be read.
    """
    return sorted(entry.name for entry in _entries(folder) if _is_folder(entry))


def list_images(root: Path, below: str = "") -> list[str]:
    """List the image files in a folder and in the folders inside it.

    Hidden files (``.DS_Store``, ``._x.jpg``) and folders are left out. Links are followed, but no
    folder is entered twice and none that holds `root`, so a circle of links ends.

    Args:
        root: What the paths in the result are relative to.
        below: The folder inside `root` to look into, ``""`` for `root` itself.

    Returns:
        Paths with ``/`` between their parts, in the order of their characters, so that the same
        files have the same order on every machine.

    Raises:
        InputError: A folder may not be read.
    """
    entered = {_identity(folder) for folder in root.resolve().parents}
    if below:
        entered.add(_identity(root))
    found: list[str] = []
    pending = [below]
    while pending:
        relative = pending.pop()
        identity = _identity(root / relative)
        if identity in entered:
            continue
        entered.add(identity)
        for entry in _entries(root / relative):
            path = f"{relative}/{entry.name}" if relative else entry.name
            if _is_folder(entry):
                pending.append(path)
            elif entry.name.lower().endswith(IMAGE_SUFFIXES):
                found.append(path)
    return sorted(found)


def label_by_folder(root: Path, folders: Sequence[str]) -> tuple[list[str], NDArray[np.int64]]:
    """List the images of class folders.

    Args:
        root: The folder that holds the class folders.
        folders: Their names, in the order of the labels.

    Returns:
        Paths relative to `root` and labels ``[N]``, the positions in `folders`.

    Raises:
        InputError: A class folder holds no images.
    """
    listings = [list_images(root, below=name) for name in folders]
    empty = [name for name, files in zip(folders, listings, strict=True) if not files]
    if empty:
        raise InputError(
            f"{len(empty)} of {len(folders)} class folders in {str(root)!r} hold no images: "
            f"{shorten(empty)}. Expected {_suffixes()} files in each: remove the empty folders "
            "or fill them."
        )
    counts = [len(files) for files in listings]
    labels = np.repeat(np.arange(len(folders), dtype=np.int64), counts)
    return [path for files in listings for path in files], labels


def contents(folder: Path) -> str:
    """Say in a few words what is in a folder, for messages."""
    names = sorted(f"{e.name}/" if _is_folder(e) else e.name for e in _entries(folder))
    return f"{shorten(names)} ({len(names)} in all)" if names else "nothing"


class FileSource(ImageSource):
    """Base of the readers with one image file for each index.

    Args:
        root: Folder that the paths are relative to.
        paths: ``[N]`` paths relative to `root`.
        labels: ``[N]``.
        classes: Names in the order of the labels, or None.
    """

    def __init__(
        self,
        root: StrPath,
        paths: list[str],
        labels: NDArray[np.int64],
        classes: Sequence[str] | None,
    ) -> None:
        self.root = os.fspath(root)
        self.labels = labels
        self.classes = None if classes is None else tuple(classes)
        self._folder = Path(root).expanduser()
        self._paths = paths

    def load(self, index: int, corruption: str = "none", severity: int = 0) -> NDArray[np.uint8]:
        """Read one image, see `ImageSource.load`."""
        self.check(index, corruption, severity)
        return read_image(self._folder / self._paths[index])

    def path(self, index: int, corruption: str = "none", severity: int = 0) -> str:
        """Return the path below `root`; it is the same for every domain."""
        return self._paths[index]


class ImageFolder(FileSource):
    """Images in one folder a class: ``root/cat/1.jpg``, ``root/dog/a/2.png``.

    Args:
        root: The folder that holds the class folders.
        classes: Names of the class folders to read, in the order of the labels. The others are
            left out. Default: all, sorted by name.

    Raises:
        InputError: The folder is missing, holds no class folders, or a class holds no images.
    """

    def __init__(self, root: StrPath, classes: list[str] | None = None) -> None:
        folder = existing_folder(root, "a folder with one folder of images for each class")
        names = subfolders(folder)
        if not names:
            raise InputError(
                f"No class folders in {os.fspath(root)!r}, which holds {contents(folder)}. "
                "Expected one folder of images for each class; for images without labels use "
                "UnlabelledImages."
            )
        if classes is not None:
            names = _chosen(classes, names)
        paths, labels = label_by_folder(folder, names)
        super().__init__(root, paths, labels, names)


class UnlabelledImages(FileSource):
    """All images in a folder and the folders inside it, sorted by path, without labels.

    Args:
        root: The folder.

    Raises:
        InputError: The folder is missing or holds no images.
    """

    def __init__(self, root: StrPath) -> None:
        folder = existing_folder(root, "a folder with images")
        paths = list_images(folder)
        if not paths:
            raise InputError(
                f"No images in {os.fspath(root)!r}, which holds {contents(folder)}. "
                f"Expected {_suffixes()} files, in it or in folders inside it."
            )
        super().__init__(root, paths, np.full(len(paths), -1, dtype=np.int64), None)


def _chosen(classes: Sequence[str], names: Sequence[str]) -> list[str]:
    """Check the classes that a user chose among the folders found."""
    if not classes:
        raise InputError("`classes` is empty. Name at least one class folder, or leave it out.")
    for name in classes:
        if name not in names:
            raise unknown_name("class folder", name, names)
    if len(set(classes)) < len(classes):
        raise InputError(f"`classes` names a folder twice: {shorten(classes)}. Name each once.")
    return list(classes)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """List what is in a folder, by name, without hidden entries."""
    try:
        with os.scandir(folder) as entries:
            visible = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise InputError(
            f"Cannot list the folder {str(folder)!r}: {error.strerror}. Expected a folder that "
            "you may read."
        ) from error
    return sorted(visible, key=lambda entry: entry.name)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Tell whether an entry is a folder or a link to one; a broken link is not."""
    # Path.is_dir answers False for a link to itself, where DirEntry.is_dir raises.
    return Path(entry.path).is_dir() if entry.is_symlink() else entry.is_dir()


def _identity(folder: Path) -> tuple[int, int]:
    """Return what is the same for all paths of one folder."""
    status = folder.stat()
    return status.st_dev, status.st_ino


def _suffixes() -> str:
    return ", ".join(IMAGE_SUFFIXES)
