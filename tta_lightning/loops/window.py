"""The newest images of a stream that come one by one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tta_lightning.errors import InputError


@dataclass
class SlidingWindow:
    """The newest images of a stream that come one by one.

    Attributes:
        size: How many it holds when it is full, and how often the model learns.
        images: ``[n, 3, H, W]``, n from 1 to ``size``, the newest last; None before the first.
        arrived: Number of images since it was empty.
    """

    size: int
    images: Tensor | None = None
    arrived: int = 0

    def add(self, image: Tensor) -> Tensor:
        """Take in an image ``[1, 3, H, W]`` and return what the window then holds.

        Raises:
            InputError: Its size differs from that of the others.
        """
        if self.images is None:
            self.images = image[:0]
        elif self.images.shape[1:] != image.shape[1:]:
            sizes = " and ".join(f"{w} x {h}" for *_, h, w in (self.images.shape, image.shape))
            raise InputError(
                f"The images of a window differ in size ({sizes} px), and the model does not say "
                "which it was made for. Set image_size of the stream to a side in px."
            )
        self.images = torch.cat([self.images, image])[-self.size :]
        self.arrived += 1
        return self.images

    def state(self) -> dict[str, Any]:
        """Return what :meth:`from_state` makes an equal window of."""
        return {"size": self.size, "images": self.images, "arrived": self.arrived}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], device: torch.device) -> SlidingWindow:
        """Make the window that :meth:`state` was asked of, with its images on a device."""
        images = state["images"]
        return cls(**{**state, "images": None if images is None else images.to(device)})

    @property
    def is_new(self) -> bool:
        """Whether none of its images has been learnt from."""
        return self.arrived % self.size == 0
