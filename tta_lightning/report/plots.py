"""Figures of runs, as PNG."""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

# Okabe and Ito's palette, which colour-blind readers can tell apart
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def draw_curves(runs: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Draw how runs go along their stream.

    The upper panel shows the running accuracy within each segment (mean entropy where the stream
    has no labels), the lower one the accuracy of each segment as bars.

    Args:
        runs: Name of the run to what its ``metrics.json`` holds.

    Returns:
        A PNG.
    """
    labelled = all(results["curve"]["correct"] is not None for results in runs.values())
    figure = Figure(figsize=(11, 6.5), dpi=120, layout="constrained")
    curves, bars = figure.subplots(2, 1)
    for number, (name, results) in enumerate(runs.items()):
        colour = COLOURS[number % len(COLOURS)]
        _draw_running(curves, results["curve"], labelled, name, colour)
        _draw_bars(bars, results["segments"], labelled, number, len(runs), colour)
    _label_curves(curves, next(iter(runs.values())), labelled)
    curves.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=9)
    bars.set_ylabel("accuracy (%)" if labelled else "mean entropy (nats)")
    bars.grid(axis="y", alpha=0.3)
    bars.set_axisbelow(True)
    bars.set_title("Each segment as a whole", loc="left", fontsize=10)
    if labelled:
        curves.set_ylim(0, 102)
        bars.set_ylim(0, 102)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _starts(curve: Mapping[str, Any]) -> list[int]:
    return [int(segment["batch"]) for segment in curve["segments"]]


def _running(values: NDArray[np.float64], images: NDArray[np.int64]) -> NDArray[np.float64]:
    known = np.isfinite(values)  # a batch of NaN has no entropy
    seen = np.maximum(np.cumsum(images * known), 1)
    result: NDArray[np.float64] = np.cumsum(np.where(known, values, 0.0)) / seen
    return result


def _draw_running(
    axes: Axes, curve: Mapping[str, Any], labelled: bool, name: str, colour: str
) -> None:
    images = np.asarray(curve["images"])
    values = (
        np.asarray(curve["correct"]) if labelled else np.asarray(curve["entropy"], float) * images
    )
    edges = [*_starts(curve), len(images)]
    for start, stop in itertools.pairwise(edges):
        seen = np.cumsum(images)[start:stop]
        running = _running(values[start:stop], images[start:stop]) * (100 if labelled else 1)
        axes.plot(seen, running, color=colour, linewidth=1.4, label=name if start == 0 else None)


def _draw_bars(
    axes: Axes,
    segments: list[Mapping[str, Any]],
    labelled: bool,
    number: int,
    runs: int,
    colour: str,
) -> None:
    width = 0.8 / runs
    key, scale = ("accuracy", 100) if labelled else ("entropy", 1)
    heights = [(segment[key] or 0.0) * scale for segment in segments]
    places = np.arange(len(segments)) + (number - (runs - 1) / 2) * width
    axes.bar(places, heights, width=width, color=colour)
    axes.set_xticks(
        np.arange(len(segments)),
        [segment["segment"] for segment in segments],
        rotation=35,
        ha="right",
        fontsize=8,
    )


def _label_curves(axes: Axes, results: Mapping[str, Any], labelled: bool) -> None:
    curve = results["curve"]
    seen = np.cumsum(curve["images"])
    for start in _starts(curve)[1:]:
        axes.axvline(seen[start - 1], color="0.8", linewidth=0.8, zorder=0)
    axes.set_xlabel("images seen")
    axes.set_title("Within each segment, from its first image on", loc="left", fontsize=10)
    axes.set_ylabel("running accuracy (%)" if labelled else "running mean entropy (nats)")
    axes.grid(axis="y", alpha=0.3)
