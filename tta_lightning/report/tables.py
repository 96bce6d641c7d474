"""The tables of the page, as text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from tta_lightning.report import frames
from tta_lightning.report.groups import beginning
from tta_lightning.report.protocol import is_hash
from tta_lightning.report.run import Run

UNKNOWN, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"
MOST_TEXT = 32  # characters of a value where values stand side by side
ALIKE = 0.0005  # accuracies closer than that are equal in print
_COLLAPSED = (
    "⚠ collapsed: in the second half of a segment the model predicts fewer than half as many "
    "classes (by their effective number) as the source model does there, or as it did itself in "
    "the first half where that run is not given, and is right no more often; or CollapseGuard "
    "said so."
)


class Table(NamedTuple):
    """A table of text.

    Attributes:
        caption: What it shows.
        heads: Of its columns.
        rows: A text a column; the first one names the row.
    """

    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


class Cell(NamedTuple):
    """A cell of the summary."""

    figure: str
    sd: str = ""
    gain: str = ""
    tone: str = "same"
    collapsed: bool = False
    best: bool = False


def percent(value: float) -> str:
    """Write a fraction in percent, without the sign; a dash where it is not known."""
    return UNKNOWN if pd.isna(value) else f"{100 * value:.1f}"


def points(value: float) -> str:
    """Write a difference of fractions in percentage points."""
    if pd.isna(value):
        return ""
    return f"{100 * value:+.1f}".replace("-", MINUS)


def number(value: float, digits: int = 2) -> str:
    """Write a number; a dash where it is not known."""
    return UNKNOWN if pd.isna(value) else f"{value:,.{digits}f}"


def shown(value: Any) -> str:
    """Write a value of a manifest out."""
    if value is None:
        return "none"
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return " ".join(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def summary(frame: pd.DataFrame, what: dict[str, str], ranked: bool = True) -> dict[str, Any]:
    """Lay the summary out: a row a domain, a column a name.

    Args:
        frame: What :func:`frames.summary` returns.
        what: Name to what stands below it.
        ranked: Whether the runs follow one protocol, so that one can be the best.

    Returns:
        ``caption``, ``corner``, ``columns``, ``rows``, ``legend``, for the template.
    """
    labelled = bool(frame["accuracy"].notna().any())
    table = frame.set_index(["domain", "name"])
    domains = [d for d in dict.fromkeys(frame["domain"]) if d != frames.MEAN]
    if len(domains) > 1:
        domains.append(frames.MEAN)
    names = list(dict.fromkeys(frame["name"]))
    rows = []
    for domain in domains:
        known = [table.loc[(domain, n)] if (domain, n) in table.index else None for n in names]
        cells = [Cell(UNKNOWN) if row is None else _cell(row, labelled) for row in known]
        if labelled and ranked and len(names) > 1:
            cells = _with_best(cells, known)
        rows.append({"name": domain, "mean": domain == frames.MEAN, "cells": cells})
    caption, legend = _words(frame, labelled, ranked and len(names) > 1)
    columns = [{"name": name, "what": what[name]} for name in names]
    return {
        "caption": caption,
        "corner": "stream",
        "columns": columns,
        "rows": rows,
        "legend": legend,
    }


def headlines(frame: pd.DataFrame, ranked: bool = True) -> list[str]:
    """Say in a sentence each what the summary shows: the best, the losses, the collapses.

    Args:
        frame: What :func:`frames.summary` returns.
        ranked: Whether the runs follow one protocol, so that one can be the best.
    """
    means = frame[frame["domain"] == frames.MEAN].set_index("name")
    said = []
    if ranked and means["accuracy"].notna().any():
        top = means["accuracy"].max()
        best = means[means["accuracy"] > top - ALIKE]
        first = "Best on average" if len(means) > 1 else "On average"
        gains = [
            name if pd.isna(gain) else f"{name} ({points(gain)} points over its source model)"
            for name, gain in best["gain"].items()
        ]
        said.append(f"{first}: {percent(top)} %, {' and '.join(gains)}.")
    worse = means[means["gain"] < -ALIKE]
    if len(worse):
        listed = ", ".join(f"{name} ({points(gain)})" for name, gain in worse["gain"].items())
        said.append(f"Worse than the source model on average: {listed}.")
    parts = frame[(frame["domain"] != frames.MEAN) & frame["collapsed"]]
    if len(parts):
        listed = ", ".join(
            f"{name} ({', '.join(rows['domain'])})"
            for name, rows in parts.groupby("name", sort=False)
        )
        said.append(f"Collapsed: {listed}.")
    return said


def cost(frame: pd.DataFrame) -> Table:
    """Write :func:`frames.cost` out."""
    heads = [
        *("name", "accuracy (%)", "forwards / batch", "backwards / batch"),
        *("images / s", "ms / image", "peak memory (MB)"),
    ]
    rows = [
        [
            row.name,
            percent(row.accuracy),
            number(row.forwards),
            number(row.backwards),
            number(row.images_per_second, 0),
            number(row.milliseconds),
            number(row.memory / 1e6, 0),
        ]
        for row in frame.rename_axis(None).itertuples(index=False)
    ]
    caption = "What the runs cost, without loading; memory is that of the process or the device"
    return Table(caption, heads, rows)


def segments(frame: pd.DataFrame) -> Table:
    """Write :func:`frames.segments` out: a row a segment, a column a name."""
    labelled = frame["accuracy"].notna().any()
    figure = "accuracy" if labelled else "entropy"
    names, order = list(dict.fromkeys(frame["name"])), list(dict.fromkeys(frame["segment"]))
    wide = frame.pivot(index="segment", columns="name", values=figure).loc[order, names]
    write = percent if labelled else number
    rows = [[str(segment), *map(write, wide.loc[segment])] for segment in order]
    caption = "Accuracy of each segment in %" if labelled else "Mean entropy of each segment (nats)"
    return Table(caption, ["segment", *names], rows)


def over_time(frame: pd.DataFrame) -> Table:
    """Write :func:`frames.over_time` out: of each stretch the class that is predicted most."""
    top = frame.loc[frame.groupby("start", sort=True)["share"].idxmax()]
    rows = [
        [
            f"{row.start:,} to {row.stop:,}",
            row.segment,
            f"{row.top} ({percent(row.share)} %)",
            number(row.entropy),
        ]
        for row in top.rename(columns={"class": "top"}).itertuples()
    ]
    heads = ["images", "segment", "most predicted class", "mean entropy (nats)"]
    return Table("The class predicted most, and the entropy, along the stream", heads, rows)


def classes(frame: pd.DataFrame) -> Table:
    """Write :func:`frames.per_class` out."""
    rows = [
        [
            str(row.name_of),
            str(row.images),
            str(row.predicted),
            percent(row.before),
            percent(row.after),
            points(row.change) or UNKNOWN,
        ]
        for row in frame.rename(columns={"class": "name_of"}).itertuples()
    ]
    heads = ["class", "images", "predicted", "before (%)", "after (%)", "change (points)"]
    return Table("Each class before and after", heads, rows)


def reliability(frame: pd.DataFrame) -> Table:
    """Write :func:`frames.reliability` out."""
    rows = [
        [row.name, percent(row.confidence), percent(row.accuracy), str(row.images)]
        for row in frame.rename_axis(None).itertuples(index=False)
    ]
    heads = ["name", "mean confidence (%)", "accuracy (%)", "images"]
    return Table("How often predictions of a confidence are right", heads, rows)


def settings(runs: Sequence[Run], names: Sequence[str]) -> Table | None:
    """Put manifests side by side: the fields in which they differ; None where there are none."""
    columns = [dict(zip(m["field"], m["value"], strict=True)) for m in (r.manifest for r in runs)]
    fields = list(dict.fromkeys(name for column in columns for name in column))
    parts = list(dict.fromkeys(name.partition(".")[0] for name in fields))
    rows = []
    for name in sorted(fields, key=lambda name: (parts.index(name.partition(".")[0]), name)):
        full = [shown(column[name]) if name in column else "" for column in columns]
        if len(set(full)) > 1:
            most = 12 if is_hash(name) else MOST_TEXT
            rows.append([name, *(text or UNKNOWN for text in _cut(full, most))])
    if not rows:
        return None
    return Table("Fields of the manifests that differ", ["field", *names], rows)


def manifest(run: Run, name: str) -> Table:
    """Write the manifest of a run out, whole."""
    rows = [[row.field, shown(row.value)] for row in run.manifest.itertuples(index=False)]
    return Table(f"Manifest of {name}", ["field", "value"], rows)


# Parts --------------------------------------------------------------------------------------------


def _cell(row: pd.Series, labelled: bool) -> Cell:
    if not labelled:
        sd = "" if pd.isna(row["entropy_sd"]) else f"{row['entropy_sd']:.2f}"
        return Cell(number(row["entropy"]), sd, collapsed=bool(row["collapsed"]))
    gain = row["gain"]
    tone = "gain" if gain > ALIKE else "loss" if gain < -ALIKE else "same"
    sd = "" if pd.isna(row["accuracy_sd"]) else percent(row["accuracy_sd"])
    if sd and not pd.isna(row["gain_sd"]):
        return Cell(
            percent(row["accuracy"]),
            sd,
            f"{points(gain)} ± {percent(row['gain_sd'])}",
            tone,
            bool(row["collapsed"]),
        )
    return Cell(percent(row["accuracy"]), sd, points(gain), tone, bool(row["collapsed"]))


def _cut(texts: Sequence[str], most: int) -> list[str]:
    """Shorten texts to the stretch in which they begin to differ."""
    alike = len(beginning(texts))
    start = 0 if alike < most else alike - most // 2
    return [
        ("…" if start else "")
        + text[start : start + most]
        + ("…" if len(text) > start + most else "")
        for text in texts
    ]


def _with_best(cells: list[Cell], known: Sequence[Any]) -> list[Cell]:
    """Mark the highest accuracy of a row."""
    values = [np.nan if row is None else row["accuracy"] for row in known]
    if np.isnan(values).all():
        return cells
    best = np.nanmax(values)
    return [
        cell._replace(best=value > best - ALIKE) for cell, value in zip(cells, values, strict=True)
    ]


def _words(frame: pd.DataFrame, labelled: bool, best: bool) -> tuple[str, str]:
    """Return caption and legend of the summary."""
    legend = ["The shaded figure is the best of its row."] if labelled and best else []
    if frame["gain"].notna().any():
        legend.append(
            "After the accuracy: the gain over the source model of the same weights, in percentage "
            "points; blue where it is more, orange where it is less."
        )
    if (frame["runs"] > 1).any():
        legend.append("±: standard deviation over repetitions with other seeds.")
    if frame["collapsed"].any():
        legend.append(_COLLAPSED)
    caption = (
        "Accuracy in %"
        if labelled
        else "Mean entropy of the predictions (nats): the images have no labels"
    )
    return caption, " ".join(legend)
