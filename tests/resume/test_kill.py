"""A run that is killed and resumed ends as if nothing had happened, to the bit."""

import json
import os
import random
import signal
import subprocess
import sys
from itertools import product

import pytest

from tests.conftest import read_json
from tests.meta.running import ROOT
from tests.networks import are_equal
from tests.test_adapter import METHODS, NEVER, NORMS, ONLY
from tta_lightning import checkpoints

SCENARIOS = (
    *("reset_each_shift", "continual", "mixed_domains", "single_sample", "recurring"),
    "sliding_window",
)
# one row a class in the short version, stochastic ones as they are
SHORT = (
    *("source", "bn-running", "tent-sgd", "eata-sgd", "sar-sgd", "deyo-patch", "cotta-views"),
    *("rotta-often", "roid-adam", "lame-knn", "t3a", "memo", "mgtta-mgg", "mt3-loop", "ttt"),
)


@pytest.fixture(scope="module")
def server():
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.resume.server"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )

    def ask(**run):
        process.stdin.write(json.dumps(run) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    yield ask
    process.stdin.close()
    process.wait(timeout=60)
    process.stdout.close()


def norm_for(method, number):
    """A normalisation that the method works with, another one from case to case."""
    usual = [n for n in NORMS if not method.startswith(NEVER if n == "bn" else ONLY)]
    return usual[number % len(usual)]


def short_cases():
    for number, method in enumerate(SHORT):
        yield pytest.param(method, SCENARIOS[number % 5], 2 * (number % 2), number, (), id=method)
    for number, extra in enumerate(("stag", "guard")):
        yield pytest.param("tent-sgd", "recurring", 0, 1 + number, (extra,), id=f"tent-{extra}")
    yield pytest.param("tent-adam", "sliding_window", 0, 1, (), id="tent-window")


def full_cases():
    for number, (method, scenario, workers) in enumerate(product(METHODS, SCENARIOS, (0, 2))):
        name = f"{method}-{scenario}-{workers}"
        yield pytest.param(method, scenario, workers, number, (), id=name)


def without_seconds(metrics):
    """The figures of a run without those that a clock or the system's memory gave."""
    cost = metrics.pop("cost")
    counts = {name: cost[name] for name in ("forwards_per_batch", "backwards_per_batch")}
    return {**metrics, **counts}


def end_of(folder):
    """All that a run leaves: predictions, figures, and the state that its model ended in."""
    state = checkpoints.read(checkpoints.stored(folder)[0])
    state["callbacks"].pop("CostMonitor{}")  # seconds and bytes
    predictions = (folder / "predictions.csv").read_bytes()
    return predictions, without_seconds(read_json(folder / "metrics.json")), state


def kill_and_compare(server, folder, method, scenario, workers, number, extras, kills):
    rng = random.Random(number)
    run = {
        "method": method,
        "norm": norm_for(method, number),
        "scenario": scenario,
        "workers": workers,
        "every": rng.choice((1, 2, 3)),
        "extras": extras,
        "seed": number,
        "signal": "SIGKILL",
        "log": str(folder / "log.txt"),
    }
    whole = {**run, "folder": str(folder / "whole"), "resume": False, "lines": None}
    log = folder / "log.txt"
    assert server(**whole)["code"] == 0, log.read_text()
    expected = end_of(folder / "whole")
    total = expected[0].count(b"\n")

    part = {**run, "folder": str(folder / "part")}
    code, predicted = -signal.SIGKILL, 0
    for attempt in range(kills + 1):
        # further than the last process came; at the last line it is killed while it ends, or has
        lines = min(predicted + rng.randint(1, total // kills), total)
        last = attempt == kills
        code = server(**part, resume=attempt > 0, lines=None if last else lines)["code"]
        assert code == (0 if last else -signal.SIGKILL) or lines == total, log.read_text()
        predicted = (folder / "part" / "predictions.csv").read_bytes().count(b"\n")
        if code == 0:
            break
    assert code == 0, log.read_text()

    predictions, metrics, state = end_of(folder / "part")
    assert predictions == expected[0]
    assert metrics == expected[1]
    assert are_equal(state, expected[2])
    resumed = read_json(folder / "part" / "manifest.json").get("resumed", [])
    assert len(resumed) <= kills  # one that was killed before its first batch has left no note


@pytest.mark.parametrize(("method", "scenario", "workers", "number", "extras"), list(short_cases()))
def test_killed_and_resumed_is_equal(server, tmp_path, method, scenario, workers, number, extras):
    kill_and_compare(server, tmp_path, method, scenario, workers, number, extras, kills=1)


@pytest.mark.full
@pytest.mark.parametrize(("method", "scenario", "workers", "number", "extras"), list(full_cases()))
def test_every_method_in_every_scenario_killed_twice(
    server, tmp_path, method, scenario, workers, number, extras
):
    kill_and_compare(server, tmp_path, method, scenario, workers, number, extras, kills=2)
