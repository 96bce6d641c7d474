"""In which segments a run collapsed, read off its predictions."""

from __future__ import annotations

import numpy as np
import pandas as pd

from tta_lightning.report.run import Run

LEAST_IMAGES = 50  # half a segment with fewer says nothing of a collapse
FEWER_CLASSES = 0.5  # a run that predicts fewer than this part of the source's classes collapsed


def collapses(run: Run, source: Run | None) -> list[str]:
    """Name the segments in which a run ends up predicting far fewer classes than it should.

    In the second half of a segment, the effective number of predicted classes (``exp`` of the
    entropy of their histogram) is below half of the source model's on the same images, and no more
    images are right. Where that run is not there, the first half of the segment stands for it. Half
    a segment of fewer than 50 images says nothing, nor does a stream without labels and source.
    ``CollapseGuard`` watches a run for it while it lasts; what it found is counted as well.
    """
    if run.is_source:
        return []
    found = {entry["segment"] for entry in _guarded(run)}
    ours = run.predictions
    other = None if source is None or len(source.predictions) != len(ours) else source.predictions
    for segment, rows in ours.groupby("segment", sort=False).groups.items():
        late = rows[len(rows) // 2 :]
        if len(late) < LEAST_IMAGES:
            continue
        mine = ours.loc[late]
        if other is not None:
            before = other.loc[late]
        elif mine["label"].notna().all():
            before = ours.loc[rows[: len(late)]]
        else:
            continue
        fewer = FEWER_CLASSES * _effective(before["prediction"])
        if _effective(mine["prediction"]) < fewer and _right(mine) <= _right(before):
            found.add(segment)
    return [segment for segment in ours["segment"].unique() if segment in found]


def _guarded(run: Run) -> list[dict[str, str]]:
    """Return what CollapseGuard found, if it watched."""
    found: list[dict[str, str]] = run.results.get("collapse", {}).get("detections", [])
    return found


def _effective(values: pd.Series) -> float:
    """Return the effective number of different values: exp of the entropy of their histogram."""
    shares = values.value_counts(normalize=True).to_numpy(dtype=np.float64)
    return float(np.exp(-(shares * np.log(shares)).sum()))


def _right(predictions: pd.DataFrame) -> int:
    return int(predictions["correct"].fillna(False).sum())
