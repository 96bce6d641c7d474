"""A guard for any method: tells when the model collapses, and takes it back."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Literal, get_args

from lightning.pytorch import Trainer
from torch import Tensor

from tta_lightning.adapter import Adapter
from tta_lightning.callbacks.base import AdaptCallback
from tta_lightning.collapse import CollapseDetector, Detection
from tta_lightning.data.batches import StreamBatch
from tta_lightning.data.plan import Segment
from tta_lightning.errors import unknown_name

GuardAction = Literal["warn", "reset", "rollback", "stop"]
SHOWN = 3  # detections that are warned of one by one
LISTED = 100  # detections in metrics.json


class CollapseGuard(AdaptCallback):
    """Watch a method adapt; when its model collapses, go back, start anew, stop or only tell.

    How a collapse is told, what it costs and what the options are stands in
    :class:`~tta_lightning.collapse.CollapseDetector`. It idles where nothing accumulates: in the
    scenario ``episodic``, and with methods that neither move a tensor nor have a memory.

    Every detection is warned of with its figures (the first 3; the others are counted), sent to the
    loggers under ``collapse/``, and listed in ``metrics.json`` (the first 100).

    Args:
        action: ``rollback`` to the newest healthy snapshot, or the source model where there is
            none; ``reset`` to the source model; ``stop`` the run; ``warn`` only. The first two are
            announced to all callbacks by ``on_adapt_reset``.
        window: See the detector, as all that follow.
        concentration: From which on predictions are suspicious.
        low: Mean entropy below which they are.
        high: Mean entropy above which they are.
        drift: Relative change of the parameters above which they are.
        margin: Rise of the concentration of the probes that is proof.
        probes: Number of earlier images that are kept.
        prior: Probability of each class in the stream; None for equal ones.

    Raises:
        InputError: An option is not possible.
    """

    def __init__(
        self,
        action: GuardAction = "rollback",
        window: int = 128,
        concentration: float = 0.5,
        low: float = 0.01,
        high: float = 0.995,
        drift: float = 0.25,
        margin: float = 0.2,
        probes: int = 64,
        prior: Sequence[float] | None = None,
    ) -> None:
        if action not in get_args(GuardAction):
            raise unknown_name("action", action, get_args(GuardAction))
        self.action, self.window, self.concentration = action, window, concentration
        self.low, self.high, self.drift, self.margin = low, high, drift, margin
        self.probes, self.prior = probes, prior
        self.detector = CollapseDetector(
            "warn" if action == "stop" else action,
            *(window, concentration, low, high, drift, margin, probes, prior),
        )
        self._forget()

    def on_adapt_start(self, trainer: Trainer, adapter: Adapter) -> None:
        """Start anew."""
        self.detector.begin()
        self.detector.forward_context = trainer.precision_plugin.test_step_context
        self._forget()

    def on_adapt_segment_start(self, trainer: Trainer, adapter: Adapter, segment: Segment) -> None:
        """Note the name of the segment."""
        self._segment = segment.name

    def on_adapt_reset(self, trainer: Trainer, adapter: Adapter, reason: str) -> None:
        """Forget what was seen of the model before."""
        self.detector.note_reset()

    def on_adapt_batch_end(
        self, trainer: Trainer, adapter: Adapter, logits: Tensor, batch: StreamBatch, batch_idx: int
    ) -> None:
        """Observe the batch and act."""
        loop: Any = trainer.test_loop  # the adaptation loop, while this hook is called
        if loop.plan is not None and loop.plan.reset_each_batch:
            return
        found = self.detector.after_update(adapter, batch.images, logits)
        if found is None:
            return
        found = replace(found, action=self.action)
        self._tell(trainer, found, batch_idx)
        if self.action == "stop":
            loop.stop(str(found))
        elif self.action != "warn":
            loop.announce_reset(str(found))

    def on_adapt_end(self, trainer: Trainer, adapter: Adapter) -> None:
        """Let go of the model and the images."""
        self.detector.release()

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Let go of the model and the images."""
        self.detector.release()

    def summary(self) -> dict[str, Any]:
        """Return the counts and the detections under ``collapse``."""
        return {"collapse": {**self.detector.summary(), "detections": list(self._detections)}}

    def state_dict(self) -> dict[str, Any]:
        """Return what later decisions and the summary depend on."""
        return {
            "detector": self.detector.state_dict(),
            "detections": [dict(each) for each in self._detections],
            "segment": self._segment,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take what :meth:`state_dict` returned; call it after ``on_adapt_start``."""
        self.detector.load_state_dict(state_dict["detector"])
        self._segment = state_dict["segment"]
        self._detections[:] = [dict(each) for each in state_dict["detections"]]

    def _tell(self, trainer: Trainer, found: Detection, batch_idx: int) -> None:
        figures = asdict(found)
        if len(self._detections) < LISTED:
            self._detections.append({"batch": batch_idx, "segment": self._segment, **figures})
        if self.detector.alarms <= SHOWN:
            more = " Further ones are only counted." if self.detector.alarms == SHOWN else ""
            done = {"warn": "nothing was done", "stop": "the run stops"}.get(
                found.action, f"it went back to the {found.went_to or 'source'} model"
            )
            warnings.warn(
                f"Batch {batch_idx} ({self._segment}): {found}; {done}.{more}", stacklevel=3
            )
        numbers = {
            f"collapse/{name}": float(value)
            for name, value in figures.items()
            if isinstance(value, int | float)
        }
        for logger in trainer.loggers:
            logger.log_metrics(numbers, batch_idx)

    def _forget(self) -> None:
        self._segment = ""
        self._detections: list[dict[str, Any]] = []
