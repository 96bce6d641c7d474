"""Meta-training of a network that one self-supervised step improves."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LRScheduler

from tta_lightning.errors import InputError, unknown_name
from tta_lightning.functional import all_finite
from tta_lightning.inner_loop import (
    InnerLoop,
    Target,
    Task,
    TaskLosses,
    average,
    clip_by_norm,
    inner_adapt,
    losses_at,
    meta_gradients,
    task_loss,
    unstack,
)
from tta_lightning.meta.source import check_classes, known_length, with_schedule
from tta_lightning.models.attention import PlainAttention
from tta_lightning.models.byol import Embedder
from tta_lightning.models.loading import checkpoint_record, load_model
from tta_lightning.views import (
    ViewOptions,
    generator,
    shift_together,
    ssl_views,
    supervised_views,
)

PRECISIONS = ("32-true", "64-true", "bf16-mixed")
PATIENCE = 20  # meta-steps in a row without a gradient, after which a training gives up


class MT3(LightningModule):
    """Meta-train a network such that a self-supervised step makes it a better classifier.

    Bartler, Bühler, Wiewel, Döbler, Yang, "MT3: Meta Test-Time Training for Self-Supervised
    Test-Time Adaption", AISTATS 2022, https://arxiv.org/abs/2103.16201. A task is K labelled images
    under one small shift. From theta it takes ``steps`` of SGD on the BYOL loss of two views of
    each image; theta then goes down the gradient, averaged over tasks, of what the moved parameters
    are worth, cross-entropy on a further view of the same images and ``ssl_weight`` times the BYOL
    loss: through the steps, to second order. The equations stand in
    :mod:`tta_lightning.inner_loop`, the augmentations in :mod:`tta_lightning.views`.

    At test time :class:`tta_lightning.methods.MT3` takes the step on views of one single image;
    ``Source`` on the same checkpoint is the paper's "MT", the network without the step. Compare
    with :class:`~tta_lightning.meta.JointTraining`, the same losses without the inner loop.

    Logs under ``train/`` (of the last step) and ``val/``: cross-entropy ``loss``, ``ssl`` and
    ``accuracy``, each ``_before`` and ``_after`` the steps on the views of a task. The gap is the
    sign that it works. Batches are :class:`~tta_lightning.data.TaskBatch`, as
    :class:`~tta_lightning.data.LabelledTasks` gives them; what is drawn for a task depends on its
    key alone. Tasks are shared out over the processes, and gradients averaged once a meta-step: two
    processes with two tasks each take the step of one with four. Checkpoints, from the middle of an
    epoch too, resume exactly.

    Departs from the published code in:

    * Dropout and stochastic depth are off, so that the passes of a task see one function. The
      published network has neither.
    * A meta-step whose loss or gradient is not finite is left out, with a warning.
    * The classifier's head, whose gradient is zero, takes no part in the steps.
    * Weight decay is not offered: the published 1.5e-6 is configured there and never applied.

    Args:
        network: A classifier with :class:`~tta_lightning.models.BYOLHeads`.
        lr: Of the outer optimizer.
        optimizer: ``sgd``, as published, or ``adam``, which learns sooner on short schedules.
        momentum: Of SGD.
        clip: Largest L2 norm of the averaged gradient of each tensor; None for no limit.
        schedule: ``constant``, as published, or ``cosine`` to zero over all meta-steps.
        warmup: Part of all meta-steps over which the learning rate rises before, in ``[0, 1)``.
        ssl_weight: gamma.
        steps: N, steps of a task.
        inner_lr: alpha.
        inner_clip: Largest L2 norm of the gradient of each tensor in a step; None for no limit.
        inner_warmup: Part of all meta-steps over which alpha rises from 0, in ``[0, 1)``: for a
            network that is trained already, which the full step would throw far off at first.
        first_order: Take the gradients of the steps for constants.
        target: Whose projections the predictions of later steps aim at: ``self`` or ``meta``.
        task_mode: ``shared_shift``: a task is K different images, all of them classified.
            ``repeat``: it is ``copies`` views of each kind of one image, which is classified once;
            set ``images_per_task`` of the data to 1.
        copies: K of ``repeat``.
        backend: ``loop`` over tasks, whose graphs are held one at a time, or ``vmap``, all at once.
        crop: See :class:`~tta_lightning.views.ViewOptions`.
        flips: See :class:`~tta_lightning.views.ViewOptions`.

    Raises:
        InputError: An argument is out of range, or the network has no BYOL heads.
    """

    chooses_modes = True  # the network stays in evaluation mode

    def __init__(
        self,
        network: str | dict[str, Any] | nn.Module,
        lr: float = 0.01,
        optimizer: Literal["sgd", "adam"] = "sgd",
        momentum: float = 0.9,
        clip: float | None = 10.0,
        schedule: Literal["constant", "cosine"] = "constant",
        warmup: float = 0.0,
        ssl_weight: float = 0.1,
        steps: int = 1,
        inner_lr: float = 0.1,
        inner_clip: float | None = 10.0,
        inner_warmup: float = 0.0,
        first_order: bool = False,
        target: Target = "self",
        task_mode: Literal["shared_shift", "repeat"] = "shared_shift",
        copies: int = 8,
        backend: Literal["loop", "vmap"] = "loop",
        crop: tuple[int, int] | None = None,
        flips: bool = True,
    ) -> None:
        super().__init__()
        positive = {"lr": lr, "clip": clip, "inner_clip": inner_clip, "copies": copies}
        for name, value in positive.items():
            if value is not None and not 0 < value < float("inf"):
                raise InputError(f"{name} = {value} is out of range: expected a number above 0.")
        for name, count in {"steps": steps, "copies": copies}.items():
            if not isinstance(count, int):
                raise InputError(f"{name} = {count} is out of range: expected a whole number.")
        for name, value in {"ssl_weight": ssl_weight, "steps": steps, "inner_lr": inner_lr}.items():
            if not 0 <= value < float("inf"):
                raise InputError(f"{name} = {value} is out of range: expected 0 or more.")
        fractions = {"momentum": momentum, "warmup": warmup, "inner_warmup": inner_warmup}
        for name, value in fractions.items():
            if not 0 <= value < 1:
                raise InputError(f"{name} = {value} is out of range: expected 0 <= {name} < 1.")
        for name, choice, choices in (
            ("optimizer", optimizer, ("sgd", "adam")),
            ("schedule", schedule, ("constant", "cosine")),
            ("target", target, ("self", "meta")),
            ("task_mode", task_mode, ("shared_shift", "repeat")),
            ("backend", backend, ("loop", "vmap")),
        ):
            if choice not in choices:
                raise unknown_name(name, choice, choices)
        self.automatic_optimization = False
        self.network = load_model(network).eval()
        self._embedder = [Embedder(self.network)]  # a list: the network is part of us already
        self.lr, self.optimizer, self.momentum = lr, optimizer, momentum
        self.clip, self.schedule, self.warmup = clip, schedule, warmup
        self.ssl_weight = ssl_weight
        engine: Literal["func", "autograd"] = "func" if backend == "vmap" else "autograd"
        self.inner_loop = InnerLoop(steps, inner_lr, inner_clip, first_order, target, engine)
        self.inner_warmup = inner_warmup
        self.task_mode, self.copies, self.backend = task_mode, copies, backend
        self.view_options = ViewOptions(crop, flips)
        self._attention = PlainAttention()
        self._skipped = 0  # meta-steps in a row

    @property
    def embedder(self) -> Embedder:
        """The network as the functional core runs it."""
        return self._embedder[0]

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``[B, 3, H, W]`` in [0, 1] to logits ``[B, C]``, without a step."""
        logits: Tensor = self.network(images)
        return logits

    # Training ------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Refuse what this training cannot do."""
        if self.trainer.precision not in PRECISIONS:
            raise InputError(
                f"MT3 does not support precision {self.trainer.precision!r}: its steps are too "
                f"small for parameters in half precision. Use one of {', '.join(PRECISIONS)}."
            )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the outer optimizer for the parameters of the network."""
        parameters = [p for p in self.network.parameters() if p.requires_grad]
        if not parameters:
            raise InputError("Every parameter of the network is frozen: there is nothing to train.")
        optimizer: torch.optim.Optimizer = torch.optim.Adam(parameters, self.lr)
        if self.optimizer == "sgd":
            optimizer = torch.optim.SGD(parameters, self.lr, self.momentum)
        return with_schedule(optimizer, self.trainer, self.schedule, self.warmup)

    def on_train_start(self) -> None:
        """Keep dropout off."""
        self.network.eval()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Take one meta-step on the tasks of this process."""
        tasks = self.draw(batch)
        self._check_classes(tasks)
        trainer: Any = self.trainer  # no checker sees its attributes
        every, number = trainer.log_every_n_steps, trainer.fit_loop.epoch_loop.total_batch_idx + 1
        is_logged = every > 0 and number % every == 0
        with nullcontext() if self.inner_loop.first_order else self._attention.used():
            gradients, after = self.meta_gradients(tasks)
        gradients = self._averaged(gradients)
        if is_logged:  # not earlier: autocast remembers what it casts without a graph
            self._log("train", self._before(tasks), after, len(tasks.labels))
        if all_finite(*gradients.values()):
            self._descend(gradients)
            self._skipped = 0
        else:
            self._skip()

    def _skip(self) -> None:
        """Leave a meta-step out; give up when nothing else happens.

        Raises:
            InputError: Many in a row gave no gradient.
        """
        self._skipped += 1
        if self._skipped == PATIENCE:
            loop = self.inner_loop
            raise InputError(
                f"{PATIENCE} meta-steps in a row gave a loss or a gradient that is not finite, so "
                f"nothing is learnt any more. Lower inner_lr (it is {loop.lr}), inner_clip "
                f"({loop.clip}), lr ({self.lr}) or clip ({self.clip})."
            )
        warnings.warn(
            "A meta-step gave a loss or a gradient that is not finite; nothing was learnt.",
            stacklevel=3,
        )

    def meta_gradients(self, tasks: Task) -> tuple[dict[str, Tensor], TaskLosses]:
        """Differentiate the mean loss of tasks by theta.

        Args:
            tasks: M tasks.

        Returns:
            Gradients by name in the embedder, those of parameters without influence zero or left
            out; and means of the losses over the tasks, detached.
        """
        fixed = self._detached()  # what is frozen moves in the steps alone
        trained = {n: p for n, p in self.embedder.named_parameters() if p.requires_grad}
        if self.backend == "vmap":
            loop, weight = self._rising(), self.ssl_weight
            return meta_gradients(self.embedder, trained, fixed, tasks, loop, weight)
        sums: dict[str, Tensor] = {}
        known = []
        for task in unstack(tasks):  # the graph of a task is gone before the next one is built
            loss = task_loss(
                self.embedder, {**fixed, **trained}, task, self._rising(), self.ssl_weight
            )
            found = torch.autograd.grad(loss.total, list(trained.values()), allow_unused=True)
            for name, grad in zip(trained, found, strict=True):
                if grad is not None:
                    sums[name] = sums[name] + grad if name in sums else grad
            known.append(TaskLosses(*(part.detach() for part in loss)))
            del loss
        return {name: grad / len(known) for name, grad in sums.items()}, average(known)

    def _detached(self) -> dict[str, Tensor]:
        """Return theta without its graph, ready to be differentiated anew."""
        return {n: p.detach().requires_grad_() for n, p in self.embedder.named_parameters()}

    def _rising(self) -> InnerLoop:
        """Return the inner loop with the alpha of this meta-step."""
        if not self.inner_warmup:
            return self.inner_loop
        rising = self.inner_warmup * known_length(self.trainer)
        factor = min(1.0, (self.global_step + 1) / (rising + 1))
        return replace(self.inner_loop, lr=factor * self.inner_loop.lr)

    def draw(self, batch: Any) -> Task:
        """Draw the views of tasks.

        Args:
            batch: A :class:`~tta_lightning.data.TaskBatch`.

        Returns:
            M tasks; the random numbers of each are those of its key.

        Raises:
            InputError: The batch is something else, or does not suit ``task_mode``.
        """
        drawn = [self._task(*each) for each in zip(*self._parts(batch), strict=True)]
        return Task(*(torch.stack(parts) for parts in zip(*drawn, strict=True)))

    def _parts(self, batch: Any) -> tuple[Tensor, Tensor, list[list[int]]]:
        if not isinstance(batch, list | tuple) or len(batch) != 3 or batch[0].dim() != 5:
            raise InputError(
                "MT3 needs batches of tasks (images [M, K, 3, H, W], labels [M, K], keys [M, 3]), "
                "as LabelledTasks gives them; this dataloader gives something else."
            )
        images, labels, keys = batch
        if self.task_mode == "repeat" and images.shape[1] != 1:
            raise InputError(
                f"task_mode = repeat takes one image a task, and these have {images.shape[1]}. Set "
                "images_per_task of LabelledTasks to 1; `copies` of MT3 says how often it is "
                "repeated."
            )
        return images, labels, keys.tolist()

    def _check_classes(self, tasks: Task) -> None:
        check_classes(self, len(self.embedder.head.weight), tasks.labels)

    def _task(self, images: Tensor, labels: Tensor, key: list[int]) -> Task:
        """Draw the views of a task of images ``[K, 3, H, W]``."""
        draws, options = generator(*key), self.view_options
        copies = self.copies if self.task_mode == "repeat" else 1
        count = copies * len(images)
        views = ssl_views(images.repeat(2 * copies, 1, 1, 1), draws, options)
        classified = supervised_views(images, draws)
        shifted = shift_together(torch.cat([views, classified]), draws, options)
        return Task(shifted[: 2 * count].unflatten(0, (2, count)), shifted[2 * count :], labels)

    def _before(self, tasks: Task) -> TaskLosses:
        """Return the mean losses of tasks at theta."""
        with torch.no_grad():
            return average(
                losses_at(self.embedder, {}, task, self.ssl_weight) for task in unstack(tasks)
            )

    def _averaged(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """Average gradients over the processes, in one message."""
        if self.trainer.world_size == 1:
            return gradients
        flat = torch.cat([gradient.flatten() for gradient in gradients.values()])
        flat = self.trainer.strategy.reduce(flat, reduce_op="mean")
        sizes = [gradient.numel() for gradient in gradients.values()]
        parts = zip(gradients.items(), flat.split(sizes), strict=True)
        return {name: part.view_as(gradient) for (name, gradient), part in parts}

    def _descend(self, gradients: dict[str, Tensor]) -> None:
        """Clip the averaged gradients, tensor by tensor, and take a step."""
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        optimizer.zero_grad()
        for name, parameter in self.embedder.named_parameters():
            if name in gradients:
                parameter.grad = clip_by_norm(gradients[name], self.clip)
        optimizer.step()
        schedule = self.lr_schedulers()
        if isinstance(schedule, LRScheduler):
            schedule.step()

    # Validation ----------------------------------------------------------------------------------

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log losses and accuracy on held-out tasks, before and after their steps."""
        with torch.inference_mode(False), torch.enable_grad():
            tasks = Task(*(part.clone() for part in self.draw(batch)))
            self._check_classes(tasks)
            theta = self._detached()
            loop = replace(self.inner_loop, first_order=True, engine="autograd")
            moved = [inner_adapt(self.embedder, theta, views, loop) for views in tasks.views]
        with torch.no_grad():
            after = average(
                losses_at(self.embedder, phi.parameters, task, self.ssl_weight)
                for phi, task in zip(moved, unstack(tasks), strict=True)
            )
        self._log("val", self._before(tasks), after, len(tasks.labels))

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log loss and accuracy of the network without a step on test images."""
        images, labels = batch
        logits = self(images)
        check_classes(self, logits.shape[1], labels)
        figures = {
            "test/loss": F.cross_entropy(logits, labels),
            "test/accuracy": (logits.argmax(dim=1) == labels).float().mean(),
        }
        self.log_dict(figures, prog_bar=True, batch_size=len(labels), sync_dist=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what :func:`~tta_lightning.models.load_model` needs to build the network again."""
        classes = getattr(getattr(self.trainer, "datamodule", None), "classes", None)
        checkpoint["tta_lightning"] = checkpoint_record(self.network, classes, kind="mt3")

    def _log(self, stage: str, before: TaskLosses, after: TaskLosses, tasks: int) -> None:
        figures = {
            f"{stage}/{name}_{when}": value
            for when, losses in (("before", before), ("after", after))
            for name, value in (
                ("loss", losses.cross_entropy),
                ("ssl", losses.ssl),
                ("accuracy", losses.correct),
            )
        }
        for name, value in figures.items():
            self.log(name, value, prog_bar="acc" in name, batch_size=tasks, sync_dist=True)
