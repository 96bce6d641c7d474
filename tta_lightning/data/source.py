"""What every reader of images offers."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tta_lightning.errors import InputError, unknown_name


class ImageSource(ABC):
    """Images by index, with labels where there are any.

    A reader only knows where images are. Their order, their corruption on the fly and their
    batching are the business of `Stream`. Readers can be pickled, so that DataLoader workers get
    a copy; file handles are opened in the process that reads.

    To write your own, set `labels` (and `classes`, if known) and implement `load` and `path`.

    Attributes:
        classes: Names in the order of the labels; None when there are none.
        labels: ``[N]``, index into `classes`, -1 where unknown.
        domains: The (corruption, severity) pairs that are stored on disk, severities 1 to 5;
            None when the images are clean and may be corrupted after loading.
        root: Folder of the files as the user gave it; None for images that are not in a folder.
    """

    classes: tuple[str, ...] | None = None
    labels: NDArray[np.int64]
    domains: tuple[tuple[str, int], ...] | None = None
    root: str | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def load(self, index: int, corruption: str = "none", severity: int = 0) -> NDArray[np.uint8]:
        """Read one image.

        Args:
            index: Which image, 0 to ``len(self) - 1``.
            corruption: Name of a corruption that is stored on disk, or ``"none"``.
            severity: Its severity 1 to 5, or 0 with ``"none"``.

        Returns:
            Pixels ``[H, W, 3]``, a copy that the caller may change.

        Raises:
            IndexError: There is no such image.
            InputError: The domain is not stored here, or the file cannot be read.
        """

    @abstractmethod
    def path(self, index: int, corruption: str = "none", severity: int = 0) -> str:
        """Say where an image lies: its path below `root`, or ``"name[index]"``."""

    def describe(self) -> dict[str, Any]:
        """Describe the reader in plain values, for the manifest of a run."""
        return {
            "class": type(self).__name__,
            "root": self.root,
            "images": len(self),
            "classes": None if self.classes is None else len(self.classes),
            "digest": self.digest(),
        }

    def digest(self) -> str:
        """Return the SHA-256 (hex) of the list of paths and labels, one ``path<TAB>label`` a line.

        Two readers with the same digest give the same meaning to every index.
        """
        listing = hashlib.sha256()
        for index, label in enumerate(self.labels.tolist()):
            # surrogateescape: names of files need not be valid UTF-8
            line = f"{self.path(index)}\t{label}\n"
            listing.update(line.encode("utf-8", "surrogateescape"))
        return listing.hexdigest()

    def check(self, index: int, corruption: str, severity: int) -> None:
        """Refuse what `load` cannot give; every `load` calls this first.

        Raises:
            IndexError: There is no such image.
            InputError: The domain is not among those stored here.
        """
        if not 0 <= index < len(self):
            raise IndexError(
                f"Image {index} does not exist: {type(self).__name__} holds {len(self)} images, "
                "counted from 0."
            )
        if self.domains is None:
            if corruption != "none" or severity != 0:
                raise InputError(
                    f"{type(self).__name__} holds clean images only, not {corruption!r} at "
                    f"severity {severity}. Load the clean image and corrupt it afterwards."
                )
        elif (corruption, severity) not in self.domains:
            raise self._unknown_domain(corruption, severity)

    def _unknown_domain(self, corruption: str, severity: int) -> InputError:
        """Say which domains are stored, given one that is not."""
        stored = self.domains or ()
        names = {name for name, _ in stored}
        if corruption == "none":
            return InputError(
                f"{type(self).__name__} at {self.root!r} holds no clean images. Stored "
                f"corruptions: {', '.join(sorted(names))}. Give the clean images their own reader."
            )
        if corruption not in names:
            return unknown_name("corruption", corruption, names)
        severities = ", ".join(str(level) for name, level in stored if name == corruption)
        return InputError(
            f"{corruption!r} is not stored at severity {severity} in {self.root!r}; it is at "
            f"{severities}. Choose one of these."
        )
