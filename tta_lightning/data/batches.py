"""From positions in a plan to batches of images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from tta_lightning.data.corruptions import corrupt
from tta_lightning.data.datasets import BadImageError, ImageSource
from tta_lightning.data.geometry import Geometry, ImageSizeError
from tta_lightning.data.plan import Domain, Plan
from tta_lightning.errors import InputError


class StreamBatch(NamedTuple):
    """One batch of a stream.

    Attributes:
        images: ``[B, 3, H, W]`` float32 in [0, 1].
        labels: ``[B]`` int64, -1 where unknown. The loop keeps them from every method.
        positions: ``[B]`` int64 on the CPU, the place of each sample in the plan.
        bad: Position and reason of each image of this batch that could not be read.
    """

    images: Tensor
    labels: Tensor
    positions: Tensor
    bad: tuple[tuple[int, str], ...] = ()


class Sample(NamedTuple):
    """One image of a plan, or the reason why it could not be read."""

    image: NDArray[np.uint8] | None
    label: int
    position: int
    error: str


class PlanDataset(Dataset[Sample]):
    """Position in the plan to image; an image that cannot be read is handed on as a reason."""

    def __init__(
        self, source: ImageSource, plan: Plan, size: Geometry, table: str, seed: int
    ) -> None:
        super().__init__()
        self.source, self.plan, self.geometry = source, plan, size
        self.table, self.seed = table, seed

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, position: int) -> Sample:
        index, domain = int(self.plan.samples[position]), self.plan.domain(position)
        label = int(self.source.labels[index])
        try:
            return Sample(self.image(index, domain), label, position, "")
        except ImageSizeError as error:
            path = self.source.path(index, domain.corruption, domain.severity)
            return Sample(None, label, position, f"Cannot use the image {path!r}: {error}")
        except BadImageError as error:
            return Sample(None, label, position, str(error))

    def image(self, index: int, domain: Domain) -> NDArray[np.uint8]:
        """Return an image of the source ``[H, W, 3]`` as the stream shows it in a domain.

        Raises:
            BadImageError: It cannot be read or used.
        """
        if self.source.domains is not None:
            return self.geometry(self.source.load(index, domain.corruption, domain.severity))
        return corrupt(
            self.geometry(self.source.load(index)),
            domain.corruption,
            domain.severity,
            index=index,
            seed=self.seed,
            table=self.table,
        )


class PlanBatches(Sampler[list[int]]):
    """The positions of each batch of a plan, in order.

    Args:
        plan: The plan.
        batch_size: Images a batch.
        start: Position to start at, the first of a batch. Its length is that of the whole plan.
    """

    def __init__(self, plan: Plan, batch_size: int, start: int = 0) -> None:
        self.plan, self.batch_size, self.start = plan, batch_size, start

    def __iter__(self) -> Iterator[list[int]]:
        batches = self.plan.batches(self.batch_size)
        return (list(positions) for positions in batches if positions.start >= self.start)

    def __len__(self) -> int:
        return sum(-(-(s.stop - s.start) // self.batch_size) for s in self.plan.segments)


def collate(samples: Sequence[Sample]) -> StreamBatch:
    """Make a batch of samples.

    Raises:
        InputError: Their images differ in size.
    """
    good = [sample for sample in samples if sample.image is not None]
    images = [sample.image for sample in good if sample.image is not None]
    shapes = {image.shape for image in images}
    if len(shapes) > 1:
        sizes = ", ".join(sorted(f"{w} x {h}" for h, w, _ in shapes))
        raise InputError(
            f"The images of a batch differ in size ({sizes} px), and the model does not say which "
            "it was made for. Set image_size of the stream to a side in px."
        )
    pixels = np.stack(images) if images else np.zeros((0, 1, 1, 3), np.uint8)
    return StreamBatch(
        images=torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().float().div_(255),
        labels=torch.tensor([sample.label for sample in good], dtype=torch.int64),
        positions=torch.tensor([sample.position for sample in good], dtype=torch.int64),
        bad=tuple((s.position, s.error) for s in samples if s.image is None),
    )
