"""Labelled images in tasks: what a meta-training learns from."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler

from tta_lightning.data.datasets import ImageSource
from tta_lightning.data.geometry import ImageSize
from tta_lightning.data.labelled import LabelledDataset, LabelledImages
from tta_lightning.errors import InputError


class TaskBatch(NamedTuple):
    """The tasks of one meta-step, or the share of one process.

    Attributes:
        images: ``[M, K, 3, H, W]`` float32 in [0, 1].
        labels: ``[M, K]`` int64.
        keys: ``[M, 3]`` int64: seed, epoch and number of each task, which no other task has and
            which no number of processes changes. The random numbers of a task are drawn from them.
    """

    images: Tensor
    labels: Tensor
    keys: Tensor


class LabelledTasks(LabelledImages):
    """Training images in tasks of a few, in a new random order each epoch.

    The order is that of the seed and the epoch, whatever the number of processes and workers: each
    process takes its share of the tasks of every meta-step. A training that was interrupted in
    mid-epoch goes on with the task that would have come next. Images that fill no meta-step are
    left out of an epoch.

    Args:
        train: Images to train on.
        val: Images for validation; None splits ``val_fraction`` off the training images.
        test: Images for ``tta test``.
        val_fraction: Part of the training images that is held out when ``val`` is None.
        tasks: M, those of one meta-step, of all processes together.
        images_per_task: K, different images.
        limit: Use only this many training images, drawn with the seed; None for all.
        image_size: As in :class:`LabelledImages`.
        crop_pct: As in :class:`LabelledImages`.
        num_workers: Processes that load images.
        seed: Decides split, subset, order, and what is drawn for each task.

    Raises:
        InputError: An argument is not possible, or images lack labels.
    """

    def __init__(
        self,
        train: ImageSource,
        val: ImageSource | None = None,
        test: ImageSource | None = None,
        val_fraction: float = 0.1,
        tasks: int = 4,
        images_per_task: int = 8,
        limit: int | None = None,
        image_size: ImageSize = "model",
        crop_pct: float | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        for name, value in (("tasks", tasks), ("images_per_task", images_per_task)):
            if value < 1:
                raise InputError(f"{name} = {value}: expected 1 or more.")
        super().__init__(
            train,
            val=val,
            test=test,
            val_fraction=val_fraction,
            batch_size=tasks * images_per_task,
            limit=limit,
            image_size=image_size,
            crop_pct=crop_pct,
            num_workers=num_workers,
            seed=seed,
        )
        self.tasks, self.images_per_task, self.seed = tasks, images_per_task, seed
        self._resume = (0, 0)  # epoch, and how many of its meta-steps are done

    def train_dataloader(self) -> DataLoader[Any]:
        """Serve the tasks of this process.

        Raises:
            InputError: The tasks cannot be shared out evenly, or there are too few images.
        """
        trainer = self.trainer
        if getattr(trainer, "overfit_batches", 0):
            raise InputError(
                "LabelledTasks serves tasks in an order of its own, which overfit_batches would "
                "replace. Use limit_train_batches of the trainer."
            )
        rank, world = (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)
        if self.tasks % world:
            raise InputError(
                f"{self.tasks} tasks cannot be shared out evenly over {world} processes, and "
                "unequal shares would weigh some tasks more than others. Set `tasks` of "
                f"LabelledTasks to a multiple of {world}."
            )
        order = _Order(self._train_indices, self, rank, world)
        if len(order) == 0:
            raise InputError(
                f"{len(self._train_indices)} training images fill no meta-step of {self.tasks} "
                f"tasks with {self.images_per_task} images each. Give more images or lower either."
            )
        return self._tasks(self.train, order)

    def val_dataloader(self) -> DataLoader[Any]:
        """Serve tasks of the validation images, the same each time, all to every process.

        Raises:
            InputError: There are too few images.
        """
        source = self.train if self.val is None else self.val
        indices = self._val_indices if self.val is None else np.arange(len(source))
        fixed = np.random.default_rng(self.seed).permutation(indices)
        order = _Order(fixed, self, 0, 1, is_fixed=True)
        if len(order) == 0:
            raise InputError(
                f"{len(indices)} validation images fill no task of {self.images_per_task} images. "
                "Raise val_fraction or lower images_per_task."
            )
        return self._tasks(source, order)

    def setup(self, stage: str) -> None:
        """Forget where an earlier training stood; a checkpoint is read after this."""
        self._resume = (0, 0)

    def state_dict(self) -> dict[str, int]:
        """Say with which meta-step the training would go on, for its checkpoint."""
        trainer = self.trainer
        if trainer is None:
            return {}
        loop: Any = trainer.fit_loop
        epochs, batches = loop.epoch_progress.current, loop.epoch_loop.batch_progress
        epoch, done = epochs.started - 1, batches.current.processed
        if epochs.processed == epochs.started or batches.is_last_batch:
            epoch, done = epochs.started, 0  # what max_steps cut short is over too
        return {"epoch": epoch, "meta_steps": done, **self._order()}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on where :meth:`state_dict` was taken.

        Raises:
            InputError: The tasks would be others; names what differs.
        """
        if not state_dict:
            return
        ours = self._order()
        different = [key for key, value in ours.items() if state_dict[key] != value]
        if different:
            raise InputError(
                "This checkpoint cannot be resumed: of its tasks, "
                + ", ".join(f"{k} was {state_dict[k]}, not {ours[k]}" for k in different)
                + ". Resume with the data that it was written with."
            )
        self._resume = (state_dict["epoch"], state_dict["meta_steps"])

    def _order(self) -> dict[str, int]:
        """Return the numbers that decide which tasks there are."""
        return {
            "seed": self.seed,
            "tasks": self.tasks,
            "images_per_task": self.images_per_task,
            "images": len(self._train_indices),
        }

    def start(self, epoch: int) -> tuple[int, int]:
        """Say with which epoch and which of its meta-steps to begin when an epoch is asked for.

        A resumed training may ask before it knows what epoch it is in, or once more for the one
        that it has behind it.
        """
        return max((epoch, 0), self._resume)

    def _tasks(self, source: ImageSource, order: Sampler[_Request]) -> DataLoader[Any]:
        return _Loader(
            _Tasks(LabelledDataset(source, np.arange(len(source)), self.geometry)),
            batch_size=None,
            sampler=order,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )


class _Loader(DataLoader[Any]):
    """Tells Lightning that a training can go on in mid-epoch; the data module knows where."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing."""


class _Request(NamedTuple):
    indices: NDArray[np.int64]  # [M, K]
    keys: NDArray[np.int64]  # [M, 3]


class _Tasks(Dataset[TaskBatch]):
    """The indices of tasks to their images."""

    def __init__(self, images: LabelledDataset) -> None:
        self.images = images

    def __getitem__(self, request: _Request) -> TaskBatch:
        loaded = [self.images[int(index)] for index in request.indices.flat]
        shape = request.indices.shape
        images, labels = (
            torch.stack(parts).unflatten(0, shape) for parts in zip(*loaded, strict=True)
        )
        return TaskBatch(images, labels, torch.from_numpy(request.keys))


class _Order(DistributedSampler[_Request]):
    """The meta-steps of one process in the order of an epoch, which Lightning sets.

    Derives from torch's sampler so that Lightning leaves the sharding to it.
    """

    def __init__(
        self,
        indices: NDArray[np.int64],
        data: LabelledTasks,
        rank: int,
        world: int,
        is_fixed: bool = False,
    ) -> None:
        length: Any = range(len(indices))
        super().__init__(length, num_replicas=world, rank=rank, seed=data.seed)
        self.indices, self.data, self.is_fixed = indices, data, is_fixed

    def __iter__(self) -> Iterator[_Request]:
        data, order = self.data, self.indices
        epoch, done = (0, 0) if self.is_fixed else data.start(self.epoch)
        if not self.is_fixed:
            order = np.random.default_rng([data.seed, epoch]).permutation(order)
        share = data.tasks // self.num_replicas
        for step in range(done, len(self)):
            first = step * data.tasks + self.rank * share
            numbers = np.arange(first, min(first + share, self._count()))
            places = numbers[:, None] * data.images_per_task + np.arange(data.images_per_task)
            keys = [(data.seed, epoch, 2 * number + self.is_fixed) for number in numbers]
            yield _Request(order[places], np.array(keys, dtype=np.int64))

    def __len__(self) -> int:
        steps = self._count() / self.data.tasks
        return math.ceil(steps) if self.is_fixed else math.floor(steps)

    def _count(self) -> int:
        """Return the number of tasks; in validation the last meta-step may have fewer."""
        return len(self.indices) // self.data.images_per_task
