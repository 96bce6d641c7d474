"""One process of a pre-training in several: ``python ddp_worker.py FOLDER`` under torchrun."""

import sys
from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.nn.utils import parameters_to_vector

from tests.networks import make_network
from tests.streams import make_source
from tta_lightning.adapter import Adapter
from tta_lightning.data import ShiftedImages
from tta_lightning.functional import entropy
from tta_lightning.meta import MGGPretraining
from tta_lightning.methods import MGTTA
from tta_lightning.rules import MGG
from tta_lightning.trainer import Trainer

UNROLL = {"greedy": 1, "unrolled": 3, "mgtta": 1}  # by name of the run


class Spread(Adapter):
    """Entropy and the spread of the features, which is not the mean of that of half batches."""

    def loss(self, out, images):
        return entropy(out.logits).mean() + out.features.std(dim=0).mean()


class Trace(Callback):
    """Keeps the weights of the rule and those that it moves, after every batch."""

    def __init__(self):
        self.rule, self.network = [], []

    def on_train_batch_end(self, trainer, module, *args):
        moving = module.method.adapted_parameters.values()
        self.rule.append(parameters_to_vector(module.rule.parameters()).detach())
        self.network.append(parameters_to_vector(moving).detach())


def pretrain(name, batch_size, folder, **options):
    """Pre-train for two epochs of two segments and say what happened.

    The run "mgtta" has validation, a checkpoint and a run folder.
    """
    complete = name == "mgtta"
    torch.manual_seed(0)
    rule = MGG(lr=0.01)
    method = MGTTA(make_network("gn"), rule) if complete else Spread(make_network("gn"), rule)
    data = ShiftedImages(
        make_source(48),
        corruptions=["contrast", "saturate"],
        images=72,
        batch_size=batch_size,
        order="separate",
        val_images=8,
        val_batch_size=4,
    )
    trace = Trace()
    best = ModelCheckpoint(monitor="val/selection", filename="best")
    trainer = Trainer(
        run_dir=folder / name if complete else False,
        callbacks=[trace, best] if complete else [trace],
        precision="64-true",
        limit_val_batches=1.0 if complete else 0,
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=complete,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        **options,
    )
    module = MGGPretraining(method, inner_lr=0.01, unroll=UNROLL[name])
    trainer.fit(module, datamodule=data)
    return {
        "rank": trainer.global_rank,
        "rule": torch.stack(trace.rule),
        "network": torch.stack(trace.network),
        "selection": trainer.callback_metrics.get("val/selection"),
        "run_folder": str(trainer.run_folder),
    }


def main(folder):
    options = {"strategy": "ddp_find_unused_parameters_true", "devices": 2}
    runs = {name: pretrain(name, 4, folder, **options) for name in UNROLL}
    torch.save(runs, folder / f"rank{runs['greedy']['rank']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
