"""Figures of runs, as PNG."""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

# Okabe and Ito's palette, which colour-blind readers can tell apart
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# More runs than colours: lines and bars of the next ones differ in these
LINES, HATCHES = ("-", "--", ":"), ("", "////", "....")
MOST_TICKS = 30  # more labels than that run into each other
MOST_EDGES = 60  # more lines between segments than that hide the curves


def draw_curves(runs: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Draw how runs go along their stream.

    The upper panel shows the running accuracy within each segment (mean entropy where the stream
    has no labels), the lower one the accuracy of each segment: as bars, or as a line where there
    are more than 60.

    Args:
        runs: Name of the run to what its ``metrics.json`` holds.

    Returns:
        A PNG.
    """
    labelled = all(results["curve"]["correct"] is not None for results in runs.values())
    figure = Figure(figsize=(11, 6.5), dpi=120, layout="constrained")
    curves, wholes = figure.subplots(2, 1)
    for number, (name, results) in enumerate(runs.items()):
        _draw_running(curves, results["curve"], labelled, name, number)
    _label_curves(curves, [results["curve"] for results in runs.values()], labelled)
    _draw_wholes(wholes, [results["segments"] for results in runs.values()], labelled)
    if labelled:
        curves.set_ylim(0, 102)
        wholes.set_ylim(0, 102)
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
    axes: Axes, curve: Mapping[str, Any], labelled: bool, name: str, number: int
) -> None:
    images = np.asarray(curve["images"])
    values = (
        np.asarray(curve["correct"]) if labelled else np.asarray(curve["entropy"], float) * images
    )
    seen, scale = np.cumsum(images), 100 if labelled else 1
    places, heights = [], []
    for start, stop in itertools.pairwise([*_starts(curve), len(images)]):
        places += [*seen[start:stop], np.nan]  # NaN breaks the line
        heights += [*_running(values[start:stop], images[start:stop]) * scale, np.nan]
    colour = COLOURS[number % len(COLOURS)]
    style = _style(LINES, number)
    axes.plot(places, heights, color=colour, linestyle=style, linewidth=1.4, label=_readable(name))
    alone = _alone(np.asarray(heights))  # a line of one point is none
    axes.plot(np.asarray(places)[alone], np.asarray(heights)[alone], ".", color=colour)


def _alone(values: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Say of each value whether it is finite and its neighbours are not."""
    finite = np.isfinite(np.pad(values, 1, constant_values=np.nan))
    alone: NDArray[np.bool_] = finite[1:-1] & ~finite[:-2] & ~finite[2:]
    return alone


def _draw_wholes(axes: Axes, runs: Sequence[Sequence[Mapping[str, Any]]], labelled: bool) -> None:
    key, scale = ("accuracy", 100) if labelled else ("entropy", 1)
    names = list(dict.fromkeys(segment["segment"] for run in runs for segment in run))
    places, width = np.arange(len(names)), 0.8 / len(runs)
    for number, run in enumerate(runs):
        found = {segment["segment"]: segment[key] for segment in run}
        heights = np.array([found.get(name) for name in names], float) * scale  # None is NaN
        colour = COLOURS[number % len(COLOURS)]
        if len(names) > MOST_EDGES:
            axes.plot(places, heights, color=colour, linestyle=_style(LINES, number), linewidth=1)
            continue
        offset = (number - (len(runs) - 1) / 2) * width
        hatch = _style(HATCHES, number)
        axes.bar(
            places + offset,
            heights,
            width,
            color=colour,
            hatch=hatch,
            edgecolor="white",
            linewidth=0,
        )
    shown = slice(None, None, -(-len(names) // MOST_TICKS))
    labels = [_readable(name) for name in names[shown]]
    axes.set_xticks(places[shown], labels, rotation=35, ha="right", fontsize=8)
    axes.set_ylabel("accuracy (%)" if labelled else "mean entropy (nats)")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.set_title("Each segment as a whole", loc="left", fontsize=10)


def _label_curves(axes: Axes, curves: Sequence[Mapping[str, Any]], labelled: bool) -> None:
    ends = [_ends(curve) for curve in curves]
    if len(ends[0]) < MOST_EDGES and all(end == ends[0] for end in ends):
        for end in ends[0]:
            axes.axvline(end, color="0.8", linewidth=0.8, zorder=0)
    axes.set_xlabel("images seen")
    axes.set_title("Within each segment, from its first image on", loc="left", fontsize=10)
    axes.set_ylabel("running accuracy (%)" if labelled else "running mean entropy (nats)")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=9)


def _ends(curve: Mapping[str, Any]) -> list[int]:
    """Return how many images were seen at the end of each segment but the last."""
    seen = np.cumsum(curve["images"])
    return [int(seen[start - 1]) for start in _starts(curve)[1:]]


def _readable(name: str) -> str:
    """Have a name drawn as it is: no formula between dollars, no label hidden by an underscore."""
    printable = "".join(letter if letter.isprintable() else "?" for letter in name)
    escaped = printable.replace("$", r"\$")
    return f" {escaped}" if escaped.startswith("_") else escaped


def _style(styles: Sequence[str], number: int) -> str:
    return styles[number // len(COLOURS) % len(styles)]
