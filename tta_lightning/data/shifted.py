"""Unlabelled images under training corruptions: what a learned rule is pre-trained on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler

from tta_lightning.data import corruptions as corruption_module
from tta_lightning.data.batches import PlanDataset, Sample, collate
from tta_lightning.data.datasets import ImageSource
from tta_lightning.data.geometry import ImageSize, geometry
from tta_lightning.data.plan import Domain, Plan, concatenate
from tta_lightning.data.stream import check_severity, clean_batches, corruption_domains
from tta_lightning.errors import InputError, unknown_name


class ShiftedBatch(NamedTuple):
    """One batch of a training stream.

    Attributes:
        images: ``[B, 3, H, W]`` float32 in [0, 1].
        labels: ``[B]`` int64, -1 where unknown; for metrics alone.
        segment: Number of the stretch of the stream that the batch belongs to, within its epoch.
    """

    images: Tensor
    labels: Tensor
    segment: int


class ShiftedImages(LightningDataModule):
    """Images under training corruptions, to learn a rule from before any deployment.

    Training and held-out images are different ones. With several processes each gets its share of
    every batch, ``batch_size`` images. Nothing but ``val/accuracy`` looks at labels.

    Args:
        source: Clean images.
        corruptions: As in :class:`~tta_lightning.data.Stream`; none that you report results on.
        severity: 1 to 5.
        images: How many corrupted images to train on: pairs of an image and a corruption, drawn
            with the seed. The paper's number is 128.
        batch_size: Images a batch in each process, the paper's number is 2. What is left at the end
            of a segment and fills no batch is left out.
        order: ``mixed`` shuffles all corruptions into one stream an epoch, as the paper does;
            ``separate`` makes one segment a corruption, as streams after deployment often are.
        val_images: How many corrupted images to validate on, the same number for each corruption
            and at least one.
        val_batch_size: Images a batch of the validation streams.
        table: Severity table: ``imagenet`` or ``cifar``.
        image_size: As in :class:`~tta_lightning.data.Stream`.
        crop_pct: As in :class:`~tta_lightning.data.Stream`.
        keep_in_memory: Corrupt every image once (once in each worker); else in every epoch anew,
            with the same result.
        num_workers: Processes that load and corrupt.
        clean: Images for the statistics of clean features; None for all of ``source``.
        seed: Decides the subsets, every epoch's order, and the noise of the corruptions.

    Raises:
        InputError: An argument is not possible, or the source holds too few images.
    """

    def __init__(
        self,
        source: ImageSource,
        corruptions: str | list[str] = "extra",
        severity: int = 5,
        images: int = 128,
        batch_size: int = 2,
        order: Literal["mixed", "separate"] = "mixed",
        val_images: int = 512,
        val_batch_size: int = 64,
        table: Literal["imagenet", "cifar"] = "imagenet",
        image_size: ImageSize = "model",
        crop_pct: float | None = None,
        keep_in_memory: bool = True,
        num_workers: int = 0,
        clean: ImageSource | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        sizes = {"images": images, "batch_size": batch_size}
        sizes |= {"val_images": val_images, "val_batch_size": val_batch_size}
        for name, value in sizes.items():
            if value < 2:
                raise InputError(f"{name} = {value}: expected 2 or more.")
        if order not in ("mixed", "separate"):
            raise unknown_name("order", order, ("mixed", "separate"))
        check_severity(severity)
        if source.domains is not None:
            raise InputError(
                "ShiftedImages corrupts clean images itself, but this source holds corrupted ones. "
                "Give a source of clean images, such as an ImageFolder."
            )
        self.source, self.clean = source, source if clean is None else clean
        self.images, self.batch_size, self.order = images, batch_size, order
        self.val_images, self.val_batch_size = val_images, val_batch_size
        self.table, self.seed, self.num_workers = table, seed, num_workers
        self.keep_in_memory = keep_in_memory
        self.image_size, self.crop_pct = image_size, crop_pct
        self.geometry = geometry(image_size, crop_pct, None, 1.0, "bilinear")
        domains = corruption_domains(corruptions, severity)
        for domain in domains:
            corruption_module.check(domain.corruption, domain.severity, table)
        self.train_plan, self.val_plan = self._draw(domains)

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the classes in the order of the labels; None when unknown."""
        return self.source.classes

    def suit(self, input_size: int | None, crop_pct: float, interpolation: str) -> None:
        """Take over what the model was made for; see :meth:`Stream.suit`."""
        self.geometry = geometry(
            self.image_size, self.crop_pct, input_size, crop_pct, interpolation
        )

    def train_dataloader(self) -> DataLoader[ShiftedBatch]:
        """Serve the training images in a new order each epoch."""
        trainer = self.trainer
        if getattr(trainer, "overfit_batches", 0):
            raise InputError(
                "ShiftedImages serves batches in an order of its own, which overfit_batches would "
                "replace. Use limit_train_batches of the trainer."
            )
        rank, world = (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)
        batches = _EpochBatches(
            self.train_plan, self.batch_size, self.seed, self.order == "mixed", rank, world
        )
        if len(batches) == 0:
            raise InputError(
                f"{self.images} training images fill no batch of {self.batch_size} in each of "
                f"{world} process(es) and each segment. Use more images or a smaller batch_size."
            )
        return self._loader(self.train_plan, batches)

    def val_dataloader(self) -> DataLoader[ShiftedBatch]:
        """Serve the held-out images, one segment a corruption; every process gets all of them."""
        return self._loader(self.val_plan, _InOrder(self.val_plan, self.val_batch_size))

    def clean_batches(self) -> Iterator[Tensor]:
        """Yield the clean images in batches ``[B, 3, H, W]``."""
        return clean_batches(self.clean, self.geometry, self.val_batch_size)

    def _draw(self, domains: list[Domain]) -> tuple[Plan, Plan]:
        """Draw pairs of image and corruption for training, and other images for validation."""
        rng = np.random.default_rng(self.seed)
        order = rng.permutation(len(self.source))
        held_out = max(1, self.val_images // len(domains))
        pairs = max(0, len(order) - held_out) * len(domains)
        if pairs < self.images:
            raise InputError(
                f"The source holds {len(order)} images: {held_out} are held out for validation, "
                f"which leaves {pairs} pairs of an image and a corruption, but images = "
                f"{self.images}. Lower images or val_images, or give more images."
            )
        chosen = np.sort(rng.choice(pairs, self.images, replace=False))
        train = [
            order[held_out:][chosen[chosen % len(domains) == d] // len(domains)]
            for d in range(len(domains))
        ]
        return (
            concatenate("training", train, domains, reset=True),
            concatenate("validation", [order[:held_out]] * len(domains), domains, reset=True),
        )

    def _loader(self, plan: Plan, batches: Sampler[_Request]) -> DataLoader[ShiftedBatch]:
        return DataLoader(
            _Batches(
                PlanDataset(self.source, plan, self.geometry, self.table, self.seed),
                self.keep_in_memory,
            ),
            batch_size=None,
            sampler=batches,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )


class _Request(NamedTuple):
    segment: int
    positions: list[int]


class _Batches(Dataset[ShiftedBatch]):
    """A request for positions of a plan to a batch."""

    def __init__(self, samples: PlanDataset, keep: bool) -> None:
        self.samples, self.keep = samples, keep
        self.kept: dict[int, Sample] = {}

    def __getitem__(self, request: _Request) -> ShiftedBatch:
        batch = collate([self._sample(position) for position in request.positions])
        if batch.bad:
            raise InputError(f"A training image cannot be used: {batch.bad[0][1]}")
        return ShiftedBatch(batch.images, batch.labels, request.segment)

    def _sample(self, position: int) -> Sample:
        if position in self.kept:
            return self.kept[position]
        sample = self.samples[position]
        if self.keep:
            self.kept[position] = sample
        return sample


class _EpochBatches(DistributedSampler[_Request]):
    """The batches of one process in the order of an epoch, which Lightning sets.

    Derives from torch's sampler so that Lightning leaves the sharding to it: a batch is shared out
    over the processes, so that together they see what one process would.
    """

    def __init__(
        self, plan: Plan, batch_size: int, seed: int, mixed: bool, rank: int, world: int
    ) -> None:
        super().__init__(_positions(plan), num_replicas=world, rank=rank, seed=seed)
        self.plan, self.batch_size, self.mixed = plan, batch_size, mixed

    def __iter__(self) -> Iterator[_Request]:
        rng = np.random.default_rng([self.seed, self.epoch])
        start = self.rank * self.batch_size
        for number, segment in enumerate(self._segments(rng)):
            for batch in range(self._full(len(segment))):
                first = batch * self.num_replicas * self.batch_size + start
                yield _Request(number, segment[first : first + self.batch_size].tolist())

    def __len__(self) -> int:
        if self.mixed:
            return self._full(len(self.plan))
        return sum(self._full(segment.stop - segment.start) for segment in self.plan.segments)

    def _segments(self, rng: np.random.Generator) -> Iterator[NDArray[np.int64]]:
        if self.mixed:
            yield rng.permutation(len(self.plan))
            return
        for number in rng.permutation(len(self.plan.segments)):
            segment = self.plan.segments[number]
            yield rng.permutation(np.arange(segment.start, segment.stop))

    def _full(self, images: int) -> int:
        return images // (self.batch_size * self.num_replicas)


class _InOrder(DistributedSampler[_Request]):
    """Every batch of a plan, in order, for every process."""

    def __init__(self, plan: Plan, batch_size: int) -> None:
        super().__init__(_positions(plan), num_replicas=1, rank=0)
        self.plan, self.batch_size = plan, batch_size

    def __iter__(self) -> Iterator[_Request]:
        for positions in self.plan.batches(self.batch_size):
            yield _Request(self.plan.segment_at(positions[0]), list(positions))

    def __len__(self) -> int:
        return sum(1 for _ in self.plan.batches(self.batch_size))


def _positions(plan: Plan) -> Dataset[int]:
    """Stand in for a dataset where torch wants one to know its length."""
    dataset: Any = range(len(plan))
    return dataset  # type: ignore[no-any-return]
