"""The page: all that is known of some runs, in one HTML file that needs no network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from typing import Any

import altair as alt
import vl_convert
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from tta_lightning.errors import InputError
from tta_lightning.report import frames, plots, tables
from tta_lightning.report.detail import (
    EDGES,
    Detail,
    Figure,
    Pictures,
    PicturesOf,
    add_samples,
    detail,
    note,
    pictures_each,
)
from tta_lightning.report.groups import group, unlike
from tta_lightning.report.protocol import source_of
from tta_lightning.report.run import Run

ASSETS = files("tta_lightning.report").joinpath("assets")


class Page:
    """The report on some runs.

    Args:
        runs: Finished runs with ``predictions.csv``.
        names: A name a run; runs that share one are repetitions, and are averaged. None finds out
            which are (see :func:`~tta_lightning.report.groups.group`).
        title: Of the page.
        pictures: Gives the images of a run; None for a page without them.

    Raises:
        InputError: A run cannot be read.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        names: Sequence[str] | None = None,
        title: str = "Test-time adaptation",
        pictures: PicturesOf | None = None,
    ) -> None:
        self.runs, self.title = list(runs), title
        self.names = group(runs) if names is None else list(names)
        self.order = list(dict.fromkeys(self.names))
        accuracies = frames.accuracies(self.runs, self.names)
        self.differences = unlike(self.runs, self.names)
        self._summary = frames.summary(accuracies)
        self.curves = self._curves()
        self._costs = frames.cost(self.runs, self.names, accuracies)
        self.cost = self._cost()
        self.details = self._details(pictures)

    @property
    def figures(self) -> list[Figure]:
        """All figures, in the order of the page."""
        of_runs = [figure for shown in self.details for figure in shown.figures]
        return [*self.curves, *([self.cost] if self.cost else []), *of_runs]

    def html(self) -> str:
        """Return the page."""
        table = tables.settings(self.runs, _columns(self.names))
        listed = list(dict.fromkeys(field.rpartition(".")[2] for field in self.differences))
        environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
        template = environment.from_string(_asset("page.html"))
        return template.render(
            title=self.title,
            subtitle=self._subtitle(),
            sections=_SECTIONS,
            differences=listed,
            headlines=tables.headlines(self._summary, ranked=not self.differences),
            notes=self._notes(),
            summary=tables.summary(self._summary, self._what(), ranked=not self.differences),
            curves=self.curves,
            cost_figure=self.cost,
            cost_table=tables.cost(self._costs),
            runs=self.details,
            difference_table=table,
            no_difference="There is one run." if len(self.runs) == 1 else "They do not differ.",
            manifests=[
                tables.manifest(run, name)
                for run, name in zip(self.runs, _columns(self.names), strict=True)
            ],
            all_figures=[{"id": f.id, "spec": _spec(f)} for f in self.figures],
            config=_json(plots.CONFIG),
            footer=f"Made by tta_lightning {version('tta_lightning')}. The page needs no network.",
            css=Markup(_asset("page.css")),
            vega=Markup(_vega()),
            js=Markup(_asset("page.js")),
        )

    def _curves(self) -> list[Figure]:
        curves = frames.curves(self.runs, self.names)
        segments = frames.segments(self.runs, self.names)
        labelled = bool(segments["accuracy"].notna().any())
        what = "accuracy" if labelled else "entropy"
        figures = [
            Figure(
                "curves-running",
                f"Running {what}",
                f"The mean {what} of the images that were seen since the segment began, against "
                f"the images seen.{EDGES if plots.has_edges(curves) else ''}",
                plots.running_accuracy(curves, self.order),
                table=tables.segments(segments),
            )
        ]
        if segments["segment"].nunique() > 1:
            figures.append(
                Figure(
                    "curves-segments",
                    "Each segment as a whole",
                    f"The mean {what} of each segment.",
                    plots.segment_accuracy(segments, self.order),
                )
            )
        return figures

    def _cost(self) -> Figure | None:
        known = self._costs.dropna(subset=["milliseconds", "accuracy"])
        if known.empty:
            return None
        return Figure(
            "cost-accuracy",
            "What accuracy costs",
            "Further up is better, further left is faster; the time has a logarithmic scale.",
            plots.cost(self._costs, self.order),
        )

    def _details(self, pictures: PicturesOf | None) -> list[Detail]:
        """Show the first run of each name, but for source models, which the others show."""
        firsts = [self.runs[self.names.index(name)] for name in self.order]
        sources = [source_of(run, self.runs) for run in firsts]
        used = [source for source in sources if source is not None]
        pairs = [
            (name, run, source)
            for name, run, source in zip(self.order, firsts, sources, strict=True)
            if run not in used
        ]
        segments = max((len(run.results["segments"]) for _, run, _ in pairs), default=1)
        most = pictures_each(len(pairs), segments)
        shown = []
        for number, (name, run, source) in enumerate(pairs):
            before = "" if source is None else self.names[self.runs.index(source)]
            found, why = _found(pictures, run)
            place, classes = f"run-{number + 1}", None if found is None else found.classes
            one = detail(run, source, (name, before), place, self.order, classes)
            one.open, one.no_samples = number == 0, why
            if self.names.count(name) > 1:
                one.what += f" · the first of {self.names.count(name)} runs"
            if found is not None and most:
                add_samples(one, run, source, found, most)
            elif found is not None:
                one.no_samples = "No images are shown: the page has too many segments for them."
            shown.append(one)
        return shown

    def _what(self) -> dict[str, str]:
        """Say what stands below each name in the summary."""
        several = len({run.model for run in self.runs}) > 1
        said = {}
        for name in self.order:
            members = [r for r, own in zip(self.runs, self.names, strict=True) if own == name]
            model = members[0].settings["model"]["name"].rpartition(".")[2]
            parts = [members[0].method]
            if several:
                parts.append(f"{model} {members[0].model[:6]}")
            if len(members) > 1:
                parts.append(f"{len(members)} runs")
            said[name] = " · ".join(parts)
        return said

    def _notes(self) -> list[str]:
        """Say of each run what went otherwise than it should."""
        columns = zip(_columns(self.names), self.runs, strict=True)
        return [f"{name}: {said}" for name, run in columns if (said := note(run))]

    def _subtitle(self) -> str:
        images = sorted({run.results["overall"]["images"] for run in self.runs})
        count = " to ".join(f"{n:,}" for n in dict.fromkeys((images[0], images[-1])))
        scenarios = {(run.settings["stream"] or {}).get("scenario", "") for run in self.runs}
        scenario = f", {', '.join(sorted(scenarios))}" if all(scenarios) else ""
        runs = f"{len(self.runs)} run{'s' if len(self.runs) > 1 else ''}"
        return f"{runs} of {count} images{scenario}"


_SECTIONS = [
    ("summary", "Summary"),
    ("curves", "Along the stream"),
    ("cost", "Cost"),
    ("runs", "Run by run"),
    ("manifest", "Manifests"),
]


def _found(pictures: PicturesOf | None, run: Run) -> tuple[Pictures | None, str]:
    """Return what is known of the images of a run, or why nothing is."""
    if pictures is None:
        return None, ""
    try:
        return pictures(run), ""
    except InputError as error:
        return None, f"No images are shown: {str(error).rstrip('.')}."


def _columns(names: Sequence[str]) -> list[str]:
    """Tell repetitions apart by a number."""
    counts = dict.fromkeys(names, 0)
    numbered = []
    for name in names:
        counts[name] += 1
        numbered.append(f"{name} #{counts[name]}" if names.count(name) > 1 else name)
    return numbered


def _spec(figure: Figure) -> Markup:
    fit = alt.AutoSizeParams(type="fit-x", contains="padding")
    chart = figure.chart.properties(width="container", autosize=fit)
    return _json(chart.to_dict())


def _json(value: Any) -> Markup:
    """Write JSON that may stand inside a script element."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    return Markup(text.replace("<", "\\u003c"))


def _asset(name: str) -> str:
    return ASSETS.joinpath(name).read_text(encoding="utf-8")


@cache
def _vega() -> str:
    """Return the code that draws the charts: it comes with a package, so no network is needed."""
    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;").replace(
        "</script", "<\\/script"
    )
