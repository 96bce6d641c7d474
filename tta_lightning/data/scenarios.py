"""Scenarios: functions that put samples and domains in an order.

A scenario is called as ``scenario(subset, labels, domains, rng, **options)``: the sample indices to
stream ``[N]``, their labels ``[N]`` (-1 where unknown), the domains in the order of the tables, and
a random generator for whatever it shuffles. Its options are keyword-only numbers with a default. It
returns a :class:`~tta_lightning.data.plan.Plan`. Labels may decide the order and nothing else: a
plan holds none. A new scenario is one function and one line in :data:`SCENARIOS`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from tta_lightning.data.plan import Domain, Plan, Segment, concatenate
from tta_lightning.errors import InputError, unknown_name

Indices: TypeAlias = NDArray[np.int64]
Labels: TypeAlias = NDArray[np.int64]
Scenario: TypeAlias = Callable[..., Plan]


def reset_each_shift(
    subset: Indices, labels: Labels, domains: Sequence[Domain], rng: np.random.Generator
) -> Plan:
    """One domain after the other, each shuffled; the model returns to the source before each.

    The setting of most published tables ("episodic over corruptions").
    """
    orders = [rng.permutation(subset) for _ in domains]
    return concatenate("reset_each_shift", orders, domains, reset=True)


def continual(
    subset: Indices, labels: Labels, domains: Sequence[Domain], rng: np.random.Generator
) -> Plan:
    """One domain after the other, each shuffled; the model is never reset (CoTTA's setting)."""
    orders = [rng.permutation(subset) for _ in domains]
    return concatenate("continual", orders, domains, reset=False)


def mixed_domains(
    subset: Indices, labels: Labels, domains: Sequence[Domain], rng: np.random.Generator
) -> Plan:
    """All samples of all domains in one shuffled segment, without a reset (SAR's mixed shifts)."""
    samples = np.tile(subset, len(domains))
    ids = np.repeat(np.arange(len(domains)), len(subset))
    order = rng.permutation(len(samples))
    segment = Segment("mixed", 0, len(samples), reset=False)
    return Plan("mixed_domains", samples[order], ids[order], tuple(domains), (segment,))


def label_shift(
    subset: Indices,
    labels: Labels,
    domains: Sequence[Domain],
    rng: np.random.Generator,
    *,
    imbalance_ratio: float = 500_000,
) -> Plan:
    """One domain after the other, each passing through the classes; a reset before each.

    The online imbalanced label shift of SAR: "Towards Stable Test-Time Adaptation in Dynamic Wild
    World", Niu et al., ICLR 2023, https://arxiv.org/abs/2302.12400. The stream has one stretch of
    time for each of its C classes, in a random order. In the time of class t

        P(y = t) = q_max = r / (r + C - 1),    P(y = c) = q_min = 1 / (r + C - 1) for c != t

    with r = q_max / q_min the imbalance ratio. r = 1 is a shuffled stream, r = inf one class after
    the other. To have each sample once, samples choose their time, instead of times their samples:
    a sample falls to the time of its own class with probability q_max and to that of each other
    class with q_min, and each time is shuffled. Seen from a time, classes of equal size have the
    probabilities above.

    Departs from the published code in:

    * It draws 100,000 samples with replacement from 50,000; here each sample comes exactly once.
    * The time of a class is as long as the number of samples that fall to it; there all are equally
      long. Of classes with n samples each, it is n on average.
    * Where classes differ in size, r is how much likelier each *sample* of class t is than any
      other sample. There it is the class, whose few samples are then repeated.
    * Each domain has an order of its own; there one list of samples serves all domains.

    Args:
        subset: ``[N]``, the samples to stream.
        labels: ``[N]``, their classes.
        domains: In the order of the stream.
        rng: Decides the order of classes and samples.
        imbalance_ratio: r, from 1 to ``inf``.

    Returns:
        The plan, one segment a domain.

    Raises:
        InputError: A label is unknown, or the ratio is below 1 or not a number.
    """
    if not imbalance_ratio >= 1:  # also true of NaN
        raise InputError(
            f"imbalance_ratio = {imbalance_ratio}: expected 1 (a shuffled stream) or more, up to "
            "inf (one class after the other)."
        )
    unknown = int((labels < 0).sum())
    if unknown:
        raise InputError(
            f"label_shift orders images by their class, but {unknown} of {len(labels)} have no "
            "label. Use a source with labels for all images, or another scenario."
        )
    classes, own = np.unique(labels, return_inverse=True)
    orders = [subset[_label_shift_order(own, len(classes), imbalance_ratio, rng)] for _ in domains]
    return concatenate("label_shift", orders, domains, reset=True)


def _label_shift_order(
    own: NDArray[np.intp], classes: int, ratio: float, rng: np.random.Generator
) -> NDArray[np.intp]:
    """Return positions ``[N]`` of samples whose classes ``[N]`` are 0 to ``classes - 1``."""
    q_min = 1 / (ratio + classes - 1)
    # Any time, the own one included, with C q_min and else the own: q_min each, q_max the own.
    strays = rng.random(len(own)) < classes * q_min
    own_time = rng.permutation(classes)[own]
    time = np.where(strays, rng.integers(classes, size=len(own)), own_time)
    return np.lexsort((rng.permutation(len(own)), time))  # by time, at random within one


SCENARIOS: dict[str, Scenario] = {
    scenario.__name__: scenario
    for scenario in (reset_each_shift, continual, mixed_domains, label_shift)
}


def complete_options(scenario: str, given: Mapping[str, float] | None) -> dict[str, float]:
    """Return all options of a scenario: those given, and the defaults of the others.

    Args:
        scenario: A name in :data:`SCENARIOS`.
        given: Option name to value; None for none.

    Raises:
        InputError: The scenario has no option of a name that is given.
    """
    parameters = inspect.signature(SCENARIOS[scenario]).parameters.values()
    known = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    for name in given or {}:
        if name in known:
            continue
        if not known:
            raise InputError(
                f"Scenario {scenario} has no options, but scenario_options names {name!r}. Leave "
                "it out, or choose the scenario that it belongs to."
            )
        raise unknown_name(f"option of {scenario}", name, known)
    return {**known, **(given or {})}
