"""How long `tta --help` takes beside importing the libraries that it cannot do without."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

LIMIT = 1.0  # seconds that `tta --help` may take longer
HELP = "tta --help"
IMPORTS = "import torch, lightning, timm"
COMMANDS = {
    HELP: [str(Path(sys.executable).with_name("tta")), "--help"],
    IMPORTS: [sys.executable, "-c", IMPORTS],
}


def seconds(command: list[str]) -> float:
    """Run a command and return how long it took.

    Raises:
        subprocess.CalledProcessError: The command failed.
    """
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def measure(rounds: int) -> dict[str, list[float]]:
    """Time all commands by turns, after one turn that fills the disk's cache."""
    for command in COMMANDS.values():
        seconds(command)
    taken: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(rounds):
        for name, command in COMMANDS.items():
            taken[name].append(seconds(command))
    return taken


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7, help="runs of each command")
    taken = measure(parser.parse_args().rounds)
    table = Table(title="Start of a process: seconds")
    for column in ("command", "runs", "median", "min", "quartiles"):
        table.add_column(column, justify="left" if column == "command" else "right")
    for name, values in taken.items():
        low, median, high = np.percentile(values, [25, 50, 75])
        table.add_row(
            name,
            str(len(values)),
            f"{median:.2f}",
            f"{min(values):.2f}",
            f"{low:.2f} - {high:.2f}",
        )
    console = Console()
    console.print(table)
    more = float(np.median(taken[HELP]) - np.median(taken[IMPORTS]))
    word = "PASS" if more <= LIMIT else "over"
    console.print(f"{HELP} takes {more:+.2f} s more: {word} (limit {LIMIT} s)")


if __name__ == "__main__":
    main()
