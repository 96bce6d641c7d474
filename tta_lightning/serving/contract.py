"""What a classifier is asked, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from tta_lightning.adapter import Adapter
from tta_lightning.errors import InputError, unknown_name

_ROUNDING = 1e-4  # what pixels may lie outside [0, 1]
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
Updates = Literal["inline", "background"]


class Guard(Protocol):
    """What looks after a model that learns, such as a detector of collapse.

    A method ``note_reset()``, where it has one, is called when the model went to other weights by
    :meth:`OnlineClassifier.reset`, ``rollback`` or ``load_state_dict``.
    """

    def after_update(self, adapter: Adapter, images: Tensor, logits: Tensor) -> object | None:
        """Look at one step, and act on the adapter if need be.

        Args:
            adapter: The method, after the step.
            images: ``[B, 3, H, W]`` in [0, 1], what it was made from.
            logits: ``[B, C]``, what they were predicted as.

        Returns:
            Something that describes the alarm when it is logged; None if all is well.
        """


@dataclass(frozen=True)
class Answer:
    """A prediction and the weights that made it.

    Attributes:
        probabilities: ``[B, C]`` float32, on the device of the images.
        version: How often the weights had changed when they made it.
    """

    probabilities: Tensor
    version: int


@dataclass(frozen=True)
class ServingStatistics:
    """What a classifier has done.

    Attributes:
        images: Number of images that were predicted.
        predictions: Number of requests that were answered.
        updates: Number of steps that the model learnt from.
        failed_updates: Number of steps that were undone: they raised, or left weights that are not
            finite.
        skipped_updates: Number of steps from which nothing was learnt: the method chose no image,
            or loss or gradient were not finite.
        dropped_images: Number of images that were gathered and never learnt from.
        alarms: Number of alarms of the guard.
        version: How often the weights changed, by updates, alarms (also of a guard that only
            warns), resets and rollbacks.
    """

    images: int = 0
    predictions: int = 0
    updates: int = 0
    failed_updates: int = 0
    skipped_updates: int = 0
    dropped_images: int = 0
    alarms: int = 0
    version: int = 0


def check_images(images: Tensor) -> None:
    """Refuse what is no batch of images ``[B, 3, H, W]`` in [0, 1].

    Raises:
        InputError: Says what it is.
    """
    expected = "Expected a floating-point tensor [B, 3, H, W] of one image or more, in [0, 1]"
    if not isinstance(images, Tensor):
        raise InputError(f"The images are a {type(images).__name__}. {expected}.")
    given = f"The images are {images.dtype} of shape {list(images.shape)}"
    if images.dtype not in _DTYPES or images.is_sparse or images.is_meta:
        raise InputError(f"{given}. {expected}: convert 8-bit ones with `images.float() / 255`.")
    if images.dim() == 3:
        raise InputError(f"{given}. {expected}: make one image a batch with `images[None]`.")
    if images.dim() != 4 or images.shape[1] != 3 or not images.numel():
        raise InputError(f"{given}. {expected}.")
    low, high = (float(bound) for bound in images.detach().aminmax())
    if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):  # NaN is neither
        raise InputError(
            f"The pixels go from {low:g} to {high:g}. {expected}: divide 8-bit ones by 255, and "
            "leave the normalisation by mean and standard deviation to the network."
        )


def check_options(adapter: Adapter, updates: str, update_size: int | None, queue_size: int) -> None:
    """Refuse arguments of a classifier that are out of range, or not for this method.

    Raises:
        InputError: Names the argument.
    """
    if updates not in get_args(Updates):
        raise unknown_name("way to make updates", updates, get_args(Updates))
    if update_size is not None and update_size < 1:
        raise InputError(f"update_size = {update_size}: expected 1 or more images, or None.")
    if queue_size < 1:
        raise InputError(f"queue_size = {queue_size}: expected 1 or more updates.")
    if adapter.episodic and (updates == "background" or update_size is not None):
        raise InputError(
            f"{type(adapter).__name__} learns from the image that it predicts and then forgets, so "
            "it cannot learn later: leave out update_size and set updates to inline."
        )


def as_parameters(images: Tensor, adapter: Adapter) -> Tensor:
    """Bring images to the device and the precision of the network."""
    parameter = next((p for p in adapter.network.parameters() if p.is_floating_point()), None)
    return images if parameter is None else images.to(parameter.device, parameter.dtype)
