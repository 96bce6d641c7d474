"""The hooks of the adaptation stage."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, Trainer
from torch import Tensor

from tta_lightning.adapter import Adapter
from tta_lightning.data.batches import StreamBatch
from tta_lightning.data.plan import Segment
from tta_lightning.describe import constructor_arguments


class AdaptCallback(Callback):
    """A callback with the hooks of :class:`~tta_lightning.loops.AdaptationLoop`.

    Order: ``on_adapt_start``; for each segment ``on_adapt_reset`` (where the plan resets),
    ``on_adapt_segment_start``, its batches, ``on_adapt_segment_end``; ``on_adapt_end``. Any
    callback that has a method of such a name is called; deriving from this class is not needed.

    ``on_adapt_boundary`` comes after the start and after every batch. A run that is resumed goes on
    in the middle of a segment: after ``on_adapt_start`` come ``load_state_dict`` with what the
    callback's ``state_dict`` gave (tensors and plain values), and then the next batch.

    A batch need not be learnt from: ``adapter.report`` says whether it was. In a stream with a
    sliding window a batch is one image, predicted within the last ones, and the report says so of
    all but every n-th.
    """

    @property
    def state_key(self) -> str:
        """Name of the callback with its options, as Lightning's own have it."""
        return f"{type(self).__qualname__}{self.describe()}"

    def on_adapt_start(self, trainer: Trainer, adapter: Adapter) -> None:
        """Run when the stream starts; the adapter stands at the source model."""

    def on_adapt_end(self, trainer: Trainer, adapter: Adapter) -> None:
        """Run after the last batch."""

    def on_adapt_segment_start(self, trainer: Trainer, adapter: Adapter, segment: Segment) -> None:
        """Run before the first batch of a segment, after its reset."""

    def on_adapt_segment_end(self, trainer: Trainer, adapter: Adapter, segment: Segment) -> None:
        """Run after the last batch of a segment, before the next one resets the model."""

    def on_adapt_reset(self, trainer: Trainer, adapter: Adapter, reason: str) -> None:
        """Run after the model returned to the source in mid-stream.

        Resets before every batch (scenario ``episodic``) are not announced one by one.
        """

    def on_adapt_batch_start(
        self, trainer: Trainer, adapter: Adapter, batch: StreamBatch, batch_idx: int
    ) -> None:
        """Run before a batch is predicted."""

    def on_adapt_batch_end(
        self, trainer: Trainer, adapter: Adapter, logits: Tensor, batch: StreamBatch, batch_idx: int
    ) -> None:
        """Run after a batch was predicted and, where it was, learnt from; ``logits`` ``[B, C]``."""

    def on_adapt_boundary(self, trainer: Trainer, adapter: Adapter) -> None:
        """Run between two batches, when all that the last one changed is in place.

        Also before the first batch, and once more after the last, before its segment ends.
        """

    def describe(self) -> dict[str, Any]:
        """Return the options of this callback, as plain values for the manifest."""
        return constructor_arguments(self)

    def summary(self) -> dict[str, Any]:
        """Return what this callback adds to ``metrics.json``, as plain values."""
        return {}
