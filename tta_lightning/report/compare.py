"""``tta compare``: several runs in one table."""

from __future__ import annotations

import argparse
import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tta_lightning.errors import InputError
from tta_lightning.runs import write_atomically


@dataclass(frozen=True)
class Run:
    """A finished run, read from its folder.

    Attributes:
        folder: The folder.
        manifest: What ``manifest.json`` holds.
        metrics: What ``metrics.json`` holds.
    """

    folder: Path
    manifest: dict[str, Any]
    metrics: dict[str, Any]

    @classmethod
    def load(cls, folder: str | Path) -> Run:
        """Read a run.

        Raises:
            InputError: The folder is missing or holds no finished run.
        """
        return cls(
            Path(folder),
            _read(Path(folder, "manifest.json")),
            _read(Path(folder, "metrics.json")),
        )

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.folder.name

    @property
    def model(self) -> str:
        """What identifies the source model: the hash of its weights."""
        return str(self.manifest["model"]["weights_sha256"])

    @property
    def is_source(self) -> bool:
        """Whether this is the model without adaptation."""
        return bool(self.manifest["method"]["name"] == "Source")

    def accuracies(self) -> dict[str, float | None]:
        """Accuracy of each segment, and their mean."""
        found = {s["segment"]: s["accuracy"] for s in self.metrics["segments"]}
        known = [value for value in found.values() if value is not None]
        return {**found, "mean": sum(known) / len(known) if known else None}


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Find where the protocols of runs differ: stream, precision, completeness.

    Args:
        runs: Two or more runs.

    Returns:
        Name of the field to its value in each run; empty when the runs are comparable.
    """
    protocols = [_protocol(run) for run in runs]
    fields = sorted({field for protocol in protocols for field in protocol})
    values = {field: [protocol.get(field) for protocol in protocols] for field in fields}
    return {field: found for field, found in values.items() if any(v != found[0] for v in found)}


def build_table(runs: Sequence[Run]) -> Table:
    """Put runs side by side: a row a segment and the mean, a column a run.

    The gain over the run of the method Source with the same model is coloured.

    Args:
        runs: Runs with the same segments.

    Returns:
        A rich table of accuracies in percent.
    """
    table = Table(
        title="Accuracy in %, and gain over the source model",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=0,
        collapse_padding=True,
    )
    table.add_column("segment", no_wrap=True)
    for run in runs:
        table.add_column(
            f"{run.name}\n{run.manifest['method']['name']}", justify="right", min_width=10
        )
    columns = [run.accuracies() for run in runs]
    baselines = {run.model: run.accuracies() for run in runs if run.is_source}
    for segment in columns[0]:
        if segment == "mean":
            table.add_section()
        cells = [
            _cell(
                column.get(segment),
                None if run.is_source else baselines.get(run.model, {}).get(segment),
            )
            for run, column in zip(runs, columns, strict=True)
        ]
        table.add_row(Text(segment, style="bold" if segment == "mean" else ""), *cells)
    return table


def summarise(run: Run) -> str:
    """Say in two lines how a run went and where its results are."""
    overall, segments = run.metrics["overall"], run.accuracies()
    words = [f"{overall['images']} images in {run.metrics['batches']} batches"]
    if segments["mean"] is not None:
        words.append(f"accuracy {segments['mean']:.1%} (mean over {len(segments) - 1} segments)")
    words += [f"{name} {overall[name]:.3f}" for name in ("nll", "ece") if overall[name] is not None]
    if overall["entropy"] is not None:
        words.append(f"entropy {overall['entropy']:.3f} nats")
    for count, what in (
        (run.metrics["bad_images"]["count"], "images left out"),
        (run.metrics["nonfinite_batches"], "batches not finite"),
    ):
        if count:
            words.append(f"{count} {what}")
    files = sorted(path.name for path in run.folder.iterdir() if path.is_file())
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
    parser = argparse.ArgumentParser(
        prog="tta compare",
        description="Put finished runs in one table: tta compare runs/source runs/tent -o runs.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run of tta adapt")
    parser.add_argument("-o", "--output", help="folder to write curves.png and table.csv to")
    parser.add_argument("--force", action="store_true", help="compare runs of different protocols")
    options = parser.parse_args(list(arguments))
    runs = [Run.load(folder) for folder in options.runs]
    found = differences(runs)
    if found and not options.force:
        shown = "; ".join(f"{k}: {' / '.join(map(str, v))}" for k, v in found.items())
        raise InputError(
            f"These runs follow different protocols ({shown}). Compare runs of one protocol, or "
            "use --force."
        )
    console = Console()
    console.print(build_table(runs))
    if options.output:
        _write(Path(options.output), runs)
        console.print(f"curves  {Path(options.output, 'curves.png')}", soft_wrap=True)
        console.print(f"table   {Path(options.output, 'table.csv')}", soft_wrap=True)
    for run in runs:
        console.print(f"run     {run.folder}", soft_wrap=True)
    return 0


def _write(folder: Path, runs: Sequence[Run]) -> None:
    from tta_lightning.report.plots import draw_curves  # matplotlib takes a second to import

    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "curves.png", draw_curves({run.name: run.metrics for run in runs}))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = [run.accuracies() for run in runs]
    writer.writerow(["segment", *(run.name for run in runs)])
    writer.writerows([name, *(column.get(name) for column in columns)] for name in columns[0])
    write_atomically(folder / "table.csv", text.getvalue())


def _cell(accuracy: float | None, baseline: float | None) -> Text:
    if accuracy is None:
        return Text("-")
    text = Text(f"{100 * accuracy:.1f}")
    if baseline is not None:
        gain = 100 * (accuracy - baseline)
        style = "green" if gain > 0.05 else "red" if gain < -0.05 else "dim"
        text.append(f" {gain:+.1f}", style=style)
    return text


def _protocol(run: Run) -> dict[str, Any]:
    stream = run.manifest["stream"] or {}
    flat = {f"stream.{key}": _without_root(value) for key, value in stream.items()}
    return {
        **flat,
        "segments": [segment["segment"] for segment in run.metrics["segments"]],
        "images": run.metrics["overall"]["images"],
        "precision": run.manifest["precision"],
        "completed": run.metrics["completed"],
    }


def _without_root(value: Any) -> Any:
    """Leave out where the images lie: their digest says which they are."""
    return {k: v for k, v in value.items() if k != "root"} if isinstance(value, dict) else value


def _read(path: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{path} cannot be read: {error.strerror}. Give folders that `tta adapt` wrote and "
            "that came to an end."
        ) from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}. The run cannot be compared.") from error
    return values
