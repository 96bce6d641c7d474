"""The loop that infers and then updates on every batch.

The only module that imports private names of Lightning. ``tests/loops/test_private_names.py``
checks them against the installed release, so that a change there is noticed by a test and not by a
user.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from tta_lightning.adapter import Adapter
from tta_lightning.contract import StepReport, kind_of
from tta_lightning.data.batches import StreamBatch
from tta_lightning.data.classes import class_indices
from tta_lightning.data.plan import Plan, Segment
from tta_lightning.errors import InputError
from tta_lightning.functional import all_finite
from tta_lightning.loops.state import go_on, state_of
from tta_lightning.loops.window import SlidingWindow
from tta_lightning.models.classifier import describe
from tta_lightning.models.norms import batch_norm_layers, without_advice

_LISTED = 100  # how many batches that were not finite are listed


class AdaptationLoop(_EvaluationLoop):
    """Drive an :class:`~tta_lightning.adapter.Adapter` over a stream.

    Per batch: segment hooks and resets, ``on_test_batch_start`` and ``on_adapt_batch_start``, then
    ``adapt_step`` on the images alone, then ``on_adapt_batch_end`` and ``on_test_batch_end``.
    Where the plan has a window, an image is predicted together with those before it, and
    ``adapt_step`` runs once a window. Where it resets each batch, it does so without a hook.
    Labels stay in the loop: callbacks see them, the adapter does not. Hooks of stock callbacks run
    as they do under ``Trainer.test``; our own are listed in
    :class:`~tta_lightning.callbacks.AdaptCallback`.

    A method that lets a number which is not finite into its weights, as none of ours does, is sent
    back to its source model before the next prediction is lost to it.

    Args:
        trainer: The trainer that runs it.
        resumed: What :meth:`state` returned in an earlier process; the loop goes on from there, and
            the stream must start at that position.

    Attributes:
        bad_images: Position and reason of each image that could not be read.
        nonfinite_batches: Number of batches that were predicted but whose logits, loss, gradients
            or step were not finite.
        nonfinite: The first hundred of them: ``batch``, ``segment`` and ``what`` was not finite.
        recoveries: How often the method itself returned to the source model.
        images_without_step: Number of images that a method which takes them one by one left out.
        segment: The stretch of the stream that is running; None outside.
        window: The last images of the segment, where the plan has a window; else None.
        served: Number of images that the stream has given, bad ones included.
        drawn: Number of batches that the stream has given, whether or not an image was good.
        resumed: The state that the run goes on from; None in a run that is begun here.
        between_batches: Whether all that the last batch changed is in place, and nothing of the
            next one.
        ended: Whether the last batch was served, or the run was stopped.
        stop_reason: Why the run was stopped, where a callback said so with :meth:`stop`.
    """

    def __init__(self, trainer: Trainer, resumed: dict[str, Any] | None = None) -> None:
        super().__init__(
            trainer, TrainerFn.TESTING, RunningStage.TESTING, verbose=False, inference_mode=False
        )
        self.segment: Segment | None = None
        self.window: SlidingWindow | None = None
        self.bad_images: list[tuple[int, str]] = []
        self.nonfinite_batches = 0
        self.recoveries = 0
        self.images_without_step = 0
        self.served = self.drawn = 0
        self.nonfinite: list[dict[str, Any]] = []
        self.between_batches = self.ended = False
        self.stop_reason: str | None = None
        self.resumed = resumed
        self._first = 0 if resumed is None else int(resumed["loop"]["drawn"])

    @property
    def adapter(self) -> Adapter:
        """The method that runs."""
        adapter = self.trainer.lightning_module
        assert isinstance(adapter, Adapter)
        return adapter

    @property
    def plan(self) -> Plan | None:
        """The plan of the stream; None when plain dataloaders are adapted to."""
        return getattr(self._stream, "plan", None)

    @property
    def completed_batches(self) -> int:
        """Number of batches that were predicted and, where the method does, learnt from."""
        return int(self.batch_progress.current.completed)

    def on_run_start(self) -> None:
        """Start from the source model, then run the start hooks."""
        adapter = self.adapter
        self._align_classes()
        adapter.reset()
        if self.resumed is None and is_overridden("prepare", adapter, parent=Adapter):
            with torch.enable_grad():
                adapter.prepare(self._clean_batches())
        super().on_run_start()
        self._hook("on_adapt_start")
        if self.resumed is not None:
            go_on(self, self.resumed)
        self.between_batches = True
        self._hook("on_adapt_boundary")

    def on_run_end(self) -> Any:
        """Run the end hooks."""
        self.ended = True
        self._hook("on_adapt_boundary")
        self._leave_segment()
        self._hook("on_adapt_end")
        return super().on_run_end()

    def _evaluation_step(
        self, batch: Any, batch_idx: int, dataloader_idx: int, dataloader_iter: Iterator[Any] | None
    ) -> None:
        trainer = self.trainer
        batch_idx += self._first
        if trainer.should_stop or batch_idx >= self.max_batches[0]:
            raise StopIteration
        batch = self._as_stream_batch(batch)
        self._note_bad_images(batch)
        self.between_batches = False
        self.served += len(batch.labels) + len(batch.bad)
        self.drawn = batch_idx + 1
        if len(batch.labels):
            self._serve(batch, batch_idx)
        self.between_batches = True
        self._hook("on_adapt_boundary")
        if trainer.received_sigterm:
            raise SIGTERMException

    def _serve(self, batch: StreamBatch, batch_idx: int) -> None:
        """Predict a batch and learn from it, with all hooks around that."""
        trainer = self.trainer
        self._enter_segment(batch)
        batch = self._to_device(batch)

        self.batch_progress.increment_ready()
        trainer._logger_connector.on_batch_start(batch)
        call._call_callback_hooks(trainer, "on_test_batch_start", batch, batch_idx)
        self._hook("on_adapt_batch_start", batch, batch_idx)
        self.batch_progress.increment_started()

        images, step = self._held(batch.images)
        logits = step(images)[-len(batch.labels) :]
        if not (finite := all_finite(logits)) and self._mend_weights():
            logits = step(images)[-len(batch.labels) :]
            finite = all_finite(logits)
        self._check_width(logits, batch.labels)
        self._note_what_is_not_finite(finite, batch_idx)
        self._note_recovery(self.adapter.report)
        self.batch_progress.increment_processed()

        self._hook("on_adapt_batch_end", logits, batch, batch_idx)
        call._call_callback_hooks(trainer, "on_test_batch_end", logits, batch, batch_idx)
        trainer._logger_connector.on_batch_end()
        self.batch_progress.increment_completed()
        self._has_run = True
        trainer._logger_connector.update_eval_step_metrics(self._seen_batches_per_dataloader[0])
        self._seen_batches_per_dataloader[0] += 1

    def state(self) -> dict[str, Any]:
        """Collect all that the rest of the run depends on, between two batches."""
        return state_of(self)

    def stop(self, reason: str) -> None:
        """End the run after this batch.

        Args:
            reason: What ``metrics.json`` says of it.
        """
        self.stop_reason = reason
        self.trainer.should_stop = True

    def announce_reset(self, reason: str) -> None:
        """Tell the callbacks that one of them returned the model to an earlier state."""
        self._hook("on_adapt_reset", reason)

    def _held(self, images: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Return what a batch is predicted within, and how: a window learns once it is new."""
        if self.window is None or self.adapter.episodic:
            return images, self._adapt_step
        held = self.window.add(images)
        return held, self._adapt_step if self.window.is_new else self._predict

    def _adapt_step(self, images: Tensor) -> Tensor:
        with torch.enable_grad(), self._as_test_step():
            return self.adapter.adapt_step(images)

    def _predict(self, images: Tensor) -> Tensor:
        """Predict within an incomplete window, of which a single image is nothing to warn of."""
        adapter, phase = self.adapter, self.adapter.phase
        layers = batch_norm_layers(adapter.network).values()
        with self._as_test_step(), without_advice(layers), phase("inference"):
            logits: Tensor = adapter(images)
        adapter.report = StepReport(reason="the window is not complete")
        return logits

    @contextmanager
    def _as_test_step(self) -> Iterator[None]:
        """Work in the trainer's precision; what is logged with ``self.log`` is of the test step."""
        adapter = self.adapter
        before, adapter._current_fx_name = adapter._current_fx_name, "test_step"
        try:
            with self.trainer.precision_plugin.test_step_context():
                yield
        finally:
            adapter._current_fx_name = before

    # Batches -------------------------------------------------------------------------------------

    def _as_stream_batch(self, batch: Any) -> StreamBatch:
        """Give images, or images and labels, of any dataloader the form of a stream's batch."""
        if isinstance(batch, StreamBatch):
            return batch
        parts = list(batch) if isinstance(batch, list | tuple) else [batch]
        images = parts[0] if parts else None
        right = isinstance(images, Tensor) and images.dim() == 4 and images.is_floating_point()
        if not isinstance(images, Tensor) or not right or images.is_meta:
            raise InputError(
                "adapt needs batches of floating-point images [B, 3, H, W] in [0, 1], alone or as "
                f"(images, labels); this dataloader gave {kind_of(images) if parts else 'nothing'}."
            )
        labels = parts[1] if len(parts) > 1 else torch.full((len(images),), -1)
        indices = isinstance(labels, Tensor) and not (labels.is_floating_point() or labels.is_meta)
        if not indices or labels.is_complex() or labels.shape != images.shape[:1]:
            raise InputError(
                "The labels of a batch must be class indices [B], whole numbers, one an image; "
                f"this dataloader gave {kind_of(labels)} for {len(images)} images."
            )
        positions = torch.arange(self.served, self.served + len(images))
        return StreamBatch(images, labels.long(), positions)

    def _to_device(self, batch: StreamBatch) -> StreamBatch:
        """Move a batch; only the images pass through hooks of the adapter."""
        trainer, images = self.trainer, batch.images
        images = trainer.precision_plugin.convert_input(images)
        images = self.adapter._on_before_batch_transfer(images, dataloader_idx=0)
        images = call._call_strategy_hook(trainer, "batch_to_device", images, dataloader_idx=0)
        return batch._replace(images=images, labels=batch.labels.to(images.device))

    def _note_bad_images(self, batch: StreamBatch) -> None:
        for position, reason in batch.bad:
            if getattr(self._stream, "on_bad_image", "stop") == "stop":
                kept = "; predictions so far are kept" if self.completed_batches else ""
                raise InputError(
                    f"{reason} The run stopped there{kept}. Or set on_bad_image: skip to leave "
                    "such images out."
                )
            self.bad_images.append((position, reason))
            warnings.warn(f"Left out: {reason}", stacklevel=2)

    def _mend_weights(self) -> bool:
        """Return to the source model if the weights are not finite; say whether they were not."""
        if all_finite(*self.adapter.moving_tensors().values()):
            return False
        self.adapter.reset()
        reason = "a weight is not finite: reset to the source model"
        self._note_recovery(StepReport(reset=True, reason=reason))
        return True

    def _note_what_is_not_finite(self, logits_are_finite: bool, batch_idx: int) -> None:
        report = self.adapter.report
        self.images_without_step += report.failed
        if logits_are_finite and report.finite:
            return
        self.nonfinite_batches += 1
        if len(self.nonfinite) < _LISTED:
            name = "" if self.segment is None else self.segment.name
            what = "logits" if report.finite else report.reason
            self.nonfinite.append({"batch": batch_idx, "segment": name, "what": what})
        if report.finite:  # else the adapter has warned
            warnings.warn(f"Batch {batch_idx} gave logits that are not finite.", stacklevel=2)

    def _note_recovery(self, report: StepReport) -> None:
        """Tell of a method that saw its model collapse and returned to the source."""
        if not report.reset:
            return
        self.recoveries += 1
        if self.recoveries == 1:
            warnings.warn(
                f"{type(self.adapter).__name__}: {report.reason}. metrics.json counts how often.",
                stacklevel=2,
            )
        self._hook("on_adapt_reset", report.reason)

    # Segments ------------------------------------------------------------------------------------

    def _enter_segment(self, batch: StreamBatch) -> None:
        segment = self._segment_of(batch)
        if segment != self.segment:
            self._change_segment(segment)
        if self.plan is not None and self.plan.reset_each_batch:
            self.adapter.reset()

    def _change_segment(self, segment: Segment) -> None:
        first = self.segment is None
        self._leave_segment()
        if segment.reset and not first:
            self.adapter.reset()
            self._hook("on_adapt_reset", f"segment {segment.name}")
        self.segment = segment
        size = None if self.plan is None else self.plan.window
        self.window = None if size is None else SlidingWindow(size)
        self._hook("on_adapt_segment_start", segment)

    def _leave_segment(self) -> None:
        if self.segment is not None:
            self._hook("on_adapt_segment_end", self.segment)
            self.segment, self.window = None, None

    def _segment_of(self, batch: StreamBatch) -> Segment:
        if self.plan is None:
            return self.segment or Segment("stream", 0, 0, reset=False)
        return self.plan.segments[self.plan.segment_at(int(batch.positions[0]))]

    # Classes -------------------------------------------------------------------------------------

    def _align_classes(self) -> None:
        """Restrict the network's outputs to the classes of the stream, by name."""
        names = getattr(self._stream, "classes", None)
        if names is None:  # a restriction that the user made stays
            return
        known = describe(self.adapter.network).class_names
        if known is None or tuple(names) == tuple(known):
            self.adapter.restrict_classes(None)
        else:
            self.adapter.restrict_classes(class_indices(names, known))

    def _check_width(self, logits: Tensor, labels: Tensor) -> None:
        if int(labels.max()) >= logits.shape[1]:
            raise InputError(
                f"The stream has label {int(labels.max())}, but the model gives "
                f"{logits.shape[1]} logits. Use a model that was trained on these classes."
            )
        names = getattr(self._stream, "classes", None)
        if names is not None and logits.shape[1] != len(names):
            some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            raise InputError(
                f"The model gives {logits.shape[1]} logits, but the stream has {len(names)} "
                f"classes ({some}). Use a model that was trained on these classes, or one that "
                "knows their names."
            )

    # Plumbing ------------------------------------------------------------------------------------

    @property
    def _stream(self) -> LightningDataModule | None:
        return getattr(self.trainer, "datamodule", None)

    def _clean_batches(self) -> Iterator[Tensor]:
        batches = getattr(self._stream, "clean_batches", None)
        if batches is None:
            raise InputError(
                f"{type(self.adapter).__name__} looks at clean images before the stream: give a "
                "datamodule with `clean_batches`, such as Stream(clean=...)."
            )
        for images in batches():
            yield self.trainer.precision_plugin.convert_input(images).to(self.adapter.device)

    def _hook(self, name: str, *args: Any) -> None:
        """Call a hook of ours on every callback that has it; stock ones do not."""
        trainer: Any = self.trainer  # Lightning sets these attributes where no checker sees them
        for callback in trainer.callbacks:
            hook = getattr(callback, name, None)
            if callable(hook):
                with trainer.profiler.profile(f"[Callback]{type(callback).__name__}.{name}"):
                    hook(trainer, self.adapter, *args)
