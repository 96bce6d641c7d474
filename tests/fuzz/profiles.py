"""What the fuzz tests share: how many inputs they try, and what counts as a failure.

``TTA_FUZZ_EXAMPLES`` is how many inputs the cheapest tests try each; dearer ones try a share of it.
Without it the inputs are few and always the same.
"""

import csv
import faulthandler
import json
import os
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings

from tta_lightning.callbacks.predictions import COLUMNS
from tta_lightning.errors import InputError

LIMIT = 20  # seconds that one input may take; on an idle machine they take less than one
_GIVEN = os.environ.get("TTA_FUZZ_EXAMPLES")
_EXAMPLES = int(_GIVEN or 100)

tried: Counter[str] = Counter()
"""Number of inputs by what was done with them: ``refused`` or ``taken``."""


def examples(share: float = 1.0) -> settings:
    """How a test searches; `share` is how many of the examples it can afford."""
    return settings(
        max_examples=max(1, round(_EXAMPLES * share)),
        deadline=None,  # `time_limit` ends an input that hangs
        derandomize=_GIVEN is None,
        database=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )


class _OutOfTime(BaseException):
    """Not an Exception, so that nothing under test can mistake it for one of its own."""


@contextmanager
def time_limit(seconds: int = LIMIT) -> Iterator[None]:
    """Fail what takes longer; end the process if it does not even come back to Python."""

    def stop(*_: object) -> None:
        raise _OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    # pytest may replace sys.stderr by something without a file of its own
    faulthandler.dump_traceback_later(5 * seconds, exit=True, file=sys.__stderr__)
    signal.alarm(seconds)
    try:
        yield
    except _OutOfTime:
        raise AssertionError(f"it did not end within {seconds} s") from None
    finally:
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)


def refusal(action: Callable[[], Any]) -> InputError | None:
    """Run something that may refuse its input; everything but a sentence is a failure."""
    with time_limit(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            action()
        except InputError as error:
            tried["refused"] += 1
            return error
    tried["taken"] += 1
    return None


def assert_whole(folder: Path) -> None:
    """A run folder does not exist, or whatever is in it can be read to its end."""
    if not folder.exists():
        return
    for file in folder.rglob("*.json"):
        json.loads(file.read_text(encoding="utf-8"), parse_constant=_refuse)
    text = (folder / "predictions.csv").read_text(encoding="utf-8")
    assert text.endswith("\n")
    header, *rows = csv.reader(text.splitlines(keepends=True))
    assert tuple(header) == COLUMNS
    assert {len(row) for row in rows} <= {len(COLUMNS)}
    hidden = {file.name for file in folder.rglob(".*") if file.is_file()}
    assert hidden <= {".lock"}  # the others are half-written ones
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["overall"]["images"] == len(rows) > 0


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")
