"""A small memory of a stream, balanced over the predicted classes: RoTTA's."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(eq=False)
class Kept:
    """An image in the bank.

    Attributes:
        image: ``[3, H, W]``.
        label: The class that it was predicted as.
        uncertainty: Of that prediction, in nats.
        age: How many images were offered since, itself included.
    """

    image: Tensor
    label: int
    uncertainty: float
    age: int = 0


class MemoryBank:
    """Hold at most N images, about N / C of each predicted class, and rather new and sure ones.

    Yuan, Xie, Li, "Robust Test-Time Adaptation in Dynamic Scenarios", CVPR 2023,
    https://arxiv.org/abs/2303.13899: category-balanced sampling with timeliness and uncertainty
    (section 3.3, algorithm 1). An image of age A and uncertainty U is the worse the higher::

        score = lambda_t / (1 + exp(-A / N)) + lambda_u * U / ln C

    A new image of class y is kept as it is where y has fewer than N / C and the bank has a free
    place. Where only the place is missing, it competes with the images of the classes that have
    most; where y is full, with those of y. It takes the place of the worst of them if that one is
    worse than itself, and is dropped otherwise.

    Args:
        capacity: N.
        classes: C; of a single one the uncertainty is zero, whatever it is divided by.
        lambda_t: Weight of the age.
        lambda_u: Weight of the uncertainty.
        kept: What the bank holds already, in the order of arrival.
    """

    def __init__(
        self,
        capacity: int,
        classes: int,
        lambda_t: float,
        lambda_u: float,
        kept: list[Kept] | None = None,
    ) -> None:
        self.capacity, self.classes = capacity, classes
        self.lambda_t, self.lambda_u = lambda_t, lambda_u
        self.kept = [] if kept is None else kept

    def add(self, image: Tensor, label: int, uncertainty: float) -> None:
        """Offer an image; whether or not it is kept, all others grow older by one.

        Args:
            image: ``[3, H, W]``.
            label: The class that it is predicted as.
            uncertainty: Of that prediction, in nats.
        """
        new = Kept(image, label, uncertainty)
        rivals = self._rivals(label)
        if rivals:
            # Of equally bad ones the last, as the published code has it.
            worst = max(reversed(rivals), key=self._score)
            if self._score(worst) > self._score(new):
                self.kept.remove(worst)
                self.kept.append(new)
        else:
            self.kept.append(new)
        for each in self.kept:
            each.age += 1

    def by_class(self) -> list[Kept]:
        """Return what is held, class by class, each in the order of arrival."""
        return sorted(self.kept, key=lambda each: each.label)

    def state(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return what is held as tensors; the bank holds one image at least.

        Args:
            dtype: Of the uncertainties.

        Returns:
            ``images [n, 3, H, W]``, ``labels [n]`` int64, ``uncertainties [n]`` and ``ages [n]``
            int64, in the order of arrival.
        """
        images = torch.stack([each.image for each in self.kept])
        numbers = {
            "labels": torch.tensor([each.label for each in self.kept]),
            "uncertainties": torch.tensor([each.uncertainty for each in self.kept], dtype=dtype),
            "ages": torch.tensor([each.age for each in self.kept]),
        }
        return {"images": images, **{n: t.to(images.device) for n, t in numbers.items()}}

    def _rivals(self, label: int) -> list[Kept]:
        """Return the images that a new one of this class competes with; none if it has a place."""
        counts = Counter(each.label for each in self.kept)
        if counts[label] >= self.capacity / self.classes:
            return [each for each in self.kept if each.label == label]
        if len(self.kept) < self.capacity:
            return []
        most = max(counts.values())
        return [each for each in self.by_class() if counts[each.label] == most]

    def _score(self, each: Kept) -> float:
        age = self.lambda_t / (1 + math.exp(-each.age / self.capacity))
        return age + self.lambda_u * each.uncertainty / math.log(max(self.classes, 2))


def kept_images(state: dict[str, Tensor]) -> Iterator[Kept]:
    """Read what a bank held off its :meth:`~MemoryBank.state`."""
    labels, uncertainties, ages = (
        state[name].tolist() for name in ("labels", "uncertainties", "ages")
    )
    for image, label, uncertainty, age in zip(
        state["images"], labels, uncertainties, ages, strict=True
    ):
        yield Kept(image, label, uncertainty, age)
