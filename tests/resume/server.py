"""Runs adaptations in processes of their own, and kills them: started once, it forks for each.

Reads a run a line as JSON, writes what became of it a line as JSON. The imports, which take
seconds, are made once; a run is a process like any other.
"""

import json
import os
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path

import torch
from lightning.pytorch import Callback, seed_everything

from tests.loops.test_adaptation import quiet
from tests.networks import make_network
from tests.streams import make_source
from tests.test_adapter import METHODS
from tta_lightning.callbacks import STAG, AdaptationCheckpoint, CollapseGuard
from tta_lightning.checkpoints import stored
from tta_lightning.data import Stream

OPTIONS = {"recurring": {"rounds": 2}}
EXTRAS = {"stag": lambda: STAG(), "guard": lambda: CollapseGuard(window=32, probes=16)}
PATIENCE = 120.0  # seconds for a run


class Slow(Callback):
    """Gives the one who kills time to aim; it changes no figure."""

    def on_test_batch_end(self, *args):
        time.sleep(0.01)


def adapt(run):
    """One run, as ``tta adapt`` would make it."""
    warnings.simplefilter("ignore")
    network, method = make_network(run["norm"]), METHODS[run["method"]]
    adapter = method(network)
    # where there is a checkpoint, it knows better than the seed
    goes_on = run["resume"] and bool(stored(run["folder"]))
    seed_everything(run["seed"] + goes_on, verbose=False)
    stream = Stream(
        make_source(12),
        scenario=run["scenario"],
        corruptions=["contrast", "gaussian_noise"],
        severity=3,
        batch_size=5,
        num_workers=run["workers"],
        clean=make_source(10, seed=9),
        scenario_options=OPTIONS.get(run["scenario"]),
    )
    callbacks = [AdaptationCheckpoint(every_n_batches=run["every"]), Slow()]
    callbacks += [EXTRAS[name]() for name in run["extras"]]
    trainer = quiet(*callbacks, run_dir=None if run["resume"] else run["folder"])
    trainer.adapt(
        adapter,
        datamodule=stream,
        resume_from=run["folder"] if run["resume"] else None,
    )


def lines_of(folder):
    path = Path(folder, "predictions.csv")
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def follow(child, run):
    """Wait for a run, and send it a signal once its predictions have so many lines."""
    started, told = time.monotonic(), False
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status), told
        if run["lines"] is not None and not told and lines_of(run["folder"]) >= run["lines"]:
            os.kill(child, signal.Signals[run["signal"]])
            told = True
        if time.monotonic() - started > PATIENCE:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.001)


def main():
    torch.set_num_threads(1)  # threads do not survive a fork, and sum in another order
    for line in sys.stdin:
        run = json.loads(line)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                with Path(run["log"]).open("a") as log:
                    os.dup2(log.fileno(), 1)
                    os.dup2(log.fileno(), 2)
                    adapt(run)
                code = 0
            except BaseException:
                Path(run["log"]).write_text(traceback.format_exc())
            finally:
                os._exit(code)
        code, told = follow(child, run)
        sys.stdout.write(json.dumps({"code": code, "told": told}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
