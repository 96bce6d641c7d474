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
from dataclasses import replace
from functools import partial
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from tta_lightning.data.orders import dirichlet_order, label_shift_order
from tta_lightning.data.plan import Domain, Plan, Segment, concatenate
from tta_lightning.errors import InputError, unknown_name

Indices: TypeAlias = NDArray[np.int64]
Labels: TypeAlias = NDArray[np.int64]
Scenario: TypeAlias = Callable[..., Plan]

MOST_ROUNDS = 10_000  # each visit to a domain has figures of its own in memory
MOST_WINDOW = 1_000_000  # images that are predicted together
MOST_DELTA = 1_000_000  # shares that are equal to 1 in 1,000; far larger ones overflow their sum


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
    order = rng.permutation(len(subset) * len(domains))
    return _one_segment("mixed_domains", subset, domains, order)


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
            f"imbalance_ratio = {_shown(imbalance_ratio)}: expected 1 (a shuffled stream) or more, "
            "up to inf (one class after the other)."
        )
    own, classes = _own_classes("label_shift", labels)
    orders = [subset[label_shift_order(own, classes, imbalance_ratio, rng)] for _ in domains]
    return concatenate("label_shift", orders, domains, reset=True)


def correlated(
    subset: Indices,
    labels: Labels,
    domains: Sequence[Domain],
    rng: np.random.Generator,
    *,
    delta: float = 0.1,
) -> Plan:
    """One domain after the other, without a reset, each with neighbours of the same classes.

    The practical test-time adaptation of RoTTA: "Robust Test-Time Adaptation in Dynamic Scenarios",
    Yuan et al., CVPR 2023, https://arxiv.org/abs/2303.13899; its sampler is that of NOTE, Gong et
    al., NeurIPS 2022, https://arxiv.org/abs/2208.05117. Time has S = min(C, 100) slots; class c is
    shared out over them by ``p_c ~ Dirichlet(delta, ..., delta)``, and a slot plays its classes one
    after the other: see :func:`~tta_lightning.data.orders.dirichlet_order`. A small delta puts a
    class into few slots. A large one is no shuffle: every slot then holds a run of each class.

    Departs from the published code in:

    * The samples of a class are shuffled before they are cut and within their slot; there they keep
      the order of the file.
    * Batches end with their domain; there one batch may hold the end of one and the start of the
      next.

    Args:
        subset: ``[N]``, the samples to stream.
        labels: ``[N]``, their classes.
        domains: In the order of the stream.
        rng: Decides all shares and orders; each domain draws its own.
        delta: Concentration, above 0 and up to 1,000,000.

    Returns:
        The plan, one segment a domain.

    Raises:
        InputError: A label is unknown, or delta is out of range.
    """
    order = _dirichlet("correlated", labels, delta, rng)
    return concatenate("correlated", [subset[order()] for _ in domains], domains, reset=False)


def gradual(
    subset: Indices, labels: Labels, domains: Sequence[Domain], rng: np.random.Generator
) -> Plan:
    """Each corruption grows and wanes, severity 1, 2, ..., top, ..., 2, 1, without a reset.

    The gradual setting of CoTTA: "Continual Test-Time Domain Adaptation", Wang et al., CVPR 2022,
    https://arxiv.org/abs/2203.13591. The top is the severity of the domain that is given; every
    sample comes once at every step, newly shuffled.

    Raises:
        InputError: A domain is the clean image, which has no severity.
    """
    steps = _up_and_down("gradual", domains)
    return concatenate("gradual", [rng.permutation(subset) for _ in steps], steps, reset=False)


def gradual_correlated(
    subset: Indices,
    labels: Labels,
    domains: Sequence[Domain],
    rng: np.random.Generator,
    *,
    delta: float = 0.1,
) -> Plan:
    """:func:`gradual`, every step of it in the order of :func:`correlated`.

    Raises:
        InputError: A domain is the clean image, a label is unknown, or delta is out of range.
    """
    steps = _up_and_down("gradual_correlated", domains)
    order = _dirichlet("gradual_correlated", labels, delta, rng)
    return concatenate("gradual_correlated", [subset[order()] for _ in steps], steps, reset=False)


def mixed_domains_correlated(
    subset: Indices,
    labels: Labels,
    domains: Sequence[Domain],
    rng: np.random.Generator,
    *,
    delta: float = 0.1,
) -> Plan:
    """All samples of all domains in one segment without a reset, in the order of their classes.

    The draw of :func:`correlated` over all pairs of a sample and a domain: neighbours share their
    class and differ in their domain.

    Raises:
        InputError: A label is unknown, or delta is out of range.
    """
    order = _dirichlet("mixed_domains_correlated", np.tile(labels, len(domains)), delta, rng)
    return _one_segment("mixed_domains_correlated", subset, domains, order())


def recurring(
    subset: Indices,
    labels: Labels,
    domains: Sequence[Domain],
    rng: np.random.Generator,
    *,
    rounds: float = 20,
) -> Plan:
    """All domains again and again in the same order, without a reset, each visit newly shuffled.

    The recurring setting of PeTTA: "Persistent Test-time Adaptation in Recurring Testing
    Scenarios", Hoang et al., NeurIPS 2024, https://arxiv.org/abs/2311.18193, with 20 visits; there
    a visit has the order of :func:`correlated`. CoTTA goes through the corruptions of ImageNet-C 10
    times.

    Raises:
        InputError: ``rounds`` is not a whole number from 1 on.
    """
    visits = [*domains] * _whole("rounds", rounds, MOST_ROUNDS)
    orders = [rng.permutation(subset) for _ in visits]
    return concatenate("recurring", orders, visits, reset=False)


def single_sample(
    subset: Indices, labels: Labels, domains: Sequence[Domain], rng: np.random.Generator
) -> Plan:
    """:func:`reset_each_shift` one by one: each sample is predicted and learnt from by itself.

    The batch size 1 of SAR (Niu et al., ICLR 2023, https://arxiv.org/abs/2302.12400).
    """
    plan = reset_each_shift(subset, labels, domains, rng)
    return replace(plan, scenario="single_sample", batch_size=1)


def sliding_window(
    subset: Indices,
    labels: Labels,
    domains: Sequence[Domain],
    rng: np.random.Generator,
    *,
    window: float = 64,
) -> Plan:
    """:func:`reset_each_shift` one by one, but seen and learnt from together with those before.

    Each sample is predicted within a batch of itself and the last ``window - 1`` samples of its
    segment. Once every ``window`` samples, when all of that batch is new, the model learns from it.
    The single-sample setting of the public benchmark of Marsden and Döbler,
    https://github.com/mariodoebler/test-time-adaptation.

    Departs from the published code in:

    * The window is empty after a reset; there it still holds images of the corruption before.
    * A network without batch normalisation, too, predicts within the window, since methods may
      depend on the batch; there it is given the newest image alone, unless it learns.

    What is left at the end of a segment is predicted and not learnt from. A method that learns from
    each image by itself gets the newest one alone.

    Raises:
        InputError: ``window`` is not a whole number from 1 on.
    """
    plan = reset_each_shift(subset, labels, domains, rng)
    size = _whole("window", window, MOST_WINDOW)
    return replace(plan, scenario="sliding_window", batch_size=1, window=size)


def episodic(
    subset: Indices, labels: Labels, domains: Sequence[Domain], rng: np.random.Generator
) -> Plan:
    """:func:`reset_each_shift`, and the model returns to the source before every batch as well.

    The episodic setting of Tent and of MEMO (Zhang, Levine, Finn, NeurIPS 2022,
    https://arxiv.org/abs/2110.09506). A method that predicts before its update never shows what it
    learnt here: Tent predicts what batch statistics alone do.
    """
    plan = reset_each_shift(subset, labels, domains, rng)
    return replace(plan, scenario="episodic", reset_each_batch=True)


def _one_segment(
    scenario: str, subset: Indices, domains: Sequence[Domain], order: NDArray[np.intp]
) -> Plan:
    """Put the pairs of a sample and a domain, listed domain by domain, in an order ``[N D]``."""
    samples = np.tile(subset, len(domains))
    ids = np.repeat(np.arange(len(domains)), len(subset))
    segment = Segment("mixed", 0, len(samples), reset=False)
    return Plan(scenario, samples[order], ids[order], tuple(domains), (segment,))


def _up_and_down(scenario: str, domains: Sequence[Domain]) -> list[Domain]:
    """Return the steps of each domain's corruption to its severity and back."""
    clean = [str(domain) for domain in domains if domain.severity == 0]
    if clean:
        raise InputError(
            f"{scenario} raises and lowers the severity of each corruption, but {clean[0]!r} is "
            "the image as it is. Give corruptions without it, or choose another scenario."
        )
    return [
        Domain(domain.corruption, severity)
        for domain in domains
        for severity in (*range(1, domain.severity), *range(domain.severity, 0, -1))
    ]


def _own_classes(scenario: str, labels: Labels) -> tuple[NDArray[np.intp], int]:
    """Number the classes that occur: that of each sample ``[N]``, and how many there are."""
    unknown = int((labels < 0).sum())
    if unknown:
        raise InputError(
            f"{scenario} orders images by their class, but {unknown} of {len(labels)} have no "
            "label. Use a source with labels for all images, or another scenario."
        )
    classes, own = np.unique(labels, return_inverse=True)
    return own, len(classes)


def _dirichlet(
    scenario: str, labels: Labels, delta: float, rng: np.random.Generator
) -> Callable[[], NDArray[np.intp]]:
    """Return what draws one order of the samples after the other."""
    if not 0 < delta <= MOST_DELTA:  # also true of NaN
        raise InputError(
            f"delta = {_shown(delta)}: expected a number above 0 (small: each class in few "
            f"stretches of the stream) and up to {MOST_DELTA:,} (each class evenly in all of them)."
        )
    own, classes = _own_classes(scenario, labels)
    return partial(dirichlet_order, own, classes, delta, rng)


def _whole(name: str, value: float, most: int) -> int:
    if value < 1 or not float(value).is_integer():
        raise InputError(f"{name} = {_shown(value)}: expected a whole number from 1 on.")
    if value > most:
        raise InputError(f"{name} = {_shown(value)}: expected at most {most:,}.")
    return int(value)


def _check_number(name: str, value: float) -> None:
    try:
        float(value)
    except (TypeError, ValueError, OverflowError):  # the last one of huge integers
        raise InputError(
            f"scenario_options.{name} = {str(value)[:40]}: expected a number that a float can hold."
        ) from None


def _shown(value: float) -> float:
    """Make an int of a whole number, which is then written without a decimal point."""
    return int(value) if float(value).is_integer() else value


SCENARIOS: dict[str, Scenario] = {
    scenario.__name__: scenario
    for scenario in (
        *(reset_each_shift, continual, mixed_domains, label_shift),
        *(correlated, gradual, gradual_correlated, mixed_domains_correlated),
        *(recurring, single_sample, sliding_window, episodic),
    )
}


def complete_options(scenario: str, given: Mapping[str, float] | None) -> dict[str, float]:
    """Return all options of a scenario: those given, and the defaults of the others.

    A whole number is an int where the default is one, whatever a parser has made of it.

    Args:
        scenario: A name in :data:`SCENARIOS`.
        given: Option name to value; None for none.

    Raises:
        InputError: The scenario has no option of a name that is given, or it is no number.
    """
    parameters = inspect.signature(SCENARIOS[scenario]).parameters.values()
    known = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    for name, value in (given or {}).items():
        if name in known:
            _check_number(name, value)
            continue
        if not known:
            raise InputError(
                f"Scenario {scenario} has no options, but scenario_options names {name!r}. Leave "
                "it out, or choose the scenario that it belongs to."
            )
        raise unknown_name(f"option of {scenario}", name, known)
    options = {**known, **(given or {})}
    return {n: _shown(v) if isinstance(known[n], int) else v for n, v in options.items()}
