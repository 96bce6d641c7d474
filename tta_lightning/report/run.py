"""A finished run as it lies in its folder, and whether runs can be compared."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tta_lightning.errors import InputError

# What a plan says of a stream: where plans are equal, the manifests may differ in how they say it.
_SAID_BY_PLAN = {
    *("scenario", "scenario_options", "corruptions", "severity", "limit", "subset"),
    *("domains", "resets", "window", "reset_each_batch", "subset_sha256"),
}
# Clean images belong to the method. The others are what was asked for: what was done is in the
# geometry, and in the number of images that the metrics have.
_NO_PROTOCOL = {
    *("clean", "clean_batch_size"),
    *("image_size", "crop_pct", "on_bad_image", "images"),
}
_MOST_TELLING = (
    *("scenario", "scenario_options", "window", "reset_each_batch", "batch_size", "seed"),
    *("corruptions", "severity", "completed", "precision"),
)


@dataclass(frozen=True)
class Run:
    """A finished run, read from its folder.

    Attributes:
        folder: The folder.
        manifest: What ``manifest.json`` holds.
        metrics: What ``metrics.json`` holds.
    """

    folder: Path
    manifest: dict[str, Any]
    metrics: dict[str, Any]

    @classmethod
    def load(cls, folder: str | Path) -> Run:
        """Read a run.

        Raises:
            InputError: The folder is missing or holds no finished run.
        """
        return cls(
            Path(folder),
            _read(Path(folder, "manifest.json")),
            _read(Path(folder, "metrics.json")),
        )

    @property
    def model(self) -> str:
        """What identifies the source model: the hash of its weights."""
        return str(self.manifest["model"]["weights_sha256"])

    @property
    def method(self) -> str:
        """Name of the method."""
        return str(self.manifest["method"]["name"])

    @property
    def is_source(self) -> bool:
        """Whether this is the model without adaptation."""
        return self.method == "Source"

    @property
    def accuracies(self) -> dict[str, float | None]:
        """Accuracy of each segment in the order of the stream; None without labels."""
        return {s["segment"]: s["accuracy"] for s in self.metrics["segments"]}

    def mean(self, segments: Iterable[str]) -> float | None:
        """Return the mean accuracy over those of the segments that it has; None if it has none."""
        own = self.accuracies
        known = [value for name in segments if (value := own.get(name)) is not None]
        return sum(known) / len(known) if known else None


def labels(runs: Sequence[Run]) -> list[str]:
    """Name runs by their folders, as short as tells them apart.

    Args:
        runs: Runs in different folders.

    Returns:
        For each run the name of its folder, and as much of the path before it as is needed where
        several folders have one name: ``a/tent``, ``b/tent``.
    """
    parts = [run.folder.absolute().parts for run in runs]
    return [_shortest(own, [*parts[:i], *parts[i + 1 :]]) for i, own in enumerate(parts)]


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Find where the protocols of runs differ: stream, precision, completeness.

    Args:
        runs: Runs.

    Returns:
        Name of the field to its value in each run, the most telling fields first and hashes last;
        empty when the runs are comparable.
    """
    protocols = [_protocol(run) for run in runs]
    plans = {protocol.get("stream.plan_sha256") for protocol in protocols}
    said = _SAID_BY_PLAN if len(plans) == 1 and None not in plans else set()
    fields = {field for protocol in protocols for field in protocol if _part(field) not in said}
    values = {f: [protocol.get(f) for protocol in protocols] for f in sorted(fields, key=_rank)}
    return {field: found for field, found in values.items() if any(v != found[0] for v in found)}


def is_hash(field: str) -> bool:
    """Whether a field of a protocol is a hash: it says that two things differ, and not in what."""
    return field.endswith(("sha256", "digest"))


def _shortest(own: tuple[str, ...], others: Sequence[tuple[str, ...]]) -> str:
    """Join as few of the last parts of a path as no other path ends with."""
    for count in range(1, len(own)):
        if all(other[-count:] != own[-count:] for other in others):
            return "/".join(own[-count:])
    return str(Path(*own))


def _protocol(run: Run) -> dict[str, Any]:
    return {
        **dict(_stream_fields(run.manifest["stream"] or {})),
        "segments": list(run.accuracies),
        "images": run.metrics["overall"]["images"],
        "precision": run.manifest["precision"],
        "completed": run.metrics["completed"],
    }


def _stream_fields(stream: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield what a stream is, without where its images lie: their digest says which they are."""
    for key, value in stream.items():
        if key in _NO_PROTOCOL:
            continue
        if isinstance(value, dict):
            known = value
            if key == "geometry" and value.get("size") is None:
                known = {"size": None}  # images stay as they are, whatever the crop would be
            yield from ((f"stream.{key}.{k}", v) for k, v in known.items() if k != "root")
        else:
            yield f"stream.{key}", value


def _part(field: str) -> str:
    """Return which part of the manifest's stream a field is of, else the field itself."""
    return field.removeprefix("stream.").partition(".")[0]


def _rank(field: str) -> tuple[int, str]:
    """Order fields: the telling ones, the others by name, long lists, hashes."""
    part = _part(field)
    if part in _MOST_TELLING:
        return _MOST_TELLING.index(part), field
    late = 2 if is_hash(field) else 1 if part in ("domains", "resets", "segments") else 0
    return len(_MOST_TELLING) + late, field


def _read(path: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{path} cannot be read: {error.strerror}. Give folders that `tta adapt` wrote and "
            "that came to an end."
        ) from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}. The run cannot be compared.") from error
    return values
