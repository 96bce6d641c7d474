"""Standard deviation and mean of features, measured in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Self

import torch
from torch import Tensor, nn

from tta_lightning.errors import InputError
from tta_lightning.functional import keep_float32


class FeatureStatistics(nn.Module):
    """Standard deviation and mean of each of F features over a set of images.

    Both are part of the ``state_dict``; before :meth:`set` or :meth:`measure` they are empty.

    Attributes:
        std: ``[F]``, unbiased.
        mean: ``[F]``.
    """

    std: Tensor
    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("std", torch.empty(0))
        self.register_buffer("mean", torch.empty(0))

    @property
    def known(self) -> bool:
        """Whether there are any."""
        return self.std.numel() > 0

    def set(self, std: Tensor, mean: Tensor, origin: str) -> None:
        """Take over statistics, the standard deviation first.

        Args:
            std: ``[F]``.
            mean: ``[F]``.
            origin: Where they come from, for messages.

        Raises:
            InputError: They are no such pair.
        """
        if std.dim() != 1 or std.shape != mean.shape or std.numel() == 0:
            raise InputError(
                f"The feature statistics of {origin} have the shapes {list(std.shape)} and "
                f"{list(mean.shape)}. Expected the standard deviation and the mean of the same "
                "features, [F] each."
            )
        if (std < 0).any():
            exchanged = " They are probably exchanged." if bool((mean >= 0).all()) else ""
            raise InputError(
                f"The standard deviation in the feature statistics of {origin} holds negative "
                f"numbers. Expected (std, mean), the standard deviation first.{exchanged}"
            )
        if not (torch.isfinite(std).all() and torch.isfinite(mean).all()):
            raise InputError(f"The feature statistics of {origin} hold NaN or infinite numbers.")
        dtype = torch.promote_types(std.dtype, torch.float32)
        self.std = std.detach().to(self.std.device, dtype, copy=True)
        self.mean = mean.detach().to(self.mean.device, dtype, copy=True)

    def measure(self, batches: Iterable[Tensor]) -> int:
        """Measure features in one pass, in float64 and without keeping them.

        Args:
            batches: Features ``[B, F]``, any number of batches of any size.

        Returns:
            The number of images.

        Raises:
            InputError: There are fewer than two images, or a feature is not finite.
        """
        count, mean, squares = 0, torch.zeros(()), torch.zeros(())
        dtype = torch.float32
        for batch in batches:
            features = batch.detach().double()
            added, dtype = len(features), torch.promote_types(batch.dtype, torch.float32)
            if added == 0:
                continue
            difference = features.mean(dim=0) - mean.to(features)
            squares = (
                squares.to(features)
                + (features - features.mean(dim=0)).square().sum(dim=0)
                + difference.square() * (count * added / (count + added))
            )
            mean = mean.to(features) + difference * (added / (count + added))
            count += added
        if count < 2:
            raise InputError(
                f"The statistics of clean features need two images or more, got {count}. Give a "
                "source with some clean, unlabelled images."
            )
        std = (squares / (count - 1)).sqrt()
        self.set(std.to(dtype), mean.to(dtype), "the clean images")
        return count

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move along with a network, but keep the precision."""
        return super()._apply(keep_float32(fn), recurse)  # type: ignore[no-untyped-call,no-any-return]

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Take the width of what is loaded."""
        for name in ("std", "mean"):
            loaded = state_dict.get(prefix + name)
            if loaded is not None:
                setattr(self, name, torch.empty_like(loaded, device=getattr(self, name).device))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
