"""Label shift: how often which class comes when, against the probabilities of the paper."""

from itertools import groupby, product

import numpy as np
import pytest

from tta_lightning.data import Domain
from tta_lightning.data.scenarios import label_shift
from tta_lightning.errors import InputError

DOMAINS = [Domain("fog", 5), Domain("snow", 5)]


def classes_of(sizes, ratio, seed=0, domains=DOMAINS):
    """The classes in the order of the stream, one row a domain; samples count from 100."""
    labels = np.repeat(np.arange(len(sizes)), sizes)
    labels = np.random.default_rng(99).permutation(labels)
    subset = np.arange(100, 100 + len(labels))
    rng = np.random.default_rng(seed)
    plan = label_shift(subset, labels, domains, rng, imbalance_ratio=ratio)
    samples = plan.samples.reshape(len(domains), -1)
    assert np.array_equal(np.sort(samples), np.tile(subset, (len(domains), 1)))  # each once
    return labels[samples - 100]


def runs(classes):
    return [label for label, _ in groupby(classes.tolist())]


@pytest.mark.parametrize("ratio", [float("inf"), 1e300])
def test_an_infinite_ratio_is_pure_class_order(ratio):
    sizes = (40, 1, 7, 100)
    for row in classes_of(sizes, ratio):
        assert sorted(runs(row)) == [0, 1, 2, 3]


def test_ratio_one_is_a_shuffle():
    """Neighbours share their class as often as two samples drawn at random, at every distance."""
    sizes = np.array([3000, 1000, 500, 500])
    total = sizes.sum()
    chance = float((sizes * (sizes - 1)).sum() / (total * (total - 1)))
    for row, lag in product(classes_of(sizes, ratio=1), (1, 2, 10, 500)):
        same = float((row[lag:] == row[:-lag]).mean())
        assert same == pytest.approx(chance, abs=5 * 0.5 / total**0.5)
    for row in classes_of(sizes, ratio=1):  # and no class prefers a part of the stream
        for label, size in enumerate(sizes):
            middle = float(np.flatnonzero(row == label).mean()) / total
            assert middle == pytest.approx(0.5, abs=5 * (1 / 12 / size) ** 0.5)


def test_the_published_ratio_is_nearly_pure():
    """50,000 samples of 1,000 classes: 50,000 * 999 / 500,999 = 99.7 samples are astray."""
    (row,) = classes_of([50] * 1000, 500_000, domains=DOMAINS[:1])
    astray = (len(runs(row)) - 1000) / 2  # each splits the run of another class
    assert astray == pytest.approx(99.7, abs=4 * 99.7**0.5)


def test_windows_have_the_probabilities_of_the_paper():
    """Ten classes at ratio 9: q_max = 9 / 18 for the class whose time it is, q_min = 1 / 18."""
    for row in classes_of([1000] * 10, ratio=9):
        current = []
        for window in row.reshape(10, 1000)[:, 250:750]:  # clear of where times begin and end
            counts = np.bincount(window, minlength=10)
            current.append(int(counts.argmax()))
            expected = np.full(10, 500 / 18)
            expected[current[-1]] = 500 * 9 / 18
            chi_squared = float(((counts - expected) ** 2 / expected).sum())
            assert chi_squared < 33.7  # one in 10,000 at 9 degrees of freedom
        assert sorted(current) == list(range(10))


def test_the_ratio_is_that_of_samples_where_classes_differ_in_size():
    """8,000 and 2,000 samples at ratio 3: 2 / (3 * 8 + 2) of class 1, then 3 * 2 / (8 + 3 * 2)."""
    for row in classes_of([8000, 2000], ratio=3):
        shares = sorted([float(row[:3000].mean()), float(row[-3000:].mean())])
        assert shares == pytest.approx([2 / 26, 6 / 14], abs=0.04)


def test_orders_of_classes():
    first, second = classes_of([5] * 8, float("inf"))
    assert runs(first) != runs(second)
    again, _ = classes_of([5] * 8, float("inf"))
    other, _ = classes_of([5] * 8, float("inf"), seed=1)
    assert np.array_equal(first, again)
    assert runs(first) != runs(other)


def test_classes_need_not_be_consecutive():
    labels = np.array([70, 3, 70, 3, 3])
    rng = np.random.default_rng(0)
    plan = label_shift(np.arange(5), labels, DOMAINS, rng, imbalance_ratio=float("inf"))
    assert sorted(runs(labels[plan.samples[:5]])) == [3, 70]


@pytest.mark.parametrize("ratio", [1, 500_000])
def test_samples_of_one_time_are_shuffled(ratio):
    rng = np.random.default_rng(0)
    plan = label_shift(np.arange(20), np.zeros(20, int), DOMAINS, rng, imbalance_ratio=ratio)
    first, second = plan.samples[:20].tolist(), plan.samples[20:].tolist()
    assert sorted(first) == sorted(second) == list(range(20))
    assert len({tuple(first), tuple(second), tuple(range(20))}) == 3


@pytest.mark.parametrize("ratio", [0.99, 0, -1, float("nan"), -float("inf")])
def test_ratios_that_are_not_possible(ratio):
    with pytest.raises(InputError, match=f"imbalance_ratio = {ratio}: expected 1 .* or more"):
        label_shift(
            np.arange(2), np.arange(2), DOMAINS, np.random.default_rng(0), imbalance_ratio=ratio
        )


def test_unknown_labels():
    labels = np.array([0, -1, 1, -1])
    with pytest.raises(InputError, match="2 of 4 have no label"):
        label_shift(np.arange(4), labels, DOMAINS, np.random.default_rng(0))
