"""A finished run as it lies in its folder: as it was written, and as tidy frames."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tta_lightning.errors import InputError, nearest_path

if TYPE_CHECKING:  # half a second to import, which `tta --help` does not have
    import pandas as pd

_TYPES = {
    **{"index": "int64", "path": "str", "segment": "str", "corruption": "str"},
    **{"severity": "Int64", "label": "Int64", "prediction": "int64"},
    **{"confidence": "float64", "entropy": "float64", "updated": "int8"},
}


@dataclass(frozen=True)
class Run:
    """A finished run, read from its folder.

    The frames are read when they are first asked for, and kept. One that is changed in place stays
    changed: take a copy.

    Attributes:
        folder: The folder.
        settings: What ``manifest.json`` holds, nested as it is.
        results: What ``metrics.json`` holds, nested as it is.
    """

    folder: Path
    settings: dict[str, Any]
    results: dict[str, Any]

    @classmethod
    def load(cls, folder: str | Path) -> Run:
        """Read a run.

        Args:
            folder: Folder that ``tta adapt`` or ``Trainer.adapt`` wrote.

        Raises:
            InputError: The folder is missing or holds no finished run.
        """
        return cls(
            Path(folder),
            _read(Path(folder, "manifest.json"), ("method", "model", "stream", "precision")),
            _read(Path(folder, "metrics.json"), ("completed", "batches", "overall", "segments")),
        )

    # Frames --------------------------------------------------------------------------------------

    @cached_property
    def predictions(self) -> pd.DataFrame:
        """A row an image, in the order of the stream.

        Columns: ``index`` of the image in its source, ``path``, ``segment``, ``corruption`` (empty
        where the stream has no plan), ``severity`` and ``label`` (missing where unknown),
        ``prediction`` (-1 where the logits are not finite), ``confidence`` (a fraction),
        ``entropy`` (nats), ``updated`` (whether the model learnt from the image's batch),
        ``correct`` (missing without a label), ``batch`` (from 0; missing where the run recorded
        no batches).

        Raises:
            InputError: ``predictions.csv`` is missing or was changed.
        """
        import pandas as pd

        path = self.folder / "predictions.csv"
        try:
            frame = pd.read_csv(path, dtype=_TYPES, keep_default_na=False, na_values=_EMPTY)
            frame = frame[list(_TYPES)]
        except OSError as error:
            raise InputError(
                f"{path} cannot be read: {error.strerror}. The run needs the callback "
                "PredictionWriter, which is on by default."
            ) from error
        except (ValueError, KeyError) as error:  # of pandas: not a number, a column that lacks
            raise InputError(
                f"{path} is not as it was written: {error}. Run the adaptation again."
            ) from error
        frame["updated"] = frame["updated"].astype(bool)
        frame["correct"] = (frame["prediction"] == frame["label"]).astype("boolean")
        sizes = self.results.get("curve", {}).get("images", [])
        known = sum(sizes) == len(frame)
        batch = np.repeat(np.arange(len(sizes)), sizes) if known else pd.NA
        frame["batch"] = pd.Series(batch, index=frame.index, dtype="Int64")
        return frame

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """A row a segment, in the order of the stream.

        Columns: ``segment``, ``images``, ``accuracy``, ``error``, ``nll`` (nats), ``ece``,
        ``entropy`` (nats), ``confidence``. Fractions; missing where nothing was labelled or finite.
        """
        import pandas as pd

        rows = self.results.get("segments", [])
        frame = pd.DataFrame(rows, columns=_METRICS if not rows else None)
        figures = [name for name in frame.columns if name not in ("segment", "images")]
        return frame.astype(dict.fromkeys(figures, "float64"))

    @cached_property
    def curve(self) -> pd.DataFrame:
        """A row a batch, in the order of the stream.

        Columns: ``batch`` (from 0), ``segment``, ``images`` in the batch, ``seen`` (images up to
        and with this batch), ``correct`` (a count; missing without labels), ``accuracy`` of the
        batch, ``running_accuracy`` of the segment up to and with this batch (both of the labelled
        images), ``entropy`` (mean of the batch, nats), ``running_entropy``.
        """
        import pandas as pd

        curve = self.results.get("curve", {"segments": [], "images": [], "correct": None})
        images = np.asarray(curve["images"], np.int64)
        correct = np.asarray(curve["correct"] or [np.nan] * len(images), np.float64)
        labelled = np.asarray(curve.get("labelled", images), np.float64)
        entropy = np.array(curve.get("entropy", []), np.float64)  # None becomes NaN
        starts = [segment["batch"] for segment in curve["segments"]]
        lengths = np.diff([*starts, len(images)])
        visit = np.repeat(np.arange(len(starts)), lengths)
        names = np.array([segment["segment"] for segment in curve["segments"]], dtype=object)
        frame = pd.DataFrame(
            {
                "batch": np.arange(len(images)),
                "segment": names[visit] if len(visit) else names,
                "images": images,
                "seen": images.cumsum(),
                "correct": correct,
                "accuracy": correct / np.where(labelled > 0, labelled, np.nan),
            }
        )
        within = pd.Series(labelled).groupby(visit).cumsum()
        right = frame["correct"].groupby(visit).cumsum()
        frame["running_accuracy"] = right / within.where(within > 0)
        frame["entropy"] = entropy
        known = frame["images"] * np.isfinite(entropy)  # a batch of NaN has no entropy
        total = (known * np.nan_to_num(entropy)).groupby(visit).cumsum()
        frame["running_entropy"] = total / known.groupby(visit).cumsum()
        return frame

    @cached_property
    def manifest(self) -> pd.DataFrame:
        """A row a field of the manifest.

        Columns: ``field`` (names joined by dots: ``stream.batch_size``), ``value`` (as it is in
        ``manifest.json``; a list stays one value).
        """
        import pandas as pd

        return pd.DataFrame(list(_fields(self.settings)), columns=["field", "value"], dtype=object)

    # What it was ---------------------------------------------------------------------------------

    @property
    def model(self) -> str:
        """What identifies the source model: the hash of its weights."""
        return str(self.settings["model"]["weights_sha256"])

    @property
    def method(self) -> str:
        """Name of the method."""
        return str(self.settings["method"]["name"])

    @property
    def is_source(self) -> bool:
        """Whether this is the model without adaptation."""
        return self.method == "Source"

    @property
    def accuracies(self) -> dict[str, float | None]:
        """Accuracy of each segment in the order of the stream; None without labels."""
        return {s["segment"]: s["accuracy"] for s in self.results["segments"]}

    def mean(self, segments: Iterable[str]) -> float | None:
        """Return the mean accuracy over those of the segments that it has; None if it has none."""
        own = self.accuracies
        known = [value for name in segments if (value := own.get(name)) is not None]
        return sum(known) / len(known) if known else None


_EMPTY = {"severity": [""], "label": [""], "confidence": ["nan"], "entropy": ["nan"]}
_METRICS = ["segment", "images", "accuracy", "error", "nll", "ece", "entropy", "confidence"]


def labels(runs: Sequence[Run]) -> list[str]:
    """Name runs by their folders, as short as tells them apart.

    Args:
        runs: Runs in different folders.

    Returns:
        For each run the name of its folder, and as much of the path before it as is needed where
        several folders have one name: ``a/tent``, ``b/tent``.
    """
    # names of folders need not be valid UTF-8; what is not is escaped
    folders = [os.fsencode(run.folder.absolute()).decode(errors="backslashreplace") for run in runs]
    parts = [Path(folder).parts for folder in folders]
    return [_shortest(own, [*parts[:i], *parts[i + 1 :]]) for i, own in enumerate(parts)]


def _shortest(own: tuple[str, ...], others: Sequence[tuple[str, ...]]) -> str:
    """Join as few of the last parts of a path as no other path ends with."""
    for count in range(1, len(own)):
        if all(other[-count:] != own[-count:] for other in others):
            return "/".join(own[-count:])
    return str(Path(*own))


def _fields(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested dicts by their dotted names."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _fields(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value


def _read(path: Path, fields: Sequence[str]) -> dict[str, Any]:
    """Read a file of a run, which has these fields."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        hint = "" if path.parent.exists() else nearest_path(path.parent)
        raise InputError(
            f"{path} cannot be read: {error.strerror}.{hint} Give folders that `tta adapt` wrote "
            "and that came to an end."
        ) from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}. The run cannot be read.") from error
    missing = [f for f in fields if not isinstance(values, dict) or f not in values]
    if missing:
        raise InputError(
            f"{path} is not of a run: it has no {', '.join(missing)}. Give folders that `tta "
            "adapt` wrote."
        )
    found: dict[str, Any] = values
    return found
