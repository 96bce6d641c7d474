"""One line for every predicted image."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import IO, Any

from lightning.pytorch import Trainer
from torch import Tensor

from tta_lightning.adapter import Adapter
from tta_lightning.callbacks.base import AdaptCallback
from tta_lightning.data.batches import StreamBatch
from tta_lightning.data.plan import Segment
from tta_lightning.errors import InputError
from tta_lightning.functional import predictions
from tta_lightning.runs import run_folder

COLUMNS = (
    "index",
    "path",
    "segment",
    "corruption",
    "severity",
    "label",
    "prediction",
    "confidence",
    "entropy",
    "updated",
)


class PredictionWriter(AdaptCallback):
    """Write ``predictions.csv`` into the run folder, flushed after every batch.

    Columns: index of the image in its source, path, segment, corruption, severity, label (empty
    when unknown), prediction (-1 where the logits are not finite), confidence, entropy in nats, and
    whether the batch updated the model (1 or 0).

    Args:
        filename: Name of the file in the run folder.
    """

    def __init__(self, filename: str = "predictions.csv") -> None:
        self.filename = filename
        self._file: IO[str] | None = None
        self._segment = ""
        self._cuts = False

    def on_adapt_start(self, trainer: Trainer, adapter: Adapter) -> None:
        """Open the file: a new one, or that of the run that is resumed.

        Raises:
            InputError: The file of the run that is resumed is gone.
        """
        folder = run_folder(trainer)
        if folder is None:
            return
        path = Path(folder, self.filename)
        resumed = getattr(trainer.test_loop, "resumed", None) is not None
        self._cuts = False
        if resumed and not path.is_file():
            raise InputError(
                f"{path} is gone, which the run that is resumed goes on from. Put it back, or "
                "start the run anew."
            )
        begun = path.is_file() and path.read_bytes().count(b"\n") <= 1  # and then killed
        mode = "r+" if resumed else "w" if begun else "x"
        # names of files need not be valid UTF-8; those that are not are written with escapes
        self._file = path.open(mode, newline="", encoding="utf-8", errors="backslashreplace")
        self._writer = csv.writer(self._file)
        if not resumed:
            self._writer.writerow(COLUMNS)
            self._file.flush()

    def on_adapt_segment_start(self, trainer: Trainer, adapter: Adapter, segment: Segment) -> None:
        """Note the segment."""
        self._segment = segment.name

    def on_adapt_batch_end(
        self, trainer: Trainer, adapter: Adapter, logits: Tensor, batch: StreamBatch, batch_idx: int
    ) -> None:
        """Write the rows of a batch."""
        if self._file is None:
            return
        found, labels = predictions(logits), batch.labels.tolist()
        updated = int(adapter.report.updated)
        stream: Any = getattr(trainer, "datamodule", None)
        numbers = zip(
            batch.positions.tolist(),
            labels,
            found.label.tolist(),
            found.confidence.tolist(),
            found.entropy.tolist(),
            strict=True,
        )
        for position, label, prediction, confidence, entropy in numbers:
            self._writer.writerow(
                [
                    *_whence(stream, position, self._segment),
                    "" if label < 0 else label,
                    prediction,
                    f"{confidence:.6f}",
                    f"{entropy:.6f}",
                    updated,
                ]
            )
        self._file.flush()

    def state_dict(self) -> dict[str, Any]:
        """Return how much is written, once that has reached the disk."""
        if self._file is None:
            return {}
        os.fsync(self._file.fileno())
        return {"bytes": os.fstat(self._file.fileno()).st_size, "segment": self._segment}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there; what was written after that is cut off once the run goes on.

        Raises:
            InputError: The file is shorter than it was.
        """
        if self._file is None:
            return
        size = os.fstat(self._file.fileno()).st_size
        if size < state_dict["bytes"]:
            raise InputError(
                f"{self._file.name} has {size} bytes, but had {state_dict['bytes']} when the "
                "checkpoint was written: it was cut off. Resume from an earlier checkpoint, or "
                "start the run anew."
            )
        self._file.seek(state_dict["bytes"])
        self._cuts, self._segment = True, state_dict["segment"]

    def on_adapt_boundary(self, trainer: Trainer, adapter: Adapter) -> None:
        """Cut off what the run that is resumed had written after its checkpoint."""
        if self._file is not None and self._cuts:
            self._file.truncate()
            self._cuts = False

    def on_adapt_end(self, trainer: Trainer, adapter: Adapter) -> None:
        """Close the file."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Close the file; what was predicted stays."""
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _whence(stream: Any, position: int, segment: str) -> list[Any]:
    """Return index, path, segment, corruption and severity of a sample."""
    plan = getattr(stream, "plan", None)
    if plan is None:
        return [position, "", segment, "", ""]
    index, domain = int(plan.samples[position]), plan.domain(position)
    path = stream.source.path(index, domain.corruption, domain.severity)
    return [index, path, segment, domain.corruption, domain.severity]
