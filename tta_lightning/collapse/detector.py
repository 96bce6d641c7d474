"""Whether an adapting model collapses: free suspicion first, then a forward pass of proof."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from tta_lightning.adapter import Adapter
from tta_lightning.collapse.evidence import (
    LEAST_IMAGES,
    LEAST_PROBES,
    Concentration,
    Detection,
    Gathered,
    Ints,
    Probes,
    Review,
    Window,
    check_options,
    read,
)
from tta_lightning.errors import unknown_name
from tta_lightning.snapshots import Snapshot, capture, restore

Action = Literal["warn", "reset", "rollback"]
REASONS = ("weights", "outputs", "concentration", "entropy", "drift")
LOOK_EVERY = 10  # batches from one look at the weights to the next


class CollapseDetector:
    """Watch a method adapt, tell when its model collapses, and take it back.

    **Suspicion** is free. Of the newest ``window`` predictions: they concentrate on few classes
    (:class:`Concentration`), or their mean entropy is very low or very high. Every 10 batches: the
    parameters are far from the source model's, or are not finite, which is a collapse by itself.

    **Evidence** is one forward pass on the probes, earlier images of the stream that were drawn
    evenly from those seen without suspicion, each with the label it got then. If the present model
    predicts them as diversely as they were predicted before, the stream is what is concentrated,
    not the model: it is cleared, and looked at again after a wait that doubles, at once if the
    predictions concentrate further. The model has collapsed if the concentration of the probes has
    risen by more than ``margin`` (times ``sqrt(probes / n)`` while there are only n), and is as
    much above that of the model that the action would go back to (else going back is no help).
    Where the labels that the probes got were concentrated themselves, the second alone is asked
    for, with twice the margin: a model can collapse before its probes were labelled.

    A stream that shows a single class from its start has probes of that class only, and nothing can
    be told by them. Nothing is watched where nothing accumulates: methods that are episodic, or
    neither move a tensor nor have a memory.

    **Action**: ``reset`` goes to the source model. ``rollback`` goes to the newest healthy
    snapshot: one is taken every ``window`` images without suspicion, at the next look at the
    weights, and counts once the next one is taken likewise. Where there is none, or after a
    rollback from which no new one became healthy, it goes to the source model.

    Batches of few images are gathered until there are 8, so that single images cost little.

    Memory: ``probes`` images (in the precision they come in: 38 MB for 64 of 224 px), two snapshots
    of what moves under ``rollback``, ``window`` numbers, and what a forward pass of as many images
    as there are probes takes.

    Args:
        action: ``warn`` (only tell), ``reset`` or ``rollback``.
        window: Number of newest predictions that are looked at.
        concentration: From which on they are suspicious, from 0 to 1.
        low: Mean entropy below which they are, as a fraction of ln C.
        high: Mean entropy above which they are, as a fraction of ln C.
        drift: Relative change of the parameters above which they are.
        margin: Rise of the concentration of the probes that is proof, from 0 to 1.
        probes: Number of earlier images that are kept.
        prior: Probability of each class in the stream; None for equal ones.
        seed: Of the drawing of probes.

    Raises:
        InputError: An option is not possible.
    """

    def __init__(
        self,
        action: Action = "rollback",
        window: int = 128,
        concentration: float = 0.5,
        low: float = 0.01,
        high: float = 0.995,
        drift: float = 0.25,
        margin: float = 0.2,
        probes: int = 64,
        prior: Sequence[float] | None = None,
        seed: int = 0,
    ) -> None:
        if action not in get_args(Action):
            raise unknown_name("action", action, get_args(Action))
        self.action, self.window, self.concentration = action, window, concentration
        self.low, self.high, self.drift, self.margin = low, high, drift, margin
        self.probes, self.seed = probes, seed
        self.prior = None if prior is None else [float(p) for p in prior]
        check_options(self)
        self.forward_context: Callable[[], AbstractContextManager[Any]] = nullcontext
        self.begin()

    def begin(self) -> None:
        """Forget everything, before a new stream."""
        self._adapter: Adapter | None = None
        self._window, self._probes = Window(self.window), Probes(self.probes, self.seed)
        self._scale: Concentration | None = None
        self._candidate: Snapshot | None = None
        self._healthy: Snapshot | None = None
        self._looked = 0  # number of batches at the last look at the weights
        self.images = self.batches = self.suspicions = self.evidence_passes = self.alarms = 0
        self.note_reset()

    def release(self) -> None:
        """Drop the model, the probes and the snapshots; the counts stay."""
        self._adapter = self._candidate = self._healthy = None
        self._probes.clear()
        self._gathered = Gathered()
        self.forward_context = nullcontext

    def note_reset(self) -> None:
        """Take note that the model is the source model again: only the probes are kept."""
        self._window.clear()
        self._gathered = Gathered()
        self._review = Review()
        self._candidate = self._healthy = None
        self._calm = self._since_snapshot = 0
        self._drift: float | None = None
        self._finite = True

    def after_update(self, adapter: Adapter, images: Tensor, logits: Tensor) -> Detection | None:
        """Observe a batch and, if the model has collapsed, act; see :meth:`observe`."""
        found = self.observe(adapter, images, logits)
        return None if found is None else self.act(adapter, found)

    def observe(self, adapter: Adapter, images: Tensor, logits: Tensor) -> Detection | None:
        """Take in a batch that was predicted and, where it was, learnt from.

        Args:
            adapter: The method, after its update; the same one in every call since :meth:`begin`.
            images: ``[B, 3, H, W]``, as they were given to it.
            logits: ``[B, C]`` that it returned for them.

        Returns:
            The collapse, if there is one; the model is as it was.
        """
        if not len(images) or logits.shape[1] < 2 or not self._accumulates(adapter):
            return None
        self.batches += 1
        self.images += len(images)
        if adapter.report.reset:  # these logits are of the model before
            self.note_reset()
            return None
        if (gathered := self._gathered.add(images, logits)) is None:
            return None
        images, logits = gathered
        labels, entropies, finite = read(logits)
        scale = self._scale_of(logits.shape[1])
        self._window.add(labels[finite], entropies[finite])
        looking = self.batches - self._looked >= LOOK_EVERY
        if looking or not finite.all():
            self._look(adapter)
        now = self._figures(scale)
        reasons = self._reasons(now, bool(finite.all()))
        found, admitted = None, not reasons
        if not reasons:
            self._stay_calm(adapter, len(images), looking)
        else:
            found, admitted = self._suspect(adapter, images, scale, now, reasons)
        if admitted or (found is None and len(self._probes.labels) < LEAST_PROBES):
            rows = finite.nonzero()[0]
            some = images if len(rows) == len(images) else images[torch.from_numpy(rows)]
            self._probes.offer(some, labels[rows])
        return found

    def act(self, adapter: Adapter, found: Detection) -> Detection:
        """Do what :attr:`action` says about a collapse; return it with what was done."""
        if self.action == "warn":
            self._window.clear()
            return replace(found, action="warn")
        report = adapter.report
        went_to = self._go_back(adapter)
        adapter.report = report  # what the step did stays true
        self.note_reset()
        return replace(found, action=self.action, went_to=went_to)

    def summary(self) -> dict[str, int]:
        """Return the counts: alarms, suspicious batches, evidence passes."""
        return {
            "alarms": self.alarms,
            "suspicions": self.suspicions,
            "evidence_passes": self.evidence_passes,
        }

    # Suspicion -----------------------------------------------------------------------------------

    def _accumulates(self, adapter: Adapter) -> bool:
        if adapter is not self._adapter:
            self._adapter = adapter
            self._moves = bool(adapter.moving_tensors())
        return not adapter.episodic and (self._moves or bool(adapter.memory))

    def _scale_of(self, classes: int) -> Concentration:
        if self._scale is None or self._scale.classes != classes:
            if self._scale is not None:  # labels of other classes
                self._window.clear()
                self._probes.clear()
            self._scale = Concentration(classes, self.prior)
        return self._scale

    def _look(self, adapter: Adapter) -> None:
        """Measure drift and finiteness of what moves, by two numbers from the device."""
        self._looked = self.batches
        source = adapter._source or {}
        moving = adapter.moving_tensors()
        floating = [t for t in moving.values() if t.is_floating_point() and t.numel()]
        self._finite = bool(_lengths(floating, math.inf).isfinite().all())
        names = [f"network.{name}" for name in adapter.adapted_parameters]
        if not names or not self._finite:
            return
        with torch.no_grad():
            before = [source[name].to(moving[name]) for name in names]
            apart = torch._foreach_sub([moving[name] for name in names], before)
            change = _lengths(list(apart)).norm() / _lengths(before).norm().clamp_min(1e-12)
            most = torch.finfo(torch.float32).max  # of lengths that overflow: JSON has no infinity
            self._drift = float(change.nan_to_num(nan=most, posinf=most))

    def _figures(self, scale: Concentration) -> Detection:
        """Gather the figures of now; without a reason yet."""
        now = Detection("", self.images, drift=self._drift)
        count = len(self._window.labels)
        if count < LEAST_IMAGES:
            return now
        entropy = float(self._window.entropies.sum()) / count / math.log(scale.classes)
        return replace(now, concentration=scale(self._window.labels), entropy=entropy)

    def _reasons(self, now: Detection, outputs_finite: bool) -> list[str]:
        known = now.entropy is not None and now.concentration is not None
        holds = (
            not self._finite,
            not outputs_finite,
            known and (now.concentration or 0.0) >= self.concentration,
            known and not self.low <= (now.entropy or 0.0) <= self.high,
            now.drift is not None and now.drift > self.drift,
        )
        return [reason for reason, it_holds in zip(REASONS, holds, strict=True) if it_holds]

    def _stay_calm(self, adapter: Adapter, images: int, looking: bool) -> None:
        self._calm += images
        self._since_snapshot += images
        if self._calm >= self.window:
            self._review = Review()
        if self.action != "rollback" or self._since_snapshot < self.window or not looking:
            return
        self._since_snapshot = 0
        self._healthy = self._candidate or self._healthy
        self._candidate = None  # two at most, also while the next is taken
        self._candidate = capture(adapter)

    # Evidence ------------------------------------------------------------------------------------

    def _suspect(
        self,
        adapter: Adapter,
        images: Tensor,
        scale: Concentration,
        now: Detection,
        reasons: list[str],
    ) -> tuple[Detection | None, bool]:
        """Ask for evidence if it is due; return the collapse, and whether the model was cleared."""
        self.suspicions += 1
        self._calm = self._since_snapshot = 0
        self._candidate = None
        if not self._review.is_due(self.images, reasons, now.concentration):
            return None, False
        if "weights" in reasons:
            found, collapsed = replace(now, reason="weights"), True
        else:
            probes = self._probes.of_size(images)
            if probes is None:
                return None, False
            found = replace(now, reason="+".join(reasons), probes=len(probes))
            try:
                found, collapsed = self._prove(adapter, probes, scale, found)
            except torch.OutOfMemoryError:  # a guard is no reason for a run to end
                warnings.warn(
                    f"{len(probes)} probes do not fit into the memory for a forward pass, so "
                    "whether the model has collapsed is not known. Set `probes` lower.",
                    stacklevel=2,
                )
                self._review.postpone(self.images, self.window, reasons, now.concentration)
                return None, False
        level = now.concentration
        if collapsed:  # where nothing is done about it, only time asks again
            reasons, level = list(REASONS), 1.0
        self._review.postpone(self.images, self.window, reasons, level)
        self.alarms += collapsed
        return (found, False) if collapsed else (None, True)

    def _prove(
        self, adapter: Adapter, probes: Tensor, scale: Concentration, found: Detection
    ) -> tuple[Detection, bool]:
        """Fill in what the probes ``[n, 3, H, W]`` tell, and say whether that is a collapse."""
        self.evidence_passes += 1
        labels = self._ask(adapter, probes)
        if labels is None:
            return found, True
        before, now = scale(self._probes.labels), scale(labels)
        found = replace(found, probes_before=before, probes_now=now)
        margin = self.margin * math.sqrt(self.probes / len(probes))  # fewer probes are noisier
        risen = now - before > margin
        if not risen and before < self.concentration:
            return found, False
        labels = self._ask_behind(adapter, probes)
        if labels is None or len(labels) < len(probes):
            return found, False
        behind = scale(labels)
        found = replace(found, probes_behind=behind)
        if now - behind <= (margin if risen else 2 * margin):
            return found, False
        if not risen:  # the labels that they had are of the collapsed model
            self._probes.labels = labels
        return found, True

    def _ask_behind(self, adapter: Adapter, probes: Tensor) -> Ints | None:
        """Predict the probes by the model to go back to; the adapter is left as it was, exactly."""
        kept, report = capture(adapter), adapter.report
        try:
            self._go_back(adapter)
            return self._ask(adapter, probes)
        finally:
            restore(adapter, kept)
            adapter.report = report

    def _go_back(self, adapter: Adapter) -> str:
        """Bring the adapter to where the action leads; return ``snapshot`` or ``source``."""
        if self.action == "rollback" and self._healthy is not None:
            restore(adapter, self._healthy)
            return "snapshot"
        adapter.reset()
        return "source"

    def _ask(self, adapter: Adapter, probes: Tensor) -> Ints | None:
        """Predict the probes ``[n, 3, H, W]``; None where half of that or more is not finite."""
        report = adapter.report
        cuda = [probes.device] if probes.is_cuda else []
        with torch.random.fork_rng(cuda), torch.no_grad(), self.forward_context():
            labels, _, finite = read(adapter.forward(probes))
        adapter.report = report
        return labels[finite] if 2 * finite.sum() > len(labels) else None

    # State ---------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return all that later decisions depend on, as tensors and plain values."""
        return {
            **self.summary(),
            **{"images": self.images, "batches": self.batches, "calm": self._calm},
            **{"since_snapshot": self._since_snapshot, "drift": self._drift},
            **{"looked": self._looked, "gathered": self._gathered.state_dict()},
            **{"finite": self._finite, "review": asdict(self._review)},
            "classes": None if self._scale is None else self._scale.classes,
            **{"window": self._window.state_dict(), "probes": self._probes.state_dict()},
            **{"candidate": self._candidate, "healthy": self._healthy},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as the detector that :meth:`state_dict` was asked of, which had equal options."""
        self.begin()
        self.alarms, self.suspicions = state["alarms"], state["suspicions"]
        self.evidence_passes = state["evidence_passes"]
        self.images, self.batches, self._calm = state["images"], state["batches"], state["calm"]
        self._since_snapshot, self._drift = state["since_snapshot"], state["drift"]
        self._looked = state["looked"]
        self._gathered.load_state_dict(state["gathered"])
        self._finite, self._review = state["finite"], Review(**state["review"])
        if state["classes"] is not None:
            self._scale = Concentration(state["classes"], self.prior)
        self._window.load_state_dict(state["window"])
        self._probes.load_state_dict(state["probes"])
        self._candidate, self._healthy = state["candidate"], state["healthy"]


def _lengths(tensors: list[Tensor], order: float = 2.0) -> Tensor:
    """Return the norm of each of N tensors, ``[N]`` in float32, by few kernels."""
    if not tensors:
        return torch.zeros(0)
    with torch.no_grad():
        norms = torch._foreach_norm(tensors, order)
        return torch.stack([norm.float() for norm in norms])
