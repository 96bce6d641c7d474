"""Supervised training of a source model."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from tta_lightning.errors import InputError, unknown_name
from tta_lightning.models.classifier import describe
from tta_lightning.models.loading import checkpoint_record, load_model


class SourceTraining(LightningModule):
    """Train any classifier on labelled images with cross-entropy.

    The learning rate rises linearly over ``warmup`` and falls along a cosine to zero, stepwise,
    or stays.
    Weights of one dimension (biases, affine normalisation parameters) get no weight decay. The
    checkpoint holds what is needed to build the network again, so ``adapt`` takes its path as the
    network.

    Logs ``train/loss`` (label-smoothed), ``val/loss`` and ``val/accuracy``, and under ``test``
    ``test/loss`` and ``test/accuracy``.

    Args:
        network: What :func:`~tta_lightning.models.load_model` accepts.
        lr: Highest learning rate.
        optimizer: ``adamw``, or ``sgd`` with momentum 0.9.
        weight_decay: For weights of two or more dimensions.
        label_smoothing: Part of the target spread over all classes, in ``[0, 1)``.
        warmup: Part of all steps over which the learning rate rises, in ``[0, 1)``.
        schedule: ``cosine``, or ``constant`` after the warm-up.
        nesterov: Whether the momentum of ``sgd`` is Nesterov's.

    Raises:
        InputError: An argument is out of range.
    """

    def __init__(
        self,
        network: str | dict[str, Any] | nn.Module,
        lr: float = 1e-3,
        optimizer: Literal["adamw", "sgd"] = "adamw",
        weight_decay: float = 0.05,
        label_smoothing: float = 0.0,
        warmup: float = 0.1,
        schedule: Literal["cosine", "constant"] = "cosine",
        nesterov: bool = True,
    ) -> None:
        super().__init__()
        for name, value in (("label_smoothing", label_smoothing), ("warmup", warmup)):
            if not 0 <= value < 1:
                raise InputError(f"{name} = {value} is out of range: expected 0 <= {name} < 1.")
        if not 0 < lr < math.inf:
            raise InputError(f"lr = {lr} is out of range: expected a number above 0.")
        if not 0 <= weight_decay < math.inf:
            raise InputError(f"weight_decay = {weight_decay} is out of range: expected 0 or more.")
        if optimizer not in ("adamw", "sgd"):
            raise unknown_name("optimizer", optimizer, ("adamw", "sgd"))
        if schedule not in ("cosine", "constant"):
            raise unknown_name("schedule", schedule, ("cosine", "constant"))
        self.network = load_model(network).train()  # it comes in evaluation mode
        self.lr = lr
        self.optimizer = optimizer
        self.weight_decay = weight_decay
        self.warmup = warmup
        self.schedule = schedule
        self.nesterov = nesterov
        self.training_loss = nn.CrossEntropyLoss(label_smoothing=label_smoothing)

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``[B, 3, H, W]`` in [0, 1] to logits ``[B, C]``."""
        logits: Tensor = self.network(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the label-smoothed cross-entropy of a batch."""
        images, labels = batch
        logits = self(images)
        check_classes(self, logits.shape[1], labels)
        loss: Tensor = self.training_loss(logits, labels)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log loss and accuracy of a validation batch."""
        self._evaluate(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log loss and accuracy of a test batch."""
        self._evaluate(batch, "test")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimizer and the cosine schedule with warm-up."""
        decayed = [p for p in self.parameters() if p.requires_grad and p.dim() > 1]
        others = [p for p in self.parameters() if p.requires_grad and p.dim() <= 1]
        groups = [
            {"params": decayed, "weight_decay": self.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        optimizer: torch.optim.Optimizer
        if self.optimizer == "adamw":
            optimizer = torch.optim.AdamW(groups, lr=self.lr)
        else:
            optimizer = torch.optim.SGD(groups, lr=self.lr, momentum=0.9, nesterov=self.nesterov)
        return with_schedule(optimizer, self.trainer, self.schedule, self.warmup)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what :func:`~tta_lightning.models.load_model` needs to build the network again."""
        classes = getattr(getattr(self.trainer, "datamodule", None), "classes", None)
        checkpoint["tta_lightning"] = checkpoint_record(self.network, class_names=classes)

    def _evaluate(self, batch: tuple[Tensor, Tensor], stage: str) -> None:
        images, labels = batch
        logits = self(images)
        check_classes(self, logits.shape[1], labels)
        accuracy = (logits.argmax(dim=1) == labels).float().mean()
        loss = nn.functional.cross_entropy(logits, labels)
        self.log_dict(
            {f"{stage}/loss": loss, f"{stage}/accuracy": accuracy},
            prog_bar=True,
            batch_size=len(labels),
            sync_dist=True,
        )


def check_classes(module: Any, width: int, labels: Tensor) -> None:
    """Refuse a network that has not one logit for each class of the images.

    Args:
        module: A LightningModule that has the network as ``network``.
        width: C, the number of logits.
        labels: ``[...]`` int64.

    Raises:
        InputError: Names both numbers.
    """
    classes = getattr(getattr(module.trainer, "datamodule", None), "classes", None)
    needed = int(labels.max()) + 1 if classes is None else len(classes)
    if width < needed or (classes is not None and width != needed):
        raise InputError(
            f"The model {describe(module.network).name} gives {width} logits, but the images "
            f"have {needed} classes. Set num_classes of the network to {needed}."
        )


def with_schedule(
    optimizer: torch.optim.Optimizer, trainer: Any, schedule: str, warmup: float
) -> OptimizerLRScheduler:
    """Give an optimizer a learning rate that changes with every step.

    Args:
        optimizer: With the highest learning rate.
        trainer: Knows how many steps there will be.
        schedule: ``cosine``, to zero; or ``constant``.
        warmup: Part of all steps over which the learning rate rises before.

    Returns:
        What ``configure_optimizers`` may return.

    Raises:
        InputError: Nobody knows how many steps there will be.
    """
    if schedule == "constant" and not warmup:
        return optimizer
    steps = known_length(trainer)

    def factor(step: int) -> float:
        if schedule == "constant":
            return float(min(1.0, (step + 1) / (warmup * steps + 1)))
        return cosine_with_warmup(step, steps, warmup)

    changing = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": changing, "interval": "step"}}


def known_length(trainer: Any) -> int:
    """Return how many steps a training takes.

    Raises:
        InputError: Nobody knows.
    """
    steps = trainer.estimated_stepping_batches
    if not math.isfinite(steps):
        raise InputError(
            "The learning rate depends on when the training ends: set max_epochs or max_steps of "
            "the trainer."
        )
    return int(steps)


def cosine_with_warmup(step: int, steps: int, warmup: float) -> float:
    """Return the factor of the learning rate at a step.

    Args:
        step: Counted from 0.
        steps: Number of all steps.
        warmup: Part of them over which the factor rises linearly to 1.

    Returns:
        A factor in [0, 1]; 0 at ``steps``.
    """
    rising = warmup * steps
    if step < rising:
        return (step + 1) / (rising + 1)
    progress = (step - rising) / max(1.0, steps - rising)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
