"""What the page shows of one run."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import altair as alt
import pandas as pd

from tta_lightning.report import frames, plots, samples, tables
from tta_lightning.report.run import Run
from tta_lightning.report.tables import Table

EDGES = " Vertical lines: a new segment."
MOST_PICTURES = 1200  # of the whole page: each has about 2 kB
MOST_OF_A_KIND = 4  # of a segment
_MARKS = {samples.FIXED: "✓ ", samples.BROKE: "✗ "}  # colour is not all that tells them apart


class Pictures(NamedTuple):
    """What is known of the images of a run.

    Attributes:
        images: Gives the images.
        classes: Names of the classes; None when unknown.
    """

    images: samples.Images
    classes: Sequence[str] | None


PicturesOf: TypeAlias = Callable[[Run], Pictures]
"""From a run to its images; raises an InputError that says why they cannot be had."""


@dataclass
class Figure:
    """A figure of the page.

    Attributes:
        id: Its name in the page.
        title: What it shows.
        text: What is to be seen, for those who cannot see it too.
        chart: The chart.
        shape: ``wide``, or ``square`` for one that keeps its width.
        table: Its figures.
        file: Name of its files, without an ending.
    """

    id: str
    title: str
    text: str
    chart: alt.LayerChart
    shape: str = "wide"
    table: Table | None = None
    file: str = ""

    def __post_init__(self) -> None:
        self.file = self.file or self.id


@dataclass
class Detail:
    """A run, as the template wants it."""

    id: str
    name: str
    what: str
    open: bool
    figures: list[Figure] = field(default_factory=list)
    samples_title: str = ""
    samples_text: str = ""
    segments: list[dict[str, Any]] = field(default_factory=list)
    no_samples: str = ""


def detail(
    run: Run,
    source: Run | None,
    names: tuple[str, str],
    place: str,
    order: Sequence[str],
    class_names: Sequence[str] | None,
) -> Detail:
    """Say what a run did.

    Args:
        run: The run.
        source: The run of the source model under the same protocol, if there is one.
        names: What the two are called.
        place: Begin of the names of its figures.
        order: All names of the page, for their colours.
        class_names: Names of the classes; None when unknown.

    Returns:
        The run with its figures, without samples.
    """
    time = _named(frames.over_time(run), class_names)
    classes = _named(frames.per_class(run, source), class_names)
    figures = (
        []
        if time.empty
        else [
            Figure(
                f"{place}-classes-over-time",
                f"What {names[0]} predicts along the stream",
                _histogram_text(time),
                plots.prediction_histogram(time),
                table=tables.over_time(time),
            ),
            Figure(
                f"{place}-entropy",
                f"How sure {names[0]} is",
                "Low entropy is a sure model, which need not be right."
                f"{EDGES if time['segment'].nunique() > 1 else ''}",
                plots.entropy_over_time(time),
            ),
        ]
    )
    if len(classes):
        figures.append(
            Figure(
                f"{place}-class-change",
                _class_title(names[0], source, classes),
                _class_text(classes),
                plots.class_change(classes),
                table=tables.classes(classes),
            )
        )
    calibration = frames.reliability(
        [run] if source is None else [source, run],
        [names[0]] if source is None else [names[1], names[0]],
    )
    if len(calibration):
        errors = calibration.groupby("name", sort=False)["ece"].first()
        listed = ", ".join(f"{name} {error:.3f}" for name, error in errors.items())
        figures.append(
            Figure(
                f"{place}-reliability",
                "Reliability" if source is None else "Reliability before and after",
                f"On the diagonal a model is as often right as it is confident; below it, it is "
                f"too sure. Calibration error: {listed}.",
                plots.reliability(calibration, order),
                "square",
                tables.reliability(calibration),
            )
        )
    for figure in figures:
        figure.file = f"{place}-{_safe(names[0])}-{figure.id.removeprefix(f'{place}-')}"
    return Detail(place, names[0], _what(run), open=False, figures=figures)


def add_samples(shown: Detail, run: Run, source: Run | None, found: Pictures, most: int) -> None:
    """Add pictures of images to a detail.

    Args:
        shown: What is added to.
        run: Its run.
        source: The run of the source model under the same protocol, if there is one.
        found: The images.
        most: Pictures of a kind and segment.
    """
    chosen = samples.examples(run, source, most)
    kinds = list(dict.fromkeys(each.kind for each in chosen))
    compared = samples.FIXED in kinds or samples.BROKE in kinds
    kinds = [samples.FIXED, samples.BROKE] if compared else [samples.SURE, samples.UNSURE]
    shown.samples_title = "Images it fixed and broke" if compared else "Most and least certain"
    shown.samples_text = (
        f"Drawn at random, at most {most} of a kind and segment. Below each: what the source model "
        "said, and what the adapted one says."
        if compared
        else f"The {most} of each segment with the highest and the lowest confidence."
    )
    gone = 0
    for segment in dict.fromkeys(each.segment for each in chosen):
        columns = []
        for kind in kinds:
            members = [e for e in chosen if (e.segment, e.kind) == (segment, kind)]
            pictures = [picture for e in members if (picture := _picture(e, found)) is not None]
            gone += len(members) - len(pictures)
            tone = {samples.FIXED: "gain", samples.BROKE: "loss"}.get(kind, "")
            name = _MARKS.get(kind, "") + kind
            columns.append({"name": name, "tone": tone, "images": pictures, "any": bool(members)})
        shown.segments.append({"name": segment, "kinds": columns})
    if gone:
        shown.no_samples = f"{gone} of {len(chosen)} images can no longer be read."
    elif not chosen:
        shown.no_samples = "No image is shown: the run fixed none and broke none."


def pictures_each(runs: int, segments: int) -> int:
    """Say how many pictures a kind and segment there are on a page of so many runs."""
    return min(MOST_OF_A_KIND, MOST_PICTURES // max(1, 2 * runs * segments))


def note(run: Run) -> str:
    """Say what went otherwise than it should in a run; empty where nothing did."""
    results, said = run.results, []
    if not results["completed"]:
        said.append(f"it ended early ({results.get('stopped') or 'nobody knows why'})")
    counts = {
        "batches that were not finite": results.get("nonfinite_batches", 0),
        "images left out": results.get("bad_images", {}).get("count", 0),
        "collapses found by CollapseGuard": results.get("collapse", {}).get("alarms", 0),
    }
    said += [f"{what}: {count}" for what, count in counts.items() if count]
    return f"{'; '.join(said)}." if said else ""


# Parts --------------------------------------------------------------------------------------------


def _picture(each: samples.Example, found: Pictures) -> dict[str, str] | None:
    data = samples.picture(found.images, each)
    if data is None:
        return None
    name = _class_name(found.classes)
    label = "" if each.label is None else f"class {name(each.label)}: "
    before = "" if each.before is None else f"{name(each.before)} → "
    said = f"{before}{name(each.after)}"
    words = f"before {name(each.before)}, " if each.before is not None else ""
    alt_text = (
        f"Image {each.path or each.index}, {label}{words}now {name(each.after)} with "
        f"{each.confidence:.0%} confidence"
    )
    return {"data": data, "text": said, "alt": alt_text}


def _named(frame: pd.DataFrame, classes: Sequence[str] | None) -> pd.DataFrame:
    """Put the name of a class after its number, where that says more."""
    if classes is None or list(classes) == [str(n) for n in range(len(classes))]:
        return frame
    texts = {str(n): f"{n} {name}" for n, name in enumerate(classes)}
    return frame.assign(**{"class": [texts.get(str(c), str(c)) for c in frame["class"]]})


def _class_name(classes: Sequence[str] | None) -> Callable[[int], str]:
    def name(number: int) -> str:
        known = classes is not None and 0 <= number < len(classes)
        return classes[number] if known and classes is not None else str(number)

    return name


def _what(run: Run) -> str:
    """Say of a run what tells it from others: method, rule, callbacks that change it."""
    method = run.settings["method"]
    rule = method.get("rule") or {}
    parts = [run.method]
    if "name" in rule:
        lr = rule.get("lr")
        parts.append(rule["name"] if lr is None else f"{rule['name']} {lr:g}")
    parts += [
        name for name in ("STAG", "CollapseGuard") if name in run.settings.get("callbacks", {})
    ]
    return " · ".join(parts)


def _histogram_text(time: pd.DataFrame) -> str:
    most = time.loc[time["share"].idxmax()]
    return (
        "A column is a stretch of the stream, a row a class; the brighter, the more of the "
        f"predictions. Highest: class {most['class']} with {most['share']:.0%} in "
        f"{most['segment']}."
    )


def _safe(name: str) -> str:
    """Return a name that files can have everywhere."""
    return re.sub(r"[^\w.-]+", "_", name)


def _class_title(name: str, source: Run | None, classes: pd.DataFrame) -> str:
    what = "accuracy" if classes["images"].any() else "share of the predictions"
    return f"{name}: {what} by class" if source is None else f"{name}: change of {what} by class"


def _class_text(classes: pd.DataFrame) -> str:
    said = []
    known = classes.dropna(subset="change")
    if len(known):
        change = known.set_index("class")["change"]
        best, worst = change.idxmax(), change.idxmin()
        said.append(
            f"Most gained: class {best} ({tables.points(change[best])} points); least: class "
            f"{worst} ({tables.points(change[worst])})."
        )
    dead = classes.loc[(classes["predicted"] == 0), "class"].tolist()
    if dead:
        listed = ", ".join(map(str, dead[:10])) + (" and others" if len(dead) > 10 else "")
        said.append(f"Never predicted: {listed}.")
    return " ".join(said) or "A bar a class."
