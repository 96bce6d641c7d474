"""``tta report``: several runs in one page."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from tta_lightning.errors import InputError
from tta_lightning.report.run import Run
from tta_lightning.runs import write_atomically

if TYPE_CHECKING:  # the page takes two seconds to import
    from tta_lightning.report.detail import Pictures
    from tta_lightning.report.page import Page

MANIFEST, METRICS = "manifest.json", "metrics.json"


def report(arguments: Sequence[str]) -> int:
    """Run ``tta report``.

    Args:
        arguments: What follows ``tta report``.

    Returns:
        Exit code.

    Raises:
        InputError: A run cannot be read, or the page cannot be written.
    """
    parser = argparse.ArgumentParser(prog="tta report")
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="folder of a run of `tta adapt`, a folder of such folders, or NAME=PATTERN: the runs "
        "that match are repetitions, and are averaged under that name",
    )
    parser.add_argument("-o", "--output", default="report.html", help="the page (report.html)")
    parser.add_argument("--figures", metavar="DIR", help="write each figure as PNG and PDF there")
    parser.add_argument("--title", default="Test-time adaptation", help="title of the page")
    parser.add_argument("--no-images", action="store_true", help="leave out the sample images")
    options = parser.parse_args(list(arguments))
    runs, names = find_runs(options.runs)
    from tta_lightning.report.page import Page

    page = Page(runs, names, options.title, None if options.no_images else pictures_of)
    console = Console(markup=False)
    output = Path(options.output)
    if output.is_dir():
        output /= "report.html"
    write_page(page, output)
    if options.figures:
        count = write_figures(page, Path(options.figures))
        console.print(f"figures {options.figures} ({count} files)", soft_wrap=True)
    if page.differences:
        console.print(
            f"These runs follow different protocols ({', '.join(page.differences)}); the page "
            "says so.",
            soft_wrap=True,
        )
    console.print(f"report  {output}", soft_wrap=True)
    return 0


def find_runs(arguments: Sequence[str]) -> tuple[list[Run], list[str] | None]:
    """Load the runs that the command line names.

    Args:
        arguments: Folders, or ``NAME=PATTERN``.

    Returns:
        The runs, each once, and a name for each; None instead of the names where none were given.

    Raises:
        InputError: There is no run, or only some have names.
    """
    found: dict[Path, tuple[Path, str]] = {}
    for argument in arguments:
        name, folders = _named(argument)
        inner = [folder for outer in folders for folder in _runs_in(outer)]
        if not inner:
            raise InputError(
                f"{argument}: there is no run. Give folders that `tta adapt` wrote, a folder of "
                "such folders, or NAME=PATTERN."
            )
        for folder in inner:
            found.setdefault(folder.resolve(), (folder, name))
    runs, names = [Run.load(folder) for folder, _ in found.values()], [n for _, n in found.values()]
    if not any(names):
        return runs, None
    if not all(names):
        raise InputError(
            "Some of the runs have a NAME= before them, others have none. Name all of them, or "
            "none, and repetitions are found by their manifests."
        )
    _check_repetitions(runs, names)
    return runs, names


def write_page(page: Page, path: Path) -> None:
    """Write a page, atomically.

    Raises:
        InputError: The file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, page.html())
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}. Choose another.") from error


def write_figures(page: Page, folder: Path) -> int:
    """Write all figures of a page as PNG and PDF.

    Returns:
        The number of files.

    Raises:
        InputError: The folder cannot be written to.
    """
    from tta_lightning.report.pictures import save

    try:
        return sum(len(save(figure.chart, folder, figure.file)) for figure in page.figures)
    except OSError as error:
        raise InputError(
            f"{folder} cannot be written to: {error.strerror}. Choose another."
        ) from error


def pictures_of(run: Run) -> Pictures:
    """Return the images of a run, from its stream.

    Raises:
        InputError: They cannot be had.
    """
    from tta_lightning.report.detail import Pictures
    from tta_lightning.report.images import stream_of

    stream = stream_of(run)
    return Pictures(stream.image, stream.classes)


def _named(argument: str) -> tuple[str, list[Path]]:
    """Take NAME=PATTERN apart; a folder that exists is a folder, whatever its name."""
    name, sign, pattern = argument.partition("=")
    if not sign or Path(argument).exists():
        return "", [Path(argument)]
    if not name or not pattern:
        raise InputError(f"{argument}: expected NAME=PATTERN, as tent=runs/seed*/tent.")
    path = Path(pattern).expanduser()
    if path.exists():
        return name, [path]
    root = Path(path.anchor) if path.is_absolute() else Path()
    matching = root.glob(str(path.relative_to(path.anchor) if path.anchor else path))
    return name, [found for found in _in_order(matching) if (found / MANIFEST).is_file()]


def _runs_in(folder: Path) -> list[Path]:
    """Return a run, or the runs that lie in a folder, those that came to an end."""
    if (folder / MANIFEST).is_file() or not folder.is_dir():
        return [folder]
    inner = [path for path in _in_order(folder.iterdir()) if (path / MANIFEST).is_file()]
    ended = [path for path in inner if (path / METRICS).is_file()]
    for path in inner:
        if path not in ended:
            Console(stderr=True, markup=False).print(f"left out, not finished: {path}")
    return ended


def _in_order(paths: Iterable[Path]) -> list[Path]:
    """Sort paths as a person counts: run2 before run10."""
    return sorted(paths, key=lambda path: [int(p) if p.isdigit() else p for p in _parts(path)])


def _parts(path: Path) -> list[str]:
    return re.split(r"(\d+)", str(path))


def _check_repetitions(runs: Sequence[Run], names: Sequence[str]) -> None:
    """Refuse a name for runs of different methods: their mean would say nothing."""
    for name in dict.fromkeys(names):
        found = {run.method for run, own in zip(runs, names, strict=True) if own == name}
        if len(found) > 1:
            raise InputError(
                f"{name}= matches runs of different methods ({', '.join(sorted(found))}), whose "
                "mean would say nothing. Narrow the pattern."
            )
