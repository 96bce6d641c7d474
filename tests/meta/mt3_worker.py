"""One process of a meta-training in several: ``python mt3_worker.py FOLDER`` under torchrun.

And what the tests of MT3's life share: a tiny network, tasks, and a training that is traced.
"""

import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.nn.utils import parameters_to_vector

from tests.meta.running import quiet_trainer
from tta_lightning.data import ArraySource, LabelledTasks
from tta_lightning.errors import InputError
from tta_lightning.meta import MT3

NETWORK = {
    "spec": "tta_lightning.models.BYOLHeads",
    "backbone": {"spec": "tests.meta.mt3_worker.TinyGN"},
    "hidden": 8,
    "projection": 4,
}
CLIP = 0.05  # smaller than the gradient of most tensors, so that it acts
RUNS = {  # strategy and options of the module by name of the run
    "loop": ("ddp", {"backend": "loop"}),
    "vmap": ("ddp", {"backend": "vmap"}),
    "shipped": ("ddp_find_unused_parameters_true", {"backend": "loop", "clip": CLIP}),
}


class TinyGN(nn.Sequential):
    """Two convolutions with group normalisation and a linear head of three classes."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 4, 3, padding=1),
            nn.GroupNorm(2, 4),
            nn.Softplus(),
            nn.Conv2d(4, 8, 3, stride=2),
            nn.GroupNorm(2, 8),
            nn.Softplus(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 3),
        )


class Trace(Callback):
    """Keeps the keys of the tasks and the weights after every batch."""

    def __init__(self):
        self.keys, self.weights = [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.keys.append(batch[2].clone())
        self.weights.append(parameters_to_vector(module.network.parameters()).detach())


class Killed(Callback):
    """Ends the process at a step as a power cut does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def source(images=50, classes=3, seed=0):
    """Images of 8 px in random colours; the labels say which channel is brighter."""
    rng = np.random.default_rng(seed)
    labels = np.arange(images) % classes
    pixels = rng.integers(0, 200, (images, 8, 8, 3))
    pixels[np.arange(images), :, :, labels] += 55
    return ArraySource(pixels.astype(np.uint8), labels, tuple("abcdef"[:classes]))


def tasks(**options):
    """Forty training images: five meta-steps of four tasks with two images each."""
    given = {"val_fraction": 0.2, "tasks": 4, "images_per_task": 2, "seed": 3}
    return LabelledTasks(source(), **{**given, **options})


def make_module(**options):
    torch.manual_seed(0)
    return MT3(NETWORK, **{"lr": 0.1, **options})


def make_trainer(*callbacks, **options):
    return quiet_trainer(*callbacks, **{"max_epochs": 2, **options})


def train(name, **options):
    """Meta-train in float64 for two epochs and say what happened."""
    trace = Trace()
    trainer = make_trainer(trace, precision="64-true", **options)
    trainer.fit(make_module(**RUNS[name][1]), datamodule=tasks())
    return {
        "rank": trainer.global_rank,
        "keys": torch.stack(trace.keys),
        "weights": torch.stack(trace.weights),
        "figures": {name: value.item() for name, value in trainer.callback_metrics.items()},
    }


def refusal(**options):
    """Return what is said where tasks cannot be shared out evenly."""
    try:
        make_trainer(**options).fit(make_module(), datamodule=tasks(tasks=5))
    except InputError as error:
        return str(error)
    return ""


def main(folder):
    runs = {name: train(name, strategy=strategy, devices=2) for name, (strategy, _) in RUNS.items()}
    runs["refusal"] = refusal(strategy="ddp", devices=2)
    torch.save(runs, folder / f"rank{runs['loop']['rank']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
