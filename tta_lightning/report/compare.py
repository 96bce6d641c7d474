"""``tta compare``: several runs in one table."""

from __future__ import annotations

import argparse
import csv
import io
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tta_lightning.errors import InputError
from tta_lightning.report.protocol import differences, is_hash, source_of
from tta_lightning.report.run import Run, labels
from tta_lightning.runs import write_atomically

__all__ = ["Run", "build_tables", "compare", "differences", "summarise"]

MOST_ROWS = 40  # a longer table shows means over visits or severities
MOST_ROUNDS = 10  # of more rounds, not every one is shown


class Row(NamedTuple):
    """A row of the table: the mean over some segments."""

    label: str
    segments: tuple[str, ...]


class Column(NamedTuple):
    """A column of the table: a run, and the run of the source model that it gains over."""

    label: str
    run: Run
    baseline: Run | None


def build_tables(runs: Sequence[Run], width: int | None = None) -> list[Table]:
    """Put runs side by side: a row a segment and the mean, a column a run.

    The gain over the run of the method Source with the same model and protocol is coloured. Of
    more than 40 segments, those of one domain are averaged (of one corruption, where a run has it
    at several severities), and where domains come again, each round of the stream has a row too.

    Args:
        runs: Runs; a segment that one lacks is left empty.
        width: Characters a line; None for no limit.

    Returns:
        Rich tables of accuracies in percent: one, or several if all runs are wider than ``width``.
    """
    columns = [
        Column(label, run, source_of(run, runs))
        for label, run in zip(labels(runs), runs, strict=True)
    ]
    sections, what = _sections(runs)
    title = _title(columns, what)
    for count in range(len(columns), 0, -1):
        parts = [columns[i : i + count] for i in range(0, len(columns), count)]
        tables = [_table(title, part, sections) for part in parts]
        if width is None or all(table_width(table) <= width for table in tables):
            break
    return tables


def table_width(table: Table) -> int:
    """Return how many characters wide a table is that is given all the room it wants."""
    return Console(width=1_000_000).measure(table).maximum


def summarise(run: Run) -> str:
    """Say in two lines how a run went and where its results are."""
    overall, accuracies = run.results["overall"], run.accuracies
    images, batches = overall["images"], run.results["batches"]
    words = [f"{_count(images, 'image')} in {_count(batches, 'batch', 'batches')}"]
    mean = run.mean(accuracies)
    if mean is not None:
        known = sum(accuracy is not None for accuracy in accuracies.values())
        words.append(f"accuracy {mean:.1%} (mean over {_count(known, 'segment')})")
    words += [f"{name} {overall[name]:.3f}" for name in ("nll", "ece") if overall[name] is not None]
    if overall["entropy"] is not None:
        words.append(f"entropy {overall['entropy']:.3f} nats")
    left_out, nonfinite = run.results["bad_images"]["count"], run.results["nonfinite_batches"]
    if left_out:
        words.append(f"{_count(left_out, 'image')} left out")
    if nonfinite:
        words.append(f"{_count(nonfinite, 'batch', 'batches')} not finite")
    files = sorted(path.name for path in run.folder.glob("[!.]*") if path.is_file())
    return f"{', '.join(words)}\n{run.folder}: {', '.join(files)}"


def compare(arguments: Sequence[str]) -> int:
    """Run ``tta compare``.

    Args:
        arguments: What follows ``tta compare``.

    Returns:
        Exit code.

    Raises:
        InputError: A run cannot be read, or the runs are not comparable.
    """
    parser = argparse.ArgumentParser(prog="tta compare")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run of tta adapt")
    parser.add_argument("-o", "--output", help="folder to write curves.png and table.csv to")
    parser.add_argument("--force", action="store_true", help="compare runs of different protocols")
    options = parser.parse_args(list(arguments))
    # a folder that is given twice, as by `runs/source runs/*`, is one run
    folders = {Path(folder).resolve(): folder for folder in options.runs}
    runs = [Run.load(folder) for folder in folders.values()]
    found = differences(runs)
    if found and not options.force:
        shown = "; ".join(
            f"{field}: {' / '.join(_shown(field, value) for value in values)}"
            for field, values in found.items()
        )
        raise InputError(
            f"These runs follow different protocols ({shown}). Compare runs of one protocol, or "
            "use --force."
        )
    console = Console(markup=False)  # names of folders may hold brackets
    tables = build_tables(runs, console.width if console.is_terminal else None)
    console.width = max(console.width, *map(table_width, tables))
    for table in tables:
        console.print(table)
    if options.output:
        _write(Path(options.output), runs)
        console.print(f"curves  {Path(options.output, 'curves.png')}", soft_wrap=True)
        console.print(f"table   {Path(options.output, 'table.csv')}", soft_wrap=True)
    for run in runs:
        console.print(f"run     {run.folder}", soft_wrap=True)
    return 0


def _write(folder: Path, runs: Sequence[Run]) -> None:
    from tta_lightning.report.pictures import draw_curves  # takes two seconds to import

    names = labels(runs)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "curves.png", draw_curves(runs, names))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["segment", *names])
    for row in (*_visits(runs), _mean(runs)):
        writer.writerow([row.label, *(run.mean(row.segments) for run in runs)])
    write_atomically(folder / "table.csv", text.getvalue())


# Rows ---------------------------------------------------------------------------------------------


def _sections(runs: Sequence[Run]) -> tuple[list[list[Row]], str]:
    """Say which rows the table has, in groups that are set apart, and what they are means over."""
    visits, mean = _visits(runs), _mean(runs)
    domains = _grouped(mean.segments, _domain)
    if len(visits) <= MOST_ROWS:
        return [visits, [mean]], ""
    if any(_has_severities(run) for run in runs):
        return [_grouped(mean.segments, _corruption), [mean]], "severities"
    if len(domains) < len(visits):
        rounds = _thinned(_grouped(mean.segments, _round))
        return [domains, rounds, [mean]], "visits"
    return [visits, [mean]], ""


def _visits(runs: Sequence[Run]) -> list[Row]:
    return [Row(name, (name,)) for name in _mean(runs).segments]


def _mean(runs: Sequence[Run]) -> Row:
    return Row("mean", tuple(dict.fromkeys(name for run in runs for name in run.accuracies)))


def _grouped(segments: Iterable[str], key: Callable[[str], str]) -> list[Row]:
    groups: dict[str, list[str]] = {}
    for segment in segments:
        groups.setdefault(key(segment), []).append(segment)
    return [Row(label, tuple(members)) for label, members in groups.items()]


def _thinned(rounds: list[Row]) -> list[Row]:
    """Keep the first round, those at equal steps, and the last."""
    step = -(-len(rounds) // MOST_ROUNDS)
    last = len(rounds)
    return [row for n, row in enumerate(rounds, 1) if n in (1, last) or n % step == 0]


def _domain(segment: str) -> str:
    """Take the number of the visit off: ``fog-5 (2)`` is ``fog-5``."""
    return re.sub(r" \(\d+\)$", "", segment)


def _corruption(segment: str) -> str:
    """Take visit and severity off: ``fog-5 (2)`` is ``fog``."""
    return re.sub(r"-\d$", "", _domain(segment))


def _round(segment: str) -> str:
    visit = re.search(r" \((\d+)\)$", segment)
    return f"round {visit.group(1) if visit else 1}"


def _has_severities(run: Run) -> bool:
    domains = set(map(_domain, run.accuracies))
    return len(set(map(_corruption, domains))) < len(domains)


# The table ----------------------------------------------------------------------------------------


def _title(columns: Sequence[Column], what: str) -> str:
    runs = [column.run for column in columns]
    title = "Accuracy in %"
    if any(column.baseline is not None for column in columns):
        title += ", and gain over the source model"
    if what:
        title += f"; each row the mean over its {what}"
    if any(list(run.accuracies) != list(runs[0].accuracies) for run in runs):
        title += "; mean: over each run's own segments"
    return title


def _table(title: str, columns: Sequence[Column], sections: Sequence[Sequence[Row]]) -> Table:
    table = Table(
        title=title, title_justify="left", box=SIMPLE_HEAD, padding=0, collapse_padding=True
    )
    table.add_column("segment", no_wrap=True)
    for label, run, _ in columns:
        header = Text(f"{label}\n{run.method}")
        table.add_column(header, justify="right", min_width=10, no_wrap=True)
    for section in sections:
        table.add_section()
        for row in section:
            cells = (
                _cell(run.mean(row.segments), None if base is None else base.mean(row.segments))
                for _, run, base in columns
            )
            table.add_row(Text(row.label, style="bold" if row.label == "mean" else ""), *cells)
    return table


def _cell(accuracy: float | None, baseline: float | None) -> Text:
    if accuracy is None:
        return Text("-")
    text = Text(f"{100 * accuracy:.1f}")
    if baseline is not None:
        gain = 100 * (accuracy - baseline)
        style = "green" if gain > 0.05 else "red" if gain < -0.05 else "dim"
        text.append(f" {gain:+.1f}", style=style)
    return text


def _count(number: int, one: str, several: str | None = None) -> str:
    return f"{number} {one if number == 1 else several or one + 's'}"


def _shown(field: str, value: Any) -> str:
    """Write a value of a protocol out, short enough for a message."""
    if is_hash(field):
        return str(value)[:12]
    text = ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
