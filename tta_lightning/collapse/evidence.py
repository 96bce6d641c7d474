"""What a collapse is told by: concentrated labels, and earlier images to ask about."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tta_lightning.errors import InputError

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

GROUP = 8  # images that are looked at together, at least
LEAST_IMAGES = 32  # in the window before its figures count
LEAST_PROBES = 16  # fewer are no evidence
LONGEST_WAIT = 16  # windows from one evidence pass to the next, at most
RISE = 0.15  # of the concentration above what was cleared, that is looked at without waiting


@dataclass(frozen=True)
class Detection:
    """A collapse, with the figures it was told by.

    Attributes:
        reason: What made it: ``weights`` (not finite), or what was suspicious when the probes
            proved it: ``outputs`` (not finite), ``concentration``, ``entropy`` or ``drift``, or
            several of them joined by ``+``.
        images: Number of images that the detector had seen, this batch included.
        concentration: Of the predictions of the window: 0 as the prior has it, 1 a single class.
        entropy: Mean of the window as a fraction of ln C.
        drift: Length of the change of the parameters over the length of the parameters.
        probes: Number of earlier images that were predicted again; 0 for none.
        probes_before: Concentration of the labels that they got when they were seen.
        probes_now: Concentration of the labels that the present model gives them.
        probes_behind: Concentration of the labels of the model that would be gone back to.
        action: What was done: ``warn``, ``reset`` or ``rollback``; empty for nothing yet.
        went_to: ``source`` or ``snapshot``, where the model was taken back; else empty.
    """

    reason: str
    images: int
    concentration: float | None = None
    entropy: float | None = None
    drift: float | None = None
    probes: int = 0
    probes_before: float | None = None
    probes_now: float | None = None
    probes_behind: float | None = None
    action: str = ""
    went_to: str = ""

    def __str__(self) -> str:
        shown = {"concentration": self.concentration, "entropy / ln C": self.entropy}
        shown |= {"drift": self.drift, "probes before": self.probes_before}
        shown |= {"probes now": self.probes_now, "of the model to go back to": self.probes_behind}
        figures = ", ".join(f"{n} {v:.3g}" for n, v in shown.items() if v is not None)
        told = f"{self.reason}: {figures}" if figures else self.reason
        return f"the model collapsed after {self.images} images ({told})"


class Concentration:
    """How far labels are from what a prior would draw, on a scale of 0 to 1.

    ``(KL(h || prior) - chance) / (KL of the likeliest class alone - chance)``, where h is the
    histogram of n labels and ``chance`` the exact expectation of the divergence over n draws from
    the prior: each count is binomial, and the expectation of a sum is the sum of expectations.

    Args:
        classes: C.
        prior: ``[C]`` probabilities; None for equal ones.

    Raises:
        InputError: The prior is not one of C classes, has a zero, or is almost a single class.
    """

    def __init__(self, classes: int, prior: Sequence[float] | None = None) -> None:
        given = np.full(classes, 1 / classes) if prior is None else np.asarray(prior, float)
        if len(given) != classes:
            raise InputError(
                f"The prior has {len(given)} classes, but the model predicts {classes}. Give one "
                "probability a class, or none for equal ones."
            )
        self.classes = classes
        self.log_prior: Floats = np.log(given)
        self._chance: dict[int, float] = {}

    def __call__(self, labels: Ints) -> float:
        """Return the concentration of labels ``[n]``, n from 1; below 0 is evener than chance."""
        count = len(labels)
        histogram = np.bincount(labels, minlength=self.classes)
        seen = histogram.nonzero()[0]
        share = histogram[seen] / count
        divergence = float((share * (np.log(share) - self.log_prior[seen])).sum())
        chance = self._chance.get(count)
        if chance is None:
            chance = self._chance[count] = self._expected(count)
        single = -float(self.log_prior.max())
        return min((divergence - chance) / max(single - chance, 1e-9), 1.0)

    def _expected(self, count: int) -> float:
        log_p, classes = np.unique(self.log_prior, return_counts=True)
        k = np.arange(1, count + 1)
        log_factorial = np.concatenate([[0.0], np.log(k).cumsum()])
        choose = log_factorial[-1] - log_factorial[k] - log_factorial[count - k]
        log_q = np.log1p(-np.exp(log_p).clip(max=1 - 1e-12))[:, None]
        probability = np.exp(choose + k * log_p[:, None] + (count - k) * log_q)
        terms = probability * (k / count) * (np.log(k / count) - log_p[:, None])
        return float(classes @ terms.sum(axis=1))


class Window:
    """Labels and entropies (in nats) of the newest predictions."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.clear()

    def clear(self) -> None:
        """Empty it."""
        self.labels: Ints = np.empty(0, np.int64)
        self.entropies: Floats = np.empty(0)

    def add(self, labels: Ints, entropies: Floats) -> None:
        """Take in the predictions of a batch, and let go of the oldest."""
        self.labels = np.concatenate([self.labels, labels])[-self.size :]
        self.entropies = np.concatenate([self.entropies, entropies])[-self.size :]

    def state_dict(self) -> dict[str, Tensor]:
        """Return what is in it."""
        return {
            "labels": torch.from_numpy(self.labels.copy()),
            "entropies": torch.from_numpy(self.entropies.copy()),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take what :meth:`state_dict` returned."""
        self.labels, self.entropies = state["labels"].numpy(), state["entropies"].numpy()


class Gathered:
    """Images ``[n, 3, H, W]`` and logits ``[n, C]`` of batches too small to be looked at."""

    def __init__(self) -> None:
        self.batches: list[tuple[Tensor, Tensor]] = []

    def add(self, images: Tensor, logits: Tensor) -> tuple[Tensor, Tensor] | None:
        """Take in a batch; once there are enough images, return and forget them.

        Images of another size, or logits of other classes, than those before replace them.
        """
        if len(images) >= GROUP and not self.batches:
            return images, logits
        if self.batches:
            last_images, last_logits = self.batches[-1]
            sizes = (last_images.shape[1:], last_logits.shape[1:])
            if sizes != (images.shape[1:], logits.shape[1:]):
                self.batches = []
        self.batches.append((images.detach().clone(), logits.detach()))
        if sum(len(each) for each, _ in self.batches) < GROUP:
            return None
        device = images.device  # a loaded state is where it was saved
        images, logits = (
            torch.cat([part.to(device) for part in each])
            for each in zip(*self.batches, strict=True)
        )
        self.batches = []
        return images, logits

    def state_dict(self) -> list[list[Tensor]]:
        """Return the batches."""
        return [list(batch) for batch in self.batches]

    def load_state_dict(self, state: Sequence[Sequence[Tensor]]) -> None:
        """Take what :meth:`state_dict` returned."""
        self.batches = [(images, logits) for images, logits in state]


class Probes:
    """A reservoir: every image offered so far is in it with the same probability."""

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.generator = np.random.default_rng(seed)
        self.clear()

    def clear(self) -> None:
        """Empty it; the drawing goes on."""
        self.images: Tensor | None = None
        self.labels: Ints = np.empty(0, np.int64)
        self.offered = 0

    def offer(self, images: Tensor, labels: Ints) -> None:
        """Take in images ``[B, 3, H, W]`` with their labels; those of another size start anew."""
        if self.images is None or self.images.shape[1:] != images.shape[1:]:
            self.clear()
            self.images = images.new_empty((self.size, *images.shape[1:]))
        self.images = self.images.to(images.device)  # a loaded state is where it was saved
        numbers = range(self.offered, self.offered + len(labels))
        drawn = self.generator.integers(0, np.arange(numbers.start, numbers.stop) + 1).tolist()
        kept: dict[int, int] = {}  # place among the probes to row of the batch
        for row, (number, place) in enumerate(zip(numbers, drawn, strict=True)):
            if min(number, place) < self.size:
                kept[number if number < self.size else place] = row
        self.offered += len(labels)
        if not kept:
            return
        slots, rows = list(kept), list(kept.values())
        taken = images.detach()
        for slot, row in kept.items():  # few: faster than an indexed copy
            self.images[slot].copy_(taken[row])
        grown = np.zeros(min(self.offered, self.size), np.int64)
        grown[: len(self.labels)] = self.labels
        grown[slots] = labels[rows]
        self.labels = grown

    def of_size(self, images: Tensor) -> Tensor | None:
        """Return the probes ``[n, 3, H, W]`` if there are enough of the size of these images."""
        few = self.images is None or len(self.labels) < LEAST_PROBES
        if few or self.images is None or self.images.shape[1:] != images.shape[1:]:
            return None
        return self.images[: len(self.labels)].to(images.device)

    def state_dict(self) -> dict[str, Any]:
        """Return the images that are held, their labels, and where the drawing stands."""
        held = None if self.images is None else self.images[: len(self.labels)].clone()
        return {
            "images": held,
            "labels": torch.from_numpy(self.labels.copy()),
            "offered": self.offered,
            "generator": self.generator.bit_generator.state,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what :meth:`state_dict` returned."""
        held: Tensor | None = state["images"]
        self.clear()
        if held is not None:
            self.images = held.new_empty((self.size, *held.shape[1:]))
            self.images[: len(held)] = held
        self.labels, self.offered = state["labels"].numpy().copy(), state["offered"]
        self.generator.bit_generator.state = state["generator"]


@dataclass
class Review:
    """When to ask for evidence again. Images are counted as the detector sees them."""

    wait: int = 0
    due: int = 0
    cleared: str = ""
    concentration: float = -math.inf

    def is_due(self, images: int, reasons: list[str], concentration: float | None) -> bool:
        """Whether suspicion is new, has grown, or has waited long enough."""
        news = not set(reasons) <= set(self.cleared.split("+"))
        risen = concentration is not None and concentration >= self.concentration + RISE
        return news or risen or images >= self.due

    def postpone(
        self, images: int, window: int, reasons: list[str], concentration: float | None
    ) -> None:
        """Ask again after twice the wait, in images: a window at first."""
        self.wait = min(max(2 * self.wait, window), LONGEST_WAIT * window)
        self.due = images + self.wait
        self.cleared = "+".join(sorted({*filter(None, self.cleared.split("+")), *reasons}))
        if concentration is not None:
            self.concentration = concentration


def check_prior(prior: Sequence[float]) -> None:
    """Refuse what is no prior, or one by which nothing can be told.

    Raises:
        InputError: A probability is not above 0, one is above 0.9, or they do not sum to 1.
    """
    if not all(p > 0 for p in prior) or not abs(sum(prior) - 1) < 1e-3:
        raise InputError(
            "The prior must hold one probability above 0 for each class, and they must sum to 1. "
            "Give a class that hardly comes a small one, such as 0.001."
        )
    if max(prior) > 0.9:
        raise InputError(
            f"The prior gives one class {max(prior)}: predictions of one class alone are no sign "
            "of a collapse there. Expected no probability above 0.9."
        )


def read(logits: Tensor) -> tuple[Ints, Floats, NDArray[np.bool_]]:
    """Bring labels, entropies in nats and finiteness, each ``[B]``, to the host at once."""
    z = logits.detach().float().cpu().numpy()
    finite = np.isfinite(z).all(axis=1)
    if not finite.all():
        z = np.where(finite[:, None], z, 0.0)
    labels = z.argmax(axis=1)
    z = z - z.max(axis=1, keepdims=True)
    weight = np.exp(z)
    total = weight.sum(axis=1)
    return labels, np.log(total) - (z * weight).sum(axis=1) / total, finite


def check_options(options: Any) -> None:
    """Refuse options of a detector that are out of range.

    Raises:
        InputError: Names the option.
    """
    o = options
    whole = {"window": (o.window, LEAST_IMAGES), "probes": (o.probes, LEAST_PROBES)}
    for name, (value, least) in whole.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InputError(f"{name} = {value}: expected a whole number from {least} on.")
    fractions = {"concentration": o.concentration, "low": o.low, "high": o.high, "margin": o.margin}
    for name, fraction in fractions.items():
        if not 0 <= fraction <= 1:
            raise InputError(f"{name} = {fraction}: expected a number from 0 to 1.")
    if not o.low < o.high:
        raise InputError(f"low = {o.low} is not below high = {o.high}: expected low < high.")
    if not o.drift > 0:
        raise InputError(f"drift = {o.drift}: expected a number above 0.")
    if o.prior is not None:
        check_prior(o.prior)
