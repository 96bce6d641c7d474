"""Figures of frames: for the page, for notebooks and for papers.

Each function takes a frame of :mod:`tta_lightning.report.frames` and returns an Altair chart, which
a notebook shows, and :mod:`tta_lightning.report.pictures` writes to files.
Colours are Okabe and Ito's, two of Paul Tol's, and grey, which colour-blind readers can tell apart;
where there are more names, lines differ in their dashes, too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import altair as alt
import pandas as pd

COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"),
    *("#882255", "#999933", "#7F7F7F"),
)
GAIN, LOSS = COLOURS[0], COLOURS[1]
DASHES = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3])  # for more names than there are colours
MOST_EDGES = 60  # more lines between segments than that hide the curves
MOST_NAMED = 20  # more names of segments than that run into each other
MOST_CLASSES = 40  # more bars than that are no picture
LEAST_IN_BIN = 10  # the accuracy of fewer images is noise
WIDTH = 760  # px
PERCENT = ".0%"
CONFIG = {
    "font": "system-ui, sans-serif",
    "view": {"strokeWidth": 0},
    "axis": {"gridOpacity": 0.35, "labelFontSize": 11, "titleFontSize": 11, "titleFontWeight": 400},
    "axisX": {"labelFlush": False},  # else the last label runs into the one before
    "legend": {"columns": 4, "labelFontSize": 11, "titleFontSize": 11, "titleFontWeight": 400},
}
"""How figures look in files and on the page; the Altair theme ``tta_lightning`` for notebooks."""


@alt.theme.register("tta_lightning", enable=False)
def _theme() -> alt.theme.ThemeConfig:
    return {"config": CONFIG}  # type: ignore[typeddict-item]


# Figures ------------------------------------------------------------------------------------------


def running_accuracy(frame: pd.DataFrame, names: Sequence[str] | None = None) -> alt.LayerChart:
    """Draw the accuracy within each segment from its first image on, along the stream.

    Args:
        frame: What :func:`frames.curves` returns. Without labels the entropy is drawn.
        names: All names that the reader meets, in their order, so that each has its colour in
            every figure; None for those of the frame.

    Returns:
        A line a name, a band of one standard deviation where there are repetitions, and the ends
        of the segments.
    """
    labelled = bool(frame["running_accuracy"].notna().any())
    figure, title, form = (
        ("running_accuracy", "accuracy since the segment began", PERCENT)
        if labelled
        else ("running_entropy", "mean entropy since the segment began (nats)", ".2f")
    )
    look = _look(frame, names)
    picked = alt.selection_point(fields=["name"], bind="legend")
    base = _chart(frame[["name", "segment", "visit", "seen", figure, "sd"]].dropna(subset=figure))
    x = alt.X("seen:Q", title="images seen", scale=alt.Scale(nice=False))
    y = alt.Y(f"{figure}:Q", title=title, axis=alt.Axis(format=form))
    if labelled:
        y = y.scale(domain=[0, 1], clamp=True)
    shown = {
        "x": x,
        "y": y,
        "detail": "visit:N",
        "opacity": alt.when(picked).then(alt.value(1)).otherwise(alt.value(0.12)),
        "tooltip": ["name:N", "segment:N", "seen:Q", alt.Tooltip(f"{figure}:Q", format=".3f")],
    }
    lines = base.mark_line(strokeWidth=1.6).encode(**shown, **look).add_params(picked)
    alone = frame.groupby(["name", "visit"])["seen"].transform("size") == 1
    layers: list[alt.Chart] = [*_segment_layers(frame), lines]
    if alone.any():  # a line of one point is none
        dots = _chart(frame[alone]).mark_point(filled=True, size=24)
        layers.append(dots.encode(**shown, color=look["color"]))
    if frame["sd"].notna().any():
        low, high = f"datum.{figure} - datum.sd", f"datum.{figure} + datum.sd"
        band = base.transform_calculate(low=low, high=high).mark_area(opacity=0.15)
        band = band.encode(x=x, y="low:Q", y2="high:Q", detail="visit:N", color=look["color"])
        layers.insert(-1, band)
    return _finish(layers, f"Lines of the {title} against the number of images seen.", 300)


def segment_accuracy(frame: pd.DataFrame, names: Sequence[str] | None = None) -> alt.LayerChart:
    """Draw the accuracy of each segment as a whole.

    Args:
        frame: What :func:`frames.segments` returns. Without labels the entropy is drawn.
        names: As of :func:`running_accuracy`.

    Returns:
        Bars side by side, or lines where there are more than 60 segments or more names than
        colours.
    """
    labelled = bool(frame["accuracy"].notna().any())
    figure, title = ("accuracy", "accuracy") if labelled else ("entropy", "mean entropy (nats)")
    order = list(dict.fromkeys(frame["segment"]))
    count = len(set(frame["name"]) if names is None else names)
    few = len(order) <= MOST_EDGES and count <= len(COLOURS)  # bars have no dashes
    look = _look(frame, names, "square" if few else "stroke")
    step = -(-len(order) // (2 * MOST_NAMED))
    axis = alt.Axis(labelAngle=-40, values=order[::step], labelLimit=120)
    x = alt.X("segment:N", sort=order, title=None, axis=axis)
    y = alt.Y(f"{figure}:Q", title=title, axis=alt.Axis(format=PERCENT if labelled else ".2f"))
    if labelled:
        y = y.scale(domain=[0, 1])
    tooltip = ["name:N", "segment:N", alt.Tooltip(f"{figure}:Q", format=".3f")]
    base = _chart(frame[["name", "segment", figure]].dropna())
    sort = look["color"].to_dict()["scale"]["domain"]
    marks = (
        base.mark_bar().encode(
            x=x, y=y, xOffset=alt.XOffset("name:N", sort=sort), color=look["color"], tooltip=tooltip
        )
        if few
        else base.mark_line(strokeWidth=1.2).encode(x=x, y=y, tooltip=tooltip, **look)
    )
    return _finish([marks], f"The {title} of each segment, side by side.", 220)


def over_time(frame: pd.DataFrame) -> alt.VConcatChart:
    """Draw which classes a run predicts as its stream goes on, and how sure it is.

    Args:
        frame: What :func:`frames.over_time` returns.

    Returns:
        :func:`prediction_histogram` above :func:`entropy_over_time`.
    """
    return prediction_histogram(frame) & entropy_over_time(frame)


def prediction_histogram(frame: pd.DataFrame) -> alt.LayerChart:
    """Draw the shares of the predicted classes as a heat map over time.

    Args:
        frame: What :func:`frames.over_time` returns.

    Returns:
        A row a class, a column a stretch of the stream.
    """
    classes = list(dict.fromkeys(frame["class"]))
    base = _chart(frame.round({"share": 4}))
    cells = base.mark_rect().encode(
        x=_stretch("images seen"),
        x2="stop:Q",
        y=alt.Y("class:N", sort=classes, title="predicted class"),
        color=alt.Color(
            "share:Q",
            scale=alt.Scale(scheme="cividis", domainMin=0),
            legend=alt.Legend(
                format=PERCENT, title="share of the predictions", orient="bottom", tickCount=4
            ),
        ),
        tooltip=["segment:N", "start:Q", "stop:Q", "class:N", alt.Tooltip("share:Q", format=".1%")],
    )
    text = "A heat map of the share of each predicted class along the stream."
    return _finish([cells], text, max(90, 13 * len(classes)))


def entropy_over_time(frame: pd.DataFrame) -> alt.LayerChart:
    """Draw the mean entropy of each stretch of the stream.

    Args:
        frame: What :func:`frames.over_time` returns.

    Returns:
        A stepped line, with the ends of the segments.
    """
    columns = ["segment", "start", "stop", "entropy"]
    stretches = frame[columns].drop_duplicates(subset="start").reset_index(drop=True)
    line = (
        _chart(stretches)
        .mark_rule(strokeWidth=2, color=COLOURS[0])
        .encode(
            x=_stretch("images seen"),
            x2="stop:Q",
            y=alt.Y("entropy:Q", title="mean entropy (nats)", scale=alt.Scale(domainMin=0)),
            tooltip=["segment:N", "start:Q", "stop:Q", alt.Tooltip("entropy:Q", format=".3f")],
        )
    )
    ends = stretches.rename(columns={"stop": "seen"})
    visit = (ends["segment"] != ends["segment"].shift()).cumsum()
    layers = [*_segment_layers(ends.assign(name="", visit=visit)), line]
    return _finish(layers, "Mean entropy of the predictions along the stream.", 110)


def class_change(frame: pd.DataFrame) -> alt.LayerChart:
    """Draw what each class gained or lost.

    Args:
        frame: What :func:`frames.per_class` returns.

    Returns:
        A bar a class, the change in percentage points against the source model (where that run
        lacks, the figure of the run). Of more than 40 classes, those that lost and gained most.
        Classes that are never predicted any more are named so.
    """
    known = bool(frame["change"].notna().any())
    figure = "change" if known else "after"
    rows = frame.dropna(subset=figure).sort_values(figure, kind="stable")
    if len(rows) > MOST_CLASSES:
        rows = pd.concat([rows.head(MOST_CLASSES // 2), rows.tail(MOST_CLASSES // 2)])
    what = "accuracy" if rows["images"].any() else "share of the predictions"
    rows = rows.assign(
        note=["never predicted" if n == 0 else "" for n in rows["predicted"]],
        gained=rows[figure] >= 0,
    )
    order = rows["class"].tolist()
    y = alt.Y("class:N", sort=order, title="class")
    title = f"change of the {what}" if known else what
    form = "+.0%" if known else PERCENT
    base = _chart(rows)
    bars = base.mark_bar().encode(
        x=alt.X(f"{figure}:Q", title=title, axis=alt.Axis(format=form, tickMinStep=0.01)),
        y=y,
        color=alt.condition("datum.gained", alt.value(GAIN), alt.value(LOSS)),
        tooltip=[
            "class:N",
            "images:Q",
            "predicted:Q",
            alt.Tooltip("before:Q", format=".1%"),
            alt.Tooltip("after:Q", format=".1%"),
        ],
    )
    notes = base.mark_text(align="left", dx=4).encode(x=alt.datum(0), y=y, text="note:N")
    text = f"A bar a class: the {title}."
    return _finish([bars, notes], text, max(60, 15 * len(rows)))


def reliability(frame: pd.DataFrame, names: Sequence[str] | None = None) -> alt.LayerChart:
    """Draw how often predictions of a confidence are right.

    Args:
        frame: What :func:`frames.reliability` returns.
        names: As of :func:`running_accuracy`.

    Returns:
        A line a name beside the diagonal of a calibrated model; below it a model is too sure. Bins
        of fewer than 10 images are left out.
    """
    look = _look(frame, names)
    ideal = _chart(pd.DataFrame({"confidence": [0, 1], "accuracy": [0, 1]}))
    diagonal = ideal.mark_line(color="#7F7F7F", strokeWidth=1, strokeDash=[3, 3])
    diagonal = diagonal.encode(x="confidence:Q", y="accuracy:Q")
    axis = alt.Axis(format=PERCENT)
    lines = _chart(frame[frame["images"] >= LEAST_IN_BIN].round(4))
    lines = lines.mark_line(point=alt.OverlayMarkDef(size=28)).encode(
        x=alt.X("confidence:Q", axis=axis, scale=alt.Scale(domain=[0, 1])),
        y=alt.Y("accuracy:Q", axis=axis, scale=alt.Scale(domain=[0, 1])),
        tooltip=[
            "name:N",
            alt.Tooltip("confidence:Q", format=".1%"),
            alt.Tooltip("accuracy:Q", format=".1%"),
            "images:Q",
            alt.Tooltip("ece:Q", format=".3f"),
        ],
        **look,
    )
    return _finish([diagonal, lines], "Accuracy against confidence.", 300, 360)


def cost(frame: pd.DataFrame, names: Sequence[str] | None = None) -> alt.LayerChart:
    """Draw what each run is worth against what it costs.

    Args:
        frame: What :func:`frames.cost` returns.
        names: As of :func:`running_accuracy`.

    Returns:
        A point a name: accuracy against milliseconds an image, the latter on a logarithmic scale.
    """
    known = frame.dropna(subset=["milliseconds", "accuracy"])
    base = _chart(known).encode(
        x=alt.X(
            "milliseconds:Q",
            title="milliseconds an image (without loading)",
            scale=alt.Scale(type="log", nice=False, padding=70),
        ),
        y=alt.Y(
            "accuracy:Q",
            title="accuracy (mean over the corruptions)",
            axis=alt.Axis(format=PERCENT),
            scale=alt.Scale(zero=False, padding=16),
        ),
        tooltip=[
            "name:N",
            alt.Tooltip("accuracy:Q", format=".1%"),
            alt.Tooltip("images_per_second:Q", format=",.0f"),
            alt.Tooltip("forwards:Q", format=".2f"),
            alt.Tooltip("backwards:Q", format=".2f"),
            alt.Tooltip("memory:Q", format=".3s"),
        ],
    )
    colour = _look(frame, names)["color"].legend(None)
    points = base.mark_point(filled=True, size=90, opacity=1).encode(color=colour)
    texts = base.mark_text(align="left", dx=9, dy=-3).encode(text="name:N")
    return _finish([points, texts], "Accuracy against milliseconds an image.", 300)


# Parts --------------------------------------------------------------------------------------------


def _look(
    frame: pd.DataFrame, names: Sequence[str] | None, symbol: str = "stroke"
) -> dict[str, Any]:
    """Give each name its colour and dashes; one legend for both."""
    domain = list(dict.fromkeys(frame["name"] if names is None else names))
    colours = [COLOURS[i % len(COLOURS)] for i in range(len(domain))]
    dashes = [DASHES[i // len(COLOURS) % len(DASHES)] for i in range(len(domain))]
    shown = list(dict.fromkeys(frame["name"]))
    legend = alt.Legend(
        values=shown,
        title=None,
        orient="bottom",
        symbolType=symbol,
        symbolStrokeWidth=3,
        labelLimit=260,
    )
    return {
        "color": alt.Color(
            "name:N", scale=alt.Scale(domain=domain, range=colours), legend=legend, sort=None
        ),
        "strokeDash": alt.StrokeDash(
            "name:N", scale=alt.Scale(domain=domain, range=dashes), legend=legend, sort=None
        ),
    }


def has_edges(frame: pd.DataFrame) -> bool:
    """Say whether :func:`running_accuracy` draws the ends of segments."""
    ends = _edges(frame)
    return ends is not None and len(ends) > 1


def _edges(frame: pd.DataFrame) -> tuple[int, ...] | None:
    """Return where segments end, if all names share the places and they are few; else None."""
    ends = frame.groupby(["name", "visit"], sort=False)["seen"].max()
    by_name = [tuple(part) for _, part in ends.groupby(level="name", sort=False)]
    if not by_name or len(by_name[0]) > MOST_EDGES or len(set(by_name)) > 1:
        return None
    return by_name[0]


def _segment_layers(frame: pd.DataFrame) -> list[alt.Chart]:
    """Draw the ends of the segments, if all names share them and they are few, and their names."""
    ends = _edges(frame)
    if ends is None or len(ends) == 1:
        return []
    first = frame[frame["name"] == frame["name"].iloc[0]]
    segments = first.groupby("visit", sort=False)["segment"].first()
    table = pd.DataFrame({"segment": segments.to_numpy(), "seen": ends, "from": [0, *ends[:-1]]})
    rules = _chart(table.iloc[:-1]).mark_rule(color="#9a9a9a", strokeWidth=0.7, opacity=0.7)
    layers = [rules.encode(x="seen:Q")]
    if len(table) <= MOST_NAMED:
        names = _chart(table).mark_text(
            angle=325, align="left", baseline="middle", dx=3, dy=-4, fontSize=9
        )
        layers.append(names.encode(x="from:Q", y=alt.value(-4), text="segment:N"))
    return layers


def _stretch(title: str) -> alt.X:
    return alt.X("start:Q", title=title, scale=alt.Scale(nice=False))


def _chart(frame: pd.DataFrame) -> alt.Chart:
    """Begin a chart with its rows inside, of which there may be more than Altair's own limit."""
    rows = json.loads(frame.to_json(orient="records", double_precision=6))  # NaN becomes null
    return alt.Chart(alt.InlineData(values=rows))


def _finish(
    layers: Sequence[alt.Chart], description: str, height: int, width: int = WIDTH
) -> alt.LayerChart:
    chart = alt.LayerChart(layer=list(layers))
    return chart.properties(description=description, height=height, width=width)
