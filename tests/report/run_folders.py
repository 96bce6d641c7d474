"""Folders of runs, written by hand: what ``tta adapt`` leaves for compare and report."""

import csv
import json
from pathlib import Path

from tta_lightning.callbacks.predictions import COLUMNS

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
        "method": {"name": method} if isinstance(method, str) else method,
        "model": {"name": "models.Net", "weights_sha256": "4c" * 32},
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


def put_predictions(folder: Path, rows) -> Path:
    """Write ``predictions.csv``.

    Args:
        folder: Of a run.
        rows: For each image its segment, label (None where unknown), prediction and, where it is
            not 0.9, confidence.

    Returns:
        The folder.
    """
    with (folder / "predictions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for number, (segment, label, prediction, *rest) in enumerate(rows):
            corruption, _, severity = segment.partition(" ")[0].rpartition("-")
            confidence = rest[0] if rest else 0.9
            given = "" if label is None else label
            image = [number, f"{number}.png", segment, corruption, severity, given]
            writer.writerow([*image, prediction, f"{confidence:.6f}", "0.500000", 1])
    return folder


def put_whole_run(folder: Path, method, rows, *, batch=10, served=None, cost=None, **manifest):
    """Write the folder of a run whose figures follow from its predictions.

    Args:
        folder: Where to.
        method: Name of the method, or what the manifest says of it.
        rows: As of :func:`put_predictions`.
        batch: Images a batch.
        served: The stream's part of the manifest.
        cost: What CostMonitor measured.
        manifest: Other fields of the manifest that differ from the usual.

    Returns:
        The folder.
    """
    segments = list(dict.fromkeys(row[0] for row in rows))
    entries, starts, images, correct = [], [], [], []
    for segment in segments:
        own = [row for row in rows if row[0] == segment]
        labelled = own[0][1] is not None
        right = [label == prediction for _, label, prediction, *_ in own]
        starts.append({"segment": segment, "batch": len(images)})
        for place in range(0, len(own), batch):
            images.append(len(own[place : place + batch]))
            correct.append(sum(right[place : place + batch]))
        accuracy = sum(right) / len(own) if labelled else None
        entries.append(
            {
                **{"segment": segment, "images": len(own), "accuracy": accuracy},
                **{"error": None if accuracy is None else 1 - accuracy, "nll": None, "ece": None},
                **{"entropy": 0.5, "confidence": 0.9},
            }
        )
    overall = {"images": len(rows), "nll": None, "ece": None, "entropy": 0.5}
    curve = {
        "segments": starts,
        "images": images,
        "correct": correct if rows[0][1] is not None else None,
        "entropy": [0.5] * len(images),
    }
    measured = metrics({}, overall=overall, segments=entries, curve=curve, batches=len(images))
    if cost is not None:
        measured["cost"] = cost
    put_run(folder, method, served=served, measured=measured, **manifest)
    return put_predictions(folder, rows)
