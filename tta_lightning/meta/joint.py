"""Joint training: the losses of MT3 without its inner loop, the network to compare it with."""

from __future__ import annotations

import copy
import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tta_lightning.errors import InputError
from tta_lightning.inner_loop import symmetric_loss
from tta_lightning.meta.source import SourceTraining, check_classes
from tta_lightning.models.byol import Embedder
from tta_lightning.views import (
    ViewOptions,
    generator,
    shift_together,
    ssl_views,
    supervised_views,
)


class JointTraining(SourceTraining):
    """Train a classifier with cross-entropy and the BYOL loss at once.

    The "JT (ours)" of the MT3 paper, https://arxiv.org/abs/2103.16201. The whole batch shares one
    shift ``A_task``, as the images of a task do in :class:`~tta_lightning.meta.MT3`::

        L(theta) = CE(theta; supervised views) + ssl_weight * L_ssl(theta; targets of xi)
        xi      <- tau * xi + (1 - tau) * theta,    tau = 1 - (1 - tau_base) (cos(pi t/T) + 1) / 2

    with L_ssl of :mod:`tta_lightning.inner_loop`, but its targets from xi, BYOL's slow average of
    theta, at step t of T. :class:`tta_lightning.methods.MT3` on such a checkpoint, at a learning
    rate of 0.01, is "TTT (ours)".

    Logs ``train/loss``, ``train/ssl``, and what :class:`SourceTraining` does. Validation and test
    are those of the network as it is.

    Args:
        network: A classifier with :class:`~tta_lightning.models.BYOLHeads`.
        lr: As in :class:`SourceTraining`.
        optimizer: As there; published is SGD without Nesterov's momentum.
        weight_decay: As there; published is 0: what is configured there is never applied.
        label_smoothing: As there.
        warmup: As there.
        schedule: As there.
        nesterov: As there.
        ssl_weight: Of the BYOL loss.
        tau_base: What xi keeps of itself in the first step, in [0, 1].
        crop: See :class:`~tta_lightning.views.ViewOptions`.
        flips: See :class:`~tta_lightning.views.ViewOptions`.
        seed: Of the views, together with the number of the batch.

    Raises:
        InputError: An argument is out of range, or the network has no BYOL heads.
    """

    def __init__(
        self,
        network: str | dict[str, Any] | nn.Module,
        lr: float = 0.1,
        optimizer: Literal["adamw", "sgd"] = "sgd",
        weight_decay: float = 0.0,
        label_smoothing: float = 0.0,
        warmup: float = 0.0,
        schedule: Literal["cosine", "constant"] = "constant",
        nesterov: bool = False,
        ssl_weight: float = 0.1,
        tau_base: float = 0.996,
        crop: tuple[int, int] | None = None,
        flips: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(
            network, lr, optimizer, weight_decay, label_smoothing, warmup, schedule, nesterov
        )
        if not 0 <= ssl_weight < float("inf"):
            raise InputError(f"ssl_weight = {ssl_weight} is out of range: expected 0 or more.")
        if not 0 <= tau_base <= 1:
            raise InputError(f"tau_base = {tau_base} is out of range: expected 0 <= tau_base <= 1.")
        if seed < 0:
            raise InputError(f"seed = {seed} is out of range: expected 0 or more.")
        self.ssl_weight, self.tau_base, self.seed = ssl_weight, tau_base, seed
        self.view_options = ViewOptions(crop, flips)
        self.target = copy.deepcopy(self.network).requires_grad_(False)
        self._embedders = [Embedder(self.network), Embedder(self.target)]  # parts of us already

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return cross-entropy plus weighted BYOL loss of a batch."""
        images, labels = batch
        views, classified = self._views(images)
        online, slow = self._embedders
        out = online(torch.cat([views, classified]))
        with torch.no_grad():
            targets = slow(views).projections
        logits = out.logits[len(views) :]
        check_classes(self, logits.shape[1], labels)
        ssl = symmetric_loss(out.predictions[: len(views)], targets)
        cross_entropy = self.training_loss(logits, labels)
        self.log("train/loss", cross_entropy, prog_bar=True)
        self.log("train/ssl", ssl, prog_bar=True)
        loss: Tensor = cross_entropy + self.ssl_weight * ssl
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Take a step, and move the slow average after it."""
        step, steps = self.global_step, self.trainer.estimated_stepping_batches
        super().optimizer_step(*args, **kwargs)
        tau = 1 - (1 - self.tau_base) * (math.cos(math.pi * step / steps) + 1) / 2
        with torch.no_grad():
            pairs = zip(self.target.parameters(), self.network.parameters(), strict=True)
            for slow, online in pairs:
                slow.lerp_(online, 1 - tau)

    def _views(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Draw two views ``[2B, 3, H, W]`` of a batch, and one ``[B, ...]`` to classify."""
        options = self.view_options
        number = self.trainer.fit_loop.total_batch_idx  # not the step: it may take several batches
        draws = generator(self.seed, number, self.trainer.global_rank)
        views = ssl_views(images.repeat(2, 1, 1, 1), draws, options)
        shifted = shift_together(
            torch.cat([views, supervised_views(images, draws)]), draws, options
        )
        return shifted[: len(views)], shifted[len(views) :]
