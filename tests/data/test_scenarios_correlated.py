"""Scenarios in the order of classes: the draw behind them, and what it does to a stream."""

from functools import partial

import numpy as np
import pytest

from tta_lightning.data import Domain
from tta_lightning.data.orders import dirichlet_order, dirichlet_slots
from tta_lightning.data.scenarios import SCENARIOS
from tta_lightning.errors import InputError

DOMAINS = [Domain("fog", 2), Domain("snow", 2), Domain("contrast", 2)]
CORRELATED = ("correlated", "gradual_correlated", "mixed_domains_correlated")
BY_CLASS = ("label_shift", *CORRELATED)
CLASSES, SIZE = 10, 100  # samples of a class


def make(name, seed=0, **options):
    """A plan over ten classes of a hundred samples, and the class of each place in it."""
    labels = np.random.default_rng(99).permutation(np.repeat(np.arange(CLASSES), SIZE))
    subset = np.arange(500, 500 + len(labels))
    rng = np.random.default_rng(seed)
    plan = SCENARIOS[name](subset, labels, DOMAINS, rng, **options)
    return plan, labels[plan.samples - 500]


def streams(name, **options):
    """The classes of each segment."""
    plan, classes = make(name, **options)
    return [classes[segment.start : segment.stop] for segment in plan.segments]


def same_class(name, lag, **options):
    """How often two samples of a segment that are `lag` apart share their class."""
    return float(np.mean([np.mean(row[lag:] == row[:-lag]) for row in streams(name, **options)]))


# The draw -----------------------------------------------------------------------------------------


def naive_order(own, delta, rng):
    """The published sampler on the draws of ours: lists of slots, of pieces, of samples."""
    classes = max(own) + 1
    slots = [[] for _ in range(min(classes, 100))]
    for label in range(classes):
        members = rng.permutation([i for i, c in enumerate(own) if c == label])
        shares, begin, total = rng.dirichlet([delta] * len(slots)), 0, 0.0
        for slot, share in zip(slots, shares, strict=True):
            total += share
            end = len(members) if slot is slots[-1] else int(len(members) * total)
            slot.append(members[begin:end].tolist())
            begin = end
    turns = [rng.permuted(np.arange(classes)) for _ in slots]
    places = rng.permutation(len(own)).tolist()
    stream = []
    for slot, turn in zip(slots, turns, strict=True):
        for label in sorted(range(classes), key=lambda c, turn=turn: turn[c]):
            stream += sorted(slot[label], key=lambda i: places[i])
    return stream


@pytest.mark.parametrize("delta", [0.01, 0.1, 1, 50])
@pytest.mark.parametrize("classes", [1, 2, 7, 130])
def test_the_order_is_that_of_slots_played_in_turn(classes, delta):
    own = np.append(np.random.default_rng(3).integers(classes, size=400), np.arange(classes))
    for seed in range(3):
        found = dirichlet_order(own, classes, delta, np.random.default_rng(seed))
        assert found.tolist() == naive_order(own.tolist(), delta, np.random.default_rng(seed))
        assert sorted(found.tolist()) == list(range(len(own)))


@pytest.mark.parametrize("delta", [0.1, 1.0, 10.0])
def test_shares_of_slots_have_the_moments_of_the_dirichlet(delta):
    """Mean 1 / S and variance (1 / S) (1 - 1 / S) / (S delta + 1), in every slot."""
    slots, size, draws = 5, 400, 1200
    own, rng = np.repeat(np.arange(slots), size), np.random.default_rng(0)
    drawn = np.stack([dirichlet_slots(own, slots, delta, rng) for _ in range(draws)])
    drawn = drawn.reshape(draws * slots, size)  # the samples of one class in a row
    shares = np.stack([(drawn == s).mean(axis=1) for s in range(slots)])
    variance = (1 / slots) * (1 - 1 / slots) / (slots * delta + 1)
    assert shares.mean(axis=1) == pytest.approx(1 / slots, abs=5 * (variance / len(drawn)) ** 0.5)
    assert shares.var(axis=1) == pytest.approx(variance, rel=0.08)


def test_there_are_as_many_slots_as_classes_and_at_most_a_hundred():
    for classes, slots in ((3, 3), (100, 100), (130, 100)):
        own = np.repeat(np.arange(classes), 200)
        found = dirichlet_slots(own, classes, 1e6, np.random.default_rng(0))
        assert np.unique(found).tolist() == list(range(slots))


def test_samples_of_a_class_are_shuffled_before_they_are_cut():
    """Else the first slot had the first samples of the file."""
    own = np.repeat([0, 1], 1000)
    slot = dirichlet_slots(own, 2, 1e6, np.random.default_rng(0))
    for label in (0, 1):
        first = np.flatnonzero(slot[own == label] == 0)
        assert first.mean() == pytest.approx(500, abs=5 * (1000**2 / 12 / 500) ** 0.5)


# The streams --------------------------------------------------------------------------------------


@pytest.mark.parametrize("lag", [1, 2, 5, 10, 20])
def test_neighbours_share_their_class(lag):
    chance = (SIZE - 1) / (CLASSES * SIZE - 1)
    assert same_class("continual", lag) == pytest.approx(chance, abs=0.03)
    for name in CORRELATED:
        assert same_class(name, lag, delta=0.1) > 5 * chance


@pytest.mark.parametrize("name", CORRELATED)
def test_correlation_falls_with_delta(name):
    by_delta = [same_class(name, 20, delta=d) for d in (0.001, 0.1, 1, 10)]
    assert by_delta == sorted(by_delta, reverse=True)
    assert by_delta[0] > 0.75
    lag = 60 if name == "mixed_domains_correlated" else 20  # runs of 30 and of 10 at most
    assert same_class(name, lag, delta=1e6) < 0.2


def chi_squared(rows, window):
    """Of the classes in each window, against all classes alike."""
    values = []
    for row in rows:
        for part in row.reshape(-1, window):
            counts = np.bincount(part, minlength=CLASSES)
            values.append(float(((counts - window / CLASSES) ** 2 / (window / CLASSES)).sum()))
    return np.array(values)


def test_windows_of_a_shuffled_stream_have_all_classes_and_of_a_correlated_one_few():
    """Drawn without replacement: 9 degrees of freedom times (N - n) / (N - 1)."""
    shuffled = chi_squared(streams("continual") + streams("recurring", rounds=5), 50)
    assert shuffled.mean() == pytest.approx(9 * 950 / 999, abs=5 * (18 / len(shuffled)) ** 0.5)
    assert shuffled.max() < 40
    for name in CORRELATED:
        found = chi_squared(streams(name), 50)  # 450 if all are of one class
        assert np.median(found) > 100
        assert (found > 40).mean() > 0.8


def test_domains_are_mixed_within_a_class():
    plan, classes = make("mixed_domains_correlated")
    assert len(plan.segments) == 1
    assert plan.segments[0].reset is False
    together = classes[1:] == classes[:-1]
    same_domain = (plan.domain_ids[1:] == plan.domain_ids[:-1])[together]
    assert same_domain.mean() == pytest.approx(1 / 3, abs=5 * (2 / 9 / together.sum()) ** 0.5)
    for number in range(3):  # and no domain prefers a part of the stream
        middle = np.flatnonzero(plan.domain_ids == number).mean() / len(plan)
        assert middle == pytest.approx(0.5, abs=5 * (1 / 12 / 1000) ** 0.5)


@pytest.mark.parametrize("name", CORRELATED)
def test_every_segment_draws_anew_and_the_seed_decides(name):
    plan, _ = make(name)
    parts = [plan.samples[s.start : s.stop].tolist() for s in plan.segments]
    assert len({tuple(part) for part in parts}) == len(parts)
    assert make(name)[0].digest == plan.digest
    assert make(name, seed=1)[0].digest != plan.digest
    assert make(name, delta=0.2)[0].digest != plan.digest


def test_nothing_resets():
    for name in CORRELATED:
        assert not any(segment.reset for segment in make(name)[0].segments)
    assert [s.name for s in make("correlated")[0].segments] == ["fog-2", "snow-2", "contrast-2"]


# What is not possible -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", BY_CLASS)
def test_unknown_labels(name):
    call = partial(SCENARIOS[name], np.arange(4), domains=DOMAINS, rng=np.random.default_rng(0))
    message = f"{name} orders images by their class, but .* have no label"
    with pytest.raises(InputError, match=message):
        call(labels=np.array([0, -1, 1, -1]))
    call(labels=np.array([0, 7, 1, 7]))


@pytest.mark.parametrize("name", CORRELATED)
@pytest.mark.parametrize("delta", [0, -1, float("nan"), float("inf"), 10_000_000])
def test_deltas_that_are_not_possible(name, delta):
    with pytest.raises(InputError, match=f"delta = {delta}: expected a number above 0"):
        make(name, delta=delta)


@pytest.mark.parametrize("delta", [1e-300, 1e6])
def test_deltas_at_the_edge(delta):
    plan, classes = make("correlated", delta=delta)
    assert sorted(plan.samples[:1000].tolist()) == list(range(500, 1500))
    runs = 1 + int((classes[1:1000] != classes[:999]).sum())
    assert runs == CLASSES if delta < 1 else runs > 90
