"""Images that adaptation fixed and broke, and the pictures of them."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from tta_lightning.errors import InputError
from tta_lightning.report.run import Run

Images: TypeAlias = Callable[[int, str, int], NDArray[np.uint8]]
"""Index in the source, corruption and severity to the image ``[H, W, 3]`` of the stream."""

FIXED, BROKE = "fixed", "broke"
SURE, UNSURE = "most certain", "least certain"
SIDE = 96  # px of a picture; smaller images stay as they are


@dataclass(frozen=True)
class Example:
    """An image of a stream, and what was said of it.

    Attributes:
        kind: ``fixed`` (the source model was wrong, the run is right), ``broke`` (the other way
            round), or, where that is not known, ``most certain`` and ``least certain``.
        segment: Its segment.
        index: Of the image in its source.
        corruption: Its corruption.
        severity: Of the corruption.
        path: Its file, or what stands for one.
        label: Its class; None where unknown.
        before: Class that the source model predicted; None where that run is not known.
        after: Class that the run predicted.
        confidence: Of the latter, a fraction.
    """

    kind: str
    segment: str
    index: int
    corruption: str
    severity: int
    path: str
    label: int | None
    before: int | None
    after: int
    confidence: float


def examples(run: Run, source: Run | None, most: int = 4, seed: int = 0) -> list[Example]:
    """Draw images of each segment that adaptation fixed and broke.

    Args:
        run: A run.
        source: The run of the source model under the same protocol. Without it, or without labels,
            the images are drawn that the run is most and least certain of.
        most: Of each kind and segment.
        seed: Of the drawing.

    Returns:
        Examples in the order of the stream, by segment and kind.
    """
    frame = run.predictions
    known = source is not None and len(source.predictions) == len(frame)
    before = source.predictions["prediction"] if known and source is not None else None
    if before is not None and frame["label"].notna().any():
        right, was_right = frame["correct"], before == frame["label"]
        kinds = {FIXED: right & ~was_right, BROKE: ~right & was_right}
        drawn = {kind: frame[rows.fillna(False)] for kind, rows in kinds.items()}
        chosen = {k: _drawn(rows, most, seed) for k, rows in drawn.items()}
    else:
        ranked = frame[frame["prediction"] >= 0].sort_values("confidence", kind="stable")
        groups = ranked.groupby("segment", sort=False)
        chosen = {SURE: groups.tail(most).iloc[::-1], UNSURE: groups.head(most)}
    return [
        _example(kind, rows.loc[place], before)
        for segment in frame["segment"].unique()
        for kind, rows in chosen.items()
        for place in rows.index[rows["segment"] == segment]
    ]


def picture(images: Images, example: Example) -> str | None:
    """Return an example as the address of a picture that holds its own data.

    Args:
        images: Gives the images of the stream.
        example: The example.

    Returns:
        A ``data:`` address: PNG for images up to 96 px, JPEG of that size for larger ones; None
        where the image cannot be read any more.
    """
    try:
        pixels = images(example.index, example.corruption, example.severity)
    except InputError:
        return None
    image, buffer = Image.fromarray(pixels), io.BytesIO()
    if max(image.size) <= SIDE:
        image.save(buffer, "PNG")
        kind = "png"
    else:
        image.thumbnail((SIDE, SIDE))
        image.save(buffer, "JPEG", quality=80)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _drawn(rows: pd.DataFrame, most: int, seed: int) -> pd.DataFrame:
    """Draw as many rows of each segment, in the order of the stream."""
    shuffled = rows.sample(frac=1, random_state=seed)
    return shuffled.groupby("segment", sort=False).head(most).sort_index()


def _example(kind: str, row: pd.Series, before: pd.Series | None) -> Example:
    severity, label = row["severity"], row["label"]
    return Example(
        kind,
        row["segment"],
        int(row["index"]),
        row["corruption"],
        0 if pd.isna(severity) else int(severity),
        row["path"],
        None if pd.isna(label) else int(label),
        None if before is None else int(before[row.name]),
        int(row["prediction"]),
        float(row["confidence"]),
    )
