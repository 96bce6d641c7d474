"""What tests of pre-training share: small modules, batches, and a training that is traced."""

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from tests.meta.ddp_worker import Trace
from tests.meta.running import quiet_trainer
from tests.networks import make_batches, make_network
from tests.streams import make_source
from tta_lightning.data import ShiftedImages
from tta_lightning.meta import MGGPretraining
from tta_lightning.methods import MGTTA, Tent
from tta_lightning.rules import MGG

INNER_LR, LR = 0.05, 0.01
UNLABELLED = torch.full((4,), -1)


class Batches(LightningDataModule):
    """Batches as they are given, in the same order every epoch."""

    def __init__(self, train, val):
        super().__init__()
        self.train, self.val = train, val

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=None)

    def val_dataloader(self):
        return DataLoader(self.val, batch_size=None)


def labelled(sizes, seed=1, dtype=torch.float64):
    """One segment for each entry of `sizes`, with so many batches of 4 images."""
    images = iter(make_batches(sum(sizes), size=4, seed=seed))
    generator = torch.Generator().manual_seed(seed)
    return [
        (next(images).to(dtype), torch.randint(10, (4,), generator=generator), segment)
        for segment, size in enumerate(sizes)
        for _ in range(size)
    ]


def make_module(norm="ln", rule=None, **options):
    """Tent in float64 with a random MGG that moves every coordinate."""
    torch.manual_seed(3)
    rule = MGG(lr=0.02, mask_zero_gradients=False) if rule is None else rule
    method = Tent(make_network(norm), rule).double()
    return MGGPretraining(method, **{"lr": LR, "inner_lr": INNER_LR, **options})


def make_trainer(*callbacks, epochs=1, **options):
    return quiet_trainer(*callbacks, max_epochs=epochs, **options)


class Gradients(Callback):
    """Keeps the gradient that the optimizer of the rule saw last, after every batch."""

    def __init__(self):
        self.batches = []

    def on_train_batch_end(self, trainer, module, *args):
        named = module.rule.memory.named_parameters()
        self.batches.append({n: None if p.grad is None else p.grad.clone() for n, p in named})


class AtTheEnd(Callback):
    """Keeps the network as the training leaves it."""

    def on_train_end(self, trainer, module):
        self.network = {n: p.detach().clone() for n, p in module.network.named_parameters()}


def fit(module, batches, *callbacks, val=None, **options):
    """Pre-train; return the trainer and what moved."""
    trace = Trace()
    limit = 0 if val is None else 1.0
    trainer = make_trainer(trace, *callbacks, limit_val_batches=limit, **options)
    trainer.fit(module, datamodule=Batches(batches, val))
    return trainer, trace


def shifted(**options):
    return ShiftedImages(
        make_source(24),
        **{
            "corruptions": ["contrast", "saturate"],
            "images": 20,
            "batch_size": 4,
            "order": "separate",
            "val_images": 8,
            "val_batch_size": 4,
            **options,
        },
    )


def stop_after(epochs, module, path=None, resume=None, data=None, trace=None):
    trainer = make_trainer(*([] if trace is None else [trace]), epochs=epochs)
    data = shifted() if data is None else data
    trainer.fit(module, datamodule=data, ckpt_path=resume)
    if path is not None:
        trainer.save_checkpoint(path)
    return trainer


def mgtta(form="published", norm="gn", method=MGTTA, **options):
    torch.manual_seed(3)
    rule = MGG(lr=0.02, form=form)
    return MGGPretraining(method(make_network(norm), rule), inner_lr=INNER_LR, **options)
