"""A progress bar that says how adaptation goes."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

from tta_lightning.adapter import Adapter
from tta_lightning.callbacks.cost import CostMonitor
from tta_lightning.callbacks.metrics import StreamMetrics
from tta_lightning.data.plan import Segment


class AdaptationProgress(RichProgressBar):
    """Lightning's rich progress bar, named "Adapting", with segment, accuracy and images/s.

    Accuracy is that of the segment so far. In the other stages it is the stock bar.

    Args:
        refresh_rate: Refreshes a second; 0 switches the bar off.
    """

    def __init__(self, refresh_rate: int = 4) -> None:
        super().__init__(refresh_rate=refresh_rate, leave=True)
        self._segment = ""

    def on_adapt_segment_start(self, trainer: Trainer, adapter: Adapter, segment: Segment) -> None:
        """Note the segment."""
        self._segment = segment.name

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Move the bar on."""
        super().on_test_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)
        if (
            isinstance(pl_module, Adapter)
            and self.progress
            and self.test_progress_bar_id is not None
        ):
            self.progress.update(self.test_progress_bar_id, description=self._describe(trainer))

    def configure_columns(self, trainer: Trainer) -> list[Any]:
        """Choose the columns: while adapting without the batches a second, the images say more."""
        columns: list[Any] = super().configure_columns(trainer)
        return columns[:-1] if isinstance(trainer.lightning_module, Adapter) else columns

    @property
    def test_description(self) -> str:
        """Name of the bar."""
        return "Adapting" if isinstance(self.trainer.lightning_module, Adapter) else "Testing"

    def _describe(self, trainer: Trainer) -> str:
        words = ["Adapting", self._segment]
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, StreamMetrics) and callback.running_accuracy is not None:
                words.append(f"{callback.running_accuracy:.1%}")
            if isinstance(callback, CostMonitor) and callback.images_per_second is not None:
                words.append(f"{callback.images_per_second:.0f} img/s")
        return " ".join(words)
