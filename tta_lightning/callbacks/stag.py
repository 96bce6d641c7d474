"""STAG: one flag that makes any method's gradients follow the classifier's own geometry."""

from __future__ import annotations

import warnings
from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from tta_lightning.adapter import Adapter
from tta_lightning.callbacks.base import AdaptCallback
from tta_lightning.data.batches import StreamBatch
from tta_lightning.data.plan import Segment
from tta_lightning.errors import InputError
from tta_lightning.methods.stag import Kind, Scope, Space, StagOptions, StagTerm, Unit


class STAG(AdaptCallback):
    """Add the loss of STAG to the loss of whatever method runs.

    When adaptation starts, the anchors are computed once from the source classifier and a
    :class:`~tta_lightning.methods.stag.StagTerm` is attached to the method; when it ends, or
    breaks off, the term is detached. They stay those of the source classifier if a method moves
    the classifier itself. Nothing else is added: no forward and no backward pass.

    Which reading of the paper ``space`` and ``anchors`` are, and why these defaults, stands in
    ``docs/stag.md``: **a reconstruction from the abstract; no parity with the paper's tables is
    claimed**.

    The mean alignment of each segment goes to the loggers, ``metrics.json`` holds it for the whole
    stream together with the health of the anchors, and the manifest holds the options.

    Args:
        weight: Of the loss, 0 or more; with 0 the method runs as without this callback.
        space: Which gradient of the entropy is compared: ``full`` by the whole classifier, ``row``
            by the row of the predicted class, ``feature`` by the features.
        anchors: Which gradient of the self-structural entropy it is compared with: ``full`` by the
            whole classifier, ``self`` by the class's own row, ``input`` by the features, ``total``
            by both, ``sum`` by its row in all classes. None for the one that belongs to the space.
        scope: ``host`` for the samples that the method itself learns from, ``all`` for all of a
            batch that it learns from.
        unit: With ``logit`` the loss of a sample is multiplied by the lengths of its features and
            of its class's row, so that a weight means the same in every network; with ``cosine``
            it is not.
        row_normalize: Bring the rows of the classifier to length one for the anchors.
        temperature: Of the self-structural softmax.
        use_bias: Give the self-structural softmax the bias of the classifier.

    Raises:
        InputError: An option is not possible.
    """

    def __init__(
        self,
        weight: float = 1.0,
        space: Space = "full",
        anchors: Kind | None = None,
        scope: Scope = "host",
        unit: Unit = "logit",
        row_normalize: bool = False,
        temperature: float = 1.0,
        use_bias: bool = False,
    ) -> None:
        self.options = StagOptions(
            weight, space, anchors, scope, unit, row_normalize, temperature, use_bias
        )
        self.term: StagTerm | None = None
        self._health: dict[str, Any] = {}
        self._forget()

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Refuse to stand by idly while something is trained.

        Raises:
            InputError: The trainer fits.
        """
        if stage == "fit":
            raise InputError(
                "STAG acts while a model adapts, not while one is trained. Leave it out of `fit`, "
                "and give it to `adapt`."
            )

    def on_adapt_start(self, trainer: Trainer, adapter: Adapter) -> None:
        """Compute the anchors of the source classifier and attach the term.

        Raises:
            InputError: The method learns nothing, or the network does not end in one linear map.
        """
        self._forget()
        if self.options.weight == 0:
            return
        if not adapter.adapted_parameters:
            raise InputError(
                f"STAG adds a term to the loss of a method, but {type(adapter).__name__} moves no "
                "parameter. Use it with a method that learns, such as Tent."
            )
        others = [c for c in getattr(trainer, "callbacks", []) if isinstance(c, STAG)]
        if len(others) > 1:
            raise InputError(
                f"There are {len(others)} STAG callbacks, each of which would add its loss. Keep "
                "one; another weight is an option of it."
            )
        head = adapter.head
        self.term = StagTerm(head, self.options, adapter.classes)
        lost = self.term.reversed_classes.tolist()
        self._health = {
            "classes": len(self.term.anchors),
            "reversed_classes": len(lost),
            "self_structural_entropy": float(self.term.entropy.mean()),
        }
        if lost:
            if adapter.classes is not None:  # as the network counts them
                lost = adapter.classes[lost].tolist()
            some = ", ".join(map(str, lost[:5])) + (", ..." if len(lost) > 5 else "")
            warnings.warn(
                f"{len(lost)} of {len(self.term.anchors)} classes are not predicted for their own "
                f"row of {head.name!r} (class {some}), so the gradient of their self-structural "
                "entropy points the other way. `row_normalize` makes every row win; so does "
                "leaving `use_bias` out where the bias is the reason.",
                stacklevel=2,
            )
        adapter.terms.append(self.term)

    def on_adapt_batch_start(
        self, trainer: Trainer, adapter: Adapter, batch: StreamBatch, batch_idx: int
    ) -> None:
        """Forget the alignment of the batch before."""
        if self.term is not None:
            self.term.alignment = None

    def on_adapt_batch_end(
        self, trainer: Trainer, adapter: Adapter, logits: Tensor, batch: StreamBatch, batch_idx: int
    ) -> None:
        """Count the alignment of a batch that was learnt from: of its last pass, or last image."""
        self._batches += 1
        aligned = self.term is not None and self.term.alignment is not None
        if aligned and adapter.report.updated:
            assert self.term is not None
            assert self.term.alignment is not None
            self._stream.add(self.term.alignment)
            self._segment.add(self.term.alignment)

    def on_adapt_segment_start(self, trainer: Trainer, adapter: Adapter, segment: Segment) -> None:
        """Start the figures of a segment."""
        self._segment = _Mean()

    def on_adapt_segment_end(self, trainer: Trainer, adapter: Adapter, segment: Segment) -> None:
        """Send the mean alignment of the segment to the loggers."""
        alignment = self._segment.value()
        if alignment is not None:
            for logger in trainer.loggers:
                logger.log_metrics({f"{segment.name}/stag_alignment": alignment}, self._batches)

    def on_adapt_end(self, trainer: Trainer, adapter: Adapter) -> None:
        """Detach the term."""
        self._detach(adapter)

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Detach the term."""
        if isinstance(pl_module, Adapter):
            self._detach(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return the anchors and the figures so far."""
        if self.term is None:
            return {}
        return {
            "anchors": self.term.anchors,
            "batches": self._batches,
            "means": [[torch.as_tensor(m.total), m.count] for m in (self._segment, self._stream)],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the anchors and the figures of a run that goes on."""
        assert self.term is not None
        self.term.anchors.copy_(state_dict["anchors"])
        self._batches = state_dict["batches"]
        for mean, (total, count) in zip(
            (self._segment, self._stream), state_dict["means"], strict=True
        ):
            mean.total, mean.count = total.to(self.term.anchors.device), count

    def describe(self) -> dict[str, Any]:
        """Return the options, for the manifest."""
        return asdict(self.options)

    def summary(self) -> dict[str, Any]:
        """Return the figures under ``stag``; None where nothing was aligned."""
        return {"stag": {"alignment": self._stream.value(), **self._health}}

    def _detach(self, adapter: Adapter) -> None:
        adapter.terms[:] = [term for term in adapter.terms if term is not self.term]
        self.term = None

    def _forget(self) -> None:
        self._batches = 0
        self._segment, self._stream = _Mean(), _Mean()
        self._health = {}


class _Mean:
    """A mean of scalars on any device, in constant memory."""

    def __init__(self) -> None:
        self.total: Tensor | float = 0.0
        self.count = 0

    def add(self, value: Tensor) -> None:
        self.total = self.total + value.double()
        self.count += 1

    def value(self) -> float | None:
        """Return the mean; None of nothing."""
        return float(self.total) / self.count if self.count else None
