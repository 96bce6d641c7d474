"""Whether runs can be compared: where their protocols differ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from tta_lightning.report.run import Run

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


def source_of(run: Run, runs: Sequence[Run]) -> Run | None:
    """Find the run of the source model that a run is measured against.

    Args:
        run: A run.
        runs: Runs to look among.

    Returns:
        The first run of the method Source with the same weights and the same protocol; None where
        there is none, and for a run of Source itself.
    """
    if run.is_source:
        return None
    sources = (other for other in runs if other.is_source and other.model == run.model)
    return next((source for source in sources if not differences([run, source])), None)


def _protocol(run: Run) -> dict[str, Any]:
    return {
        **dict(stream_fields(run.settings["stream"] or {})),
        "segments": list(run.accuracies),
        "images": run.results["overall"]["images"],
        "precision": run.settings["precision"],
        "completed": run.results["completed"],
    }


def stream_fields(stream: dict[str, Any]) -> Iterator[tuple[str, Any]]:
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
