"""How good the predictions of a stream are: overall, a segment, a domain, and as it goes on."""

from __future__ import annotations

import math
from array import array
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torchmetrics import Metric

from tta_lightning.adapter import Adapter
from tta_lightning.callbacks.base import AdaptCallback
from tta_lightning.data.batches import StreamBatch
from tta_lightning.data.plan import Plan, Segment
from tta_lightning.functional import Predictions, predictions

COUNTS = ("images", "labelled", "correct", "finite")
MEANS = ("nll", "entropy", "confidence")
SUMS = (*COUNTS, *MEANS, "calibration")
"""Names of what :class:`PredictionStatistics` adds up."""


class PredictionStatistics(Metric):
    """Accuracy, NLL, calibration error, entropy and confidence of a stream, in constant memory.

    The calibration error is the L1 one of Guo et al. (ICML 2017) over equally wide bins of
    confidence; torchmetrics' own keeps every confidence it has seen, which a stream without an end
    cannot afford. A sample with logits that are not finite counts as wrong; NLL, calibration,
    entropy and confidence are means over the other ones.

    Args:
        bins: Number of bins of the calibration error.
    """

    full_state_update = False
    images: Tensor
    labelled: Tensor
    correct: Tensor
    finite: Tensor
    nll: Tensor
    entropy: Tensor
    confidence: Tensor
    calibration: Tensor

    def __init__(self, bins: int = 15) -> None:
        super().__init__()
        self.bins = bins
        for name in COUNTS:
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        for name in MEANS:
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        # rows: labelled samples, sum of confidences, correct ones
        self.add_state(
            "calibration", torch.zeros(3, bins, dtype=torch.float64), dist_reduce_fx="sum"
        )
        self.persistent(True)

    def update(self, logits: Tensor, labels: Tensor, found: Predictions | None = None) -> None:
        """Add a batch.

        Args:
            logits: ``[B, C]``.
            labels: ``[B]`` int64, -1 where unknown.
            found: What the logits say, if that is known already.
        """
        found = predictions(logits) if found is None else found
        known, finite = labels >= 0, found.finite
        correct, scored = (found.label == labels) & known, known & finite
        self.images += len(labels)
        self.labelled += known.sum()
        self.correct += correct.sum()
        self.finite += finite.sum()
        self.entropy += found.entropy[finite].sum(dtype=torch.float64)
        self.confidence += found.confidence[finite].sum(dtype=torch.float64)
        log_p = logits[scored].float().log_softmax(dim=1)
        self.nll -= log_p.gather(1, labels[scored, None]).sum(dtype=torch.float64)
        confidence = found.confidence[scored].double()
        bins = (confidence * self.bins).long().clamp_(max=self.bins - 1)
        rows = torch.stack([torch.ones_like(confidence), confidence, correct[scored].double()])
        self.calibration.index_add_(1, bins, rows)

    def go_on(self, sums: dict[str, Tensor]) -> None:
        """Take over the sums of other statistics, by the names in :data:`SUMS`."""
        if int(sums["images"]):  # an empty batch, so that torchmetrics knows of an update
            self.update(torch.zeros(0, 1), torch.zeros(0, dtype=torch.int64))
        for name in SUMS:
            getattr(self, name).copy_(sums[name])

    def compute(self) -> dict[str, float | None]:
        """Return the figures of all batches so far.

        Returns:
            ``images`` (a count), ``accuracy`` and ``error`` (fractions), ``nll`` and ``entropy``
            (nats), ``ece`` and ``confidence`` (fractions). None where nothing was labelled or
            finite.
        """
        labelled, finite = int(self.labelled), int(self.finite)
        scored = float(self.calibration[0].sum())
        accuracy = int(self.correct) / labelled if labelled else None
        gap = (self.calibration[1] - self.calibration[2]).abs().sum()
        return {
            "images": int(self.images),
            "accuracy": accuracy,
            "error": None if accuracy is None else 1 - accuracy,
            "nll": float(self.nll) / scored if scored else None,
            "ece": float(gap) / scored if scored else None,
            "entropy": float(self.entropy) / finite if finite else None,
            "confidence": float(self.confidence) / finite if finite else None,
        }


class StreamMetrics(AdaptCallback):
    """Measure the predictions of a stream and log them to the trainer's loggers.

    Figures of :class:`PredictionStatistics` for the whole stream, for each segment and, where a
    segment mixes domains, for each domain; and the curve of images and correct predictions a batch.

    Args:
        bins: Number of bins of the calibration error.
    """

    def __init__(self, bins: int = 15) -> None:
        self.bins = bins
        self._clear()

    def on_adapt_start(self, trainer: Trainer, adapter: Adapter) -> None:
        """Forget an earlier run."""
        self._clear()
        self._plan: Plan | None = getattr(getattr(trainer, "datamodule", None), "plan", None)

    def on_adapt_segment_start(self, trainer: Trainer, adapter: Adapter, segment: Segment) -> None:
        """Start the figures of a segment."""
        self._current = PredictionStatistics(self.bins)
        self._segments.append((segment.name, self._current))
        self._starts.append((segment.name, len(self._images)))

    def on_adapt_batch_end(
        self, trainer: Trainer, adapter: Adapter, logits: Tensor, batch: StreamBatch, batch_idx: int
    ) -> None:
        """Add a batch to every figure it belongs to."""
        logits, labels = logits.detach().cpu(), batch.labels.cpu()
        found = predictions(logits)
        for statistics in (self.overall, self._current):
            statistics.update(logits, labels, found)
        if self._plan is not None and len(self._plan.segments) < len(self._plan.domains):
            self._add_domains(logits, labels, batch.positions)
        self._images.append(len(labels))
        self._correct.append(int(((found.label == labels) & (labels >= 0)).sum()))
        self._labelled.append(int((labels >= 0).sum()))
        self._entropy.append(float(found.entropy[found.finite].mean()))

    def on_adapt_segment_end(self, trainer: Trainer, adapter: Adapter, segment: Segment) -> None:
        """Send the figures of the segment to the loggers."""
        figures = self._current.compute()
        known = {f"{segment.name}/{key}": v for key, v in figures.items() if v is not None}
        for logger in trainer.loggers:
            logger.log_metrics(known, step=len(self._images))

    def on_adapt_end(self, trainer: Trainer, adapter: Adapter) -> None:
        """Send the figures of the whole stream to the loggers."""
        if not self.overall.update_called:
            return
        known = {f"stream/{key}": v for key, v in self.overall.compute().items() if v is not None}
        for logger in trainer.loggers:
            logger.log_metrics(known, step=len(self._images))

    def summary(self) -> dict[str, Any]:
        """Return the figures: ``overall``, ``segments``, ``domains``, ``curve``.

        The curve counts the labelled images of each batch where only some have a label.
        """
        known, some = int(self.overall.labelled), {}
        if 0 < known < int(self.overall.images):
            some = {"labelled": self._labelled.tolist()}
        return {
            "overall": self.overall.compute(),
            "segments": [  # a run may stop in the first batch of a segment
                {"segment": name, **s.compute()} for name, s in self._segments if s.update_called
            ],
            "domains": [{"domain": k, **v.compute()} for k, v in sorted(self._domains.items())],
            "curve": {
                "segments": [{"segment": name, "batch": batch} for name, batch in self._starts],
                "images": self._images.tolist(),
                "correct": self._correct.tolist() if known else None,
                **some,
                "entropy": [round(v, 5) if math.isfinite(v) else None for v in self._entropy],
            },
        }

    def state_dict(self) -> dict[str, Any]:
        """Return all figures so far."""
        rows = [self.overall, *(s for _, s in self._segments), *self._domains.values()]
        return {
            "sums": {name: torch.stack([getattr(s, name) for s in rows]) for name in SUMS},
            "segments": [name for name, _ in self._segments],
            "domains": list(self._domains),
            "starts": [list(pair) for pair in self._starts],
            "images": torch.tensor(self._images, dtype=torch.int64),
            "correct": torch.tensor(self._correct, dtype=torch.int64),
            "labelled": torch.tensor(self._labelled, dtype=torch.int64),
            "entropy": torch.tensor(self._entropy, dtype=torch.float64),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the figures of a run that goes on."""
        segments, domains = state_dict["segments"], state_dict["domains"]
        count = 1 + len(segments) + len(domains)
        rows = [PredictionStatistics(self.bins) for _ in range(count)]
        for number, statistics in enumerate(rows):
            statistics.go_on({name: sums[number] for name, sums in state_dict["sums"].items()})
        self.overall = rows[0]
        self._segments[:] = zip(segments, rows[1 : 1 + len(segments)], strict=True)
        self._domains.update(zip(domains, rows[1 + len(segments) :], strict=True))
        self._current = rows[len(segments)]
        self._starts[:] = [(name, batch) for name, batch in state_dict["starts"]]
        self._images = array("q", state_dict["images"].tolist())
        self._correct = array("q", state_dict["correct"].tolist())
        self._labelled = array("q", state_dict["labelled"].tolist())
        self._entropy = array("d", state_dict["entropy"].tolist())

    @property
    def running_accuracy(self) -> float | None:
        """Accuracy of the current segment so far; None without labels."""
        labelled = int(self._current.labelled)
        return int(self._current.correct) / labelled if labelled else None

    def _add_domains(self, logits: Tensor, labels: Tensor, positions: Tensor) -> None:
        assert self._plan is not None
        ids = torch.from_numpy(self._plan.domain_ids)[positions]
        for domain_id in ids.unique().tolist():
            name, here = str(self._plan.domains[domain_id]), ids == domain_id
            statistics = self._domains.setdefault(name, PredictionStatistics(self.bins))
            statistics.update(logits[here], labels[here])

    def _clear(self) -> None:
        self.overall = PredictionStatistics(self.bins)
        self._current = self.overall
        self._segments: list[tuple[str, PredictionStatistics]] = []
        self._domains: dict[str, PredictionStatistics] = {}
        self._starts: list[tuple[str, int]] = []
        self._images, self._correct, self._labelled = array("q"), array("q"), array("q")
        self._entropy = array("d")
        self._plan = None
