"""Folders of runs, written by hand: what ``tta adapt`` leaves of them for ``tta compare``."""

import json
from pathlib import Path

PLAN = "1f" * 32
SUBSET = "2e" * 32


def stream(**changed):
    """What a manifest says of a stream of fog and snow; None for `plan_sha256` leaves it out."""
    return {
        "scenario": "reset_each_shift",
        "corruptions": ["fog", "snow"],
        "severity": 5,
        "batch_size": 10,
        "limit": 20,
        "subset": "sample",
        "seed": 0,
        "table": "imagenet",
        "image_size": "model",
        "crop_pct": None,
        "on_bad_image": "stop",
        "scenario_options": {},
        "source": {"class": "ImageFolder", "root": "here", "digest": "3d" * 32},
        "clean": None,
        "images": 40,
        "domains": ["fog-5", "snow-5"],
        "resets": ["fog-5", "snow-5"],
        "geometry": {"size": 32, "crop_pct": 1.0, "interpolation": "bilinear"},
        "plan_sha256": PLAN,
        "subset_sha256": SUBSET,
        **changed,
    }


def metrics(accuracies, **changed):
    """What the metrics of a run say, one batch of 20 images a segment."""
    names = list(accuracies)
    return {
        "completed": True,
        "batches": len(names),
        "nonfinite_batches": 0,
        "bad_images": {"count": 0, "files": []},
        "overall": {"images": 20 * len(names), "nll": None, "ece": None, "entropy": None},
        "segments": [{"segment": n, "accuracy": a, "entropy": 1.0} for n, a in accuracies.items()],
        "curve": {
            "segments": [{"segment": name, "batch": i} for i, name in enumerate(names)],
            "images": [20] * len(names),
            "correct": [round(20 * (a or 0)) for a in accuracies.values()],
            "entropy": [1.0] * len(names),
        },
        **changed,
    }


def put_run(
    folder: Path, method="Tent", accuracies=None, *, served=None, measured=None, **manifest
) -> Path:
    """Write the folder of a run.

    Args:
        folder: Where to.
        method: Name of the method.
        accuracies: Segment to accuracy.
        served: The stream's part of the manifest.
        measured: The metrics.
        manifest: Other fields of the manifest that differ from the usual.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True)
    values = {
        "method": {"name": method},
        "model": {"weights_sha256": "4c" * 32},
        "stream": stream() if served is None else served,
        "precision": "32-true",
        **manifest,
    }
    measured = (
        metrics(accuracies or {"fog-5": 0.5, "snow-5": 0.75}) if measured is None else measured
    )
    (folder / "manifest.json").write_text(json.dumps(values))
    (folder / "metrics.json").write_text(json.dumps(measured))
    return folder
