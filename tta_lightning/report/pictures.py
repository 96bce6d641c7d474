"""Figures as files, drawn without a browser."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeAlias

import altair as alt
import vl_convert
from PIL import Image

from tta_lightning.report import frames, plots
from tta_lightning.report.run import Run
from tta_lightning.runs import write_atomically

Chart: TypeAlias = alt.LayerChart | alt.VConcatChart
Form: TypeAlias = Literal["png", "pdf"]
FORMS: tuple[Form, ...] = ("png", "pdf")


def draw(chart: Chart, form: Form = "png", scale: float = 2) -> bytes:
    """Draw a chart.

    Args:
        chart: The chart.
        form: ``png``, or ``pdf``, for papers.
        scale: Of a PNG, against its size on the screen.

    Returns:
        What a file of that form holds.
    """
    spec = chart.to_dict()
    if form == "pdf":
        return vl_convert.vegalite_to_pdf(spec, config=plots.CONFIG)
    drawn = io.BytesIO(vl_convert.vegalite_to_png(spec, config=plots.CONFIG, scale=scale))
    smaller = io.BytesIO()  # a third of the size
    with Image.open(drawn) as image:
        image.convert("RGB").save(smaller, "PNG")
    return smaller.getvalue()


def draw_curves(runs: Sequence[Run], names: Sequence[str] | None = None) -> bytes:
    """Draw how runs go along their stream, and each segment as a whole.

    Args:
        runs: Runs.
        names: A name a run; None for those of their folders.

    Returns:
        A PNG.
    """
    curves, segments = frames.curves(runs, names), frames.segments(runs, names)
    chart = plots.running_accuracy(curves) & plots.segment_accuracy(segments)
    return draw(chart, scale=1.5)  # every run draws one: quickly, and small


def save(chart: Chart, folder: Path, name: str) -> list[Path]:
    """Write a chart as ``name.png`` and ``name.pdf`` into a folder, each file as a whole.

    Args:
        chart: The chart.
        folder: The folder, which is made if it is not there.
        name: Of the files, without an ending.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{form}" for form in FORMS]
    for path, form in zip(paths, FORMS, strict=True):
        write_atomically(path, draw(chart, form))
    return paths
