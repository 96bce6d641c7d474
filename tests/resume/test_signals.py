"""``tta adapt`` as a process that is told to end, or is killed, and goes on."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import CONFIGS, CPU, read_json
from tests.meta.running import ROOT
from tests.networks import are_equal
from tests.resume.test_kill import without_seconds
from tta_lightning.checkpoints import read, stored

TTA = (sys.executable, "-c", "import sys; from tta_lightning.cli import main; sys.exit(main())")
SLOW = (  # a plain callback that gives time to aim
    "import time; from lightning.pytorch import Callback\n"
    "class Slow(Callback):\n"
    "    def on_test_batch_end(self, *args): time.sleep(0.05)\n"
)
PATIENCE = 60.0  # seconds until a process has predicted something


@pytest.fixture
def arguments(digits_checkpoint):
    return [
        *("adapt", "-c", CONFIGS / "adapt" / "tent.yaml", "-c", CONFIGS / "stream" / "digits.yaml"),
        *("--model.network", digits_checkpoint, *CPU, "--data.limit=40", "--data.batch_size=10"),
        *("--data.corruptions=[fog,contrast,snow]", "--data.num_workers=2"),
        "--trainer.callbacks+=slow.Slow",
        *("--trainer.callbacks+=AdaptationCheckpoint", "--trainer.callbacks.every_n_batches=2"),
    ]


def start(folder, *command):
    (folder / "slow.py").write_text(SLOW)
    return subprocess.Popen(
        [*TTA, *map(str, command)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{folder}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that a signal can go to all of its processes
    )


def wait_for(path, lines, process):
    started = time.monotonic()
    while not path.is_file() or path.read_bytes().count(b"\n") < lines:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() - started < PATIENCE
        time.sleep(0.005)


def test_told_to_end_and_killed_the_run_goes_on(arguments, tmp_path):
    whole = start(tmp_path, *arguments, "--trainer.run_dir=whole")
    _, err = whole.communicate(timeout=200)
    assert whole.returncode == 0, err

    part = start(tmp_path, *arguments, "--trainer.run_dir=part")
    wait_for(tmp_path / "part" / "predictions.csv", 15, part)
    os.killpg(part.pid, signal.SIGTERM)  # as SLURM does: the workers too
    _, err = part.communicate(timeout=60)
    assert part.returncode == 143, err
    assert "Traceback" not in err
    assert "stopped by SIGTERM" in err
    assert "resume_from=part goes on there" in err
    predicted = (tmp_path / "part" / "predictions.csv").read_text().count("\n") - 1
    newest = read(stored(tmp_path / "part")[0])
    assert newest["loop"]["served"] == predicted  # nothing that was predicted is lost
    assert read_json(tmp_path / "part" / "metrics.json")["completed"] is False

    # its own configuration is all that it takes
    again = ("adapt", "-c", "part/config.yaml", "--resume_from", "part")
    before = (tmp_path / "part" / "config.yaml").read_bytes()
    killed = start(tmp_path, *again)
    wait_for(tmp_path / "part" / "predictions.csv", predicted + 25, killed)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL

    rest = start(tmp_path, *again)
    out, err = rest.communicate(timeout=200)
    assert rest.returncode == 0, err
    assert "accuracy" in out
    folders = [tmp_path / name for name in ("whole", "part")]
    first, second = ((folder / "predictions.csv").read_bytes() for folder in folders)
    assert first == second
    first, second = (without_seconds(read_json(folder / "metrics.json")) for folder in folders)
    assert first == second
    first, second = (read(stored(folder)[0])["adapter"] for folder in folders)
    assert are_equal(first, second)
    assert (tmp_path / "part" / "config.yaml").read_bytes() == before

    complete = start(tmp_path, *again)
    out, err = complete.communicate(timeout=200)
    assert (complete.returncode, out) == (2, "")
    assert err.endswith("Its results are in metrics.json.\n")


def test_a_second_process_cannot_take_over_a_run_that_lives(arguments, tmp_path):
    first = start(tmp_path, *arguments, "--trainer.run_dir=run")
    wait_for(tmp_path / "run" / "predictions.csv", 2, first)
    os.killpg(first.pid, signal.SIGSTOP)  # it lives, and will not end before the other has asked
    second = start(tmp_path, "adapt", "-c", "run/config.yaml", "--resume_from", "run")
    _, err = second.communicate(timeout=100)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    assert second.returncode == 2
    assert "error: The run folder run is in use: another process writes to it" in err
