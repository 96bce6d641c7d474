"""How the tests of trainings run them: quietly, and in processes of their own."""

import os
import subprocess
from pathlib import Path

from tta_lightning.trainer import Trainer

ROOT = Path(__file__).parents[2]


def quiet_trainer(*callbacks, **options):
    given = {
        "run_dir": False,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
    }
    return Trainer(callbacks=list(callbacks), **{**given, **options})


def run_process(folder, *command, threads=1):
    """Run a command in a folder; its exit status and what it printed.

    Sums in several threads are made in another order: what is compared bit by bit needs as many in
    each process.
    """
    return subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
