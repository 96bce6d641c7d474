"""``tta report``: several runs in one page."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from tta_lightning.errors import InputError
from tta_lightning.report.protocol import differences
from tta_lightning.report.run import Run
from tta_lightning.runs import write_atomically

if TYPE_CHECKING:  # the page takes two seconds to import
    from tta_lightning.report.detail import Pictures
    from tta_lightning.report.page import Page

MANIFEST = "manifest.json"


def report(arguments: Sequence[str]) -> int:
    """Run ``tta report``.

    Args:
        arguments: What follows ``tta report``.

    Returns:
        Exit code.

    Raises:
        InputError: A run cannot be read, or the page cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog="tta report",
        description="Put finished runs into one HTML page that needs no network.",
    )
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
    if found := differences(runs):
        console.print(
            f"These runs follow different protocols ({', '.join(found)}); the page says so.",
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
    found: dict[Path, tuple[str, str | None]] = {}
    for argument in arguments:
        name, pattern = _split(argument)
        folders = _matching(pattern) if name else [Path(pattern)]
        inner = [folder for outer in folders for folder in _runs_in(outer)]
        if not inner:
            raise InputError(
                f"{argument}: there is no run. Give folders that `tta adapt` wrote, a folder of "
                "such folders, or NAME=PATTERN."
            )
        for folder in inner:
            found.setdefault(folder.resolve(), (str(folder), name))
    names = [name for _, name in found.values()]
    if None in names and any(names):
        raise InputError(
            "Some of the runs have a NAME= before them, others have none. Name all of them, or "
            "none, and repetitions are found by their manifests."
        )
    runs = [Run.load(folder) for folder, _ in found.values()]
    return runs, None if None in names else [str(name) for name in names]


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
        return sum(len(save(figure.chart, folder, figure.id)) for figure in page.figures)
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


def _split(argument: str) -> tuple[str | None, str]:
    """Take NAME=PATTERN apart; a folder that exists is a folder, whatever its name."""
    name, sign, pattern = argument.partition("=")
    if not sign or Path(argument).exists():
        return None, argument
    return name, pattern


def _matching(pattern: str) -> list[Path]:
    """Return what a pattern like that of a shell matches, in order."""
    path = Path(pattern)
    root = Path(path.anchor) if path.is_absolute() else Path()
    return sorted(root.glob(str(path.relative_to(path.anchor) if path.anchor else path)))


def _runs_in(folder: Path) -> list[Path]:
    """Return a run, or the finished runs that lie in a folder."""
    if (folder / MANIFEST).is_file() or not folder.is_dir():
        return [folder]
    inner = sorted(path for path in folder.iterdir() if (path / "metrics.json").is_file())
    return [path for path in inner if (path / MANIFEST).is_file()]
