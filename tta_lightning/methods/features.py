"""What methods that work on features, without a gradient, have in common: LAME and T3A."""

from __future__ import annotations

import warnings

from torch import Tensor

from tta_lightning.adapter import Adapter
from tta_lightning.contract import Outputs, StepReport
from tta_lightning.errors import InputError
from tta_lightning.functional import wide


def features_of(adapter: Adapter, out: Outputs) -> Tensor:
    """Return the features ``[B, D]`` of a forward pass, in float32 at least.

    Raises:
        InputError: The network does not end in one linear map.
    """
    head = adapter.head
    if out.features is None:
        raise InputError(
            f"{type(adapter).__name__} needs what enters the final linear map of the network. "
            f"{head.name!r} looks like it, but did not run once, or another layer comes after it. "
            "Use a network that returns what its head gives."
        )
    return wide(out.features)


def report_features(updated: bool, left_out: int, images: int, consequence: str) -> StepReport:
    """Report a batch; warn of images that are not finite, and of what is done with them.

    Args:
        updated: Whether the method keeps something of the batch.
        left_out: Number of images whose logits or features are not finite.
        images: Number of images of the batch.
        consequence: What happened to those, as the end of a sentence.
    """
    if not left_out:
        return StepReport(updated, reason="" if updated else "the method learns nothing")
    reason = f"{left_out} of {images} images gave logits or features that are not finite"
    warnings.warn(f"{reason}; they were {consequence}.", stacklevel=3)
    return StepReport(updated, finite=False, reason=reason, failed=left_out)
