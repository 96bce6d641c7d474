"""Scenarios: functions that put samples and domains in an order.

A scenario takes ``(subset, domains, rng)``: the sample indices to stream, the domains in the order
of the tables, and a random generator for whatever it shuffles. It returns a
:class:`~tta_lightning.data.plan.Plan`. A new scenario is one function and one line in
:data:`SCENARIOS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from tta_lightning.data.plan import Domain, Plan, Segment, concatenate

Indices: TypeAlias = NDArray[np.int64]
Scenario: TypeAlias = Callable[[Indices, Sequence[Domain], np.random.Generator], Plan]


def reset_each_shift(subset: Indices, domains: Sequence[Domain], rng: np.random.Generator) -> Plan:
    """One domain after the other, each shuffled; the model returns to the source before each.

    The setting of most published tables ("episodic over corruptions").
    """
    orders = [rng.permutation(subset) for _ in domains]
    return concatenate("reset_each_shift", orders, domains, reset=True)


def continual(subset: Indices, domains: Sequence[Domain], rng: np.random.Generator) -> Plan:
    """One domain after the other, each shuffled; the model is never reset (CoTTA's setting)."""
    orders = [rng.permutation(subset) for _ in domains]
    return concatenate("continual", orders, domains, reset=False)


def mixed_domains(subset: Indices, domains: Sequence[Domain], rng: np.random.Generator) -> Plan:
    """All samples of all domains in one shuffled segment, without a reset (SAR's mixed shifts)."""
    samples = np.tile(subset, len(domains))
    ids = np.repeat(np.arange(len(domains)), len(subset))
    order = rng.permutation(len(samples))
    segment = Segment("mixed", 0, len(samples), reset=False)
    return Plan("mixed_domains", samples[order], ids[order], tuple(domains), (segment,))


SCENARIOS: dict[str, Scenario] = {
    scenario.__name__: scenario for scenario in (reset_each_shift, continual, mixed_domains)
}
