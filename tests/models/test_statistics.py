"""Statistics measured batch by batch against those of all images at once."""

import pytest
import torch

from tta_lightning.errors import InputError
from tta_lightning.models.statistics import FeatureStatistics


def draw(count=37, width=5, offset=0.0, seed=0):
    """Features [count, width] in float64, of different spread."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.linspace(0.1, 3.0, width, dtype=torch.float64)
    noise = torch.randn(count, width, generator=generator, dtype=torch.float64)
    return noise * spread + spread + offset


def measured(batches):
    statistics = FeatureStatistics()
    count = statistics.measure(batches)
    return statistics, count


@pytest.mark.parametrize(
    "sizes",
    [(37,), (20, 17), (1, 36), (36, 1), (1,) * 37, (5, 0, 7, 1, 24), (0, 37), (37, 0), (0, 1, 36)],
    ids=lambda sizes: "-".join(map(str, sizes[:5])),
)
def test_batch_sizes_do_not_matter(sizes):
    features = draw()
    statistics, count = measured(features.split(sizes))
    std, mean = torch.std_mean(features, dim=0)
    assert count == 37
    torch.testing.assert_close(statistics.std, std, rtol=1e-13, atol=0)
    torch.testing.assert_close(statistics.mean, mean, rtol=1e-13, atol=0)


def test_by_hand():
    statistics, count = measured([torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 0.0], [8, 0]])])
    assert count == 3
    # mean 4; squares 9 + 1 + 16 = 26 over 3 - 1
    assert statistics.mean.tolist() == [4.0, 0.0]
    assert statistics.std.tolist() == pytest.approx([13**0.5, 0.0], rel=1e-7)


@pytest.mark.parametrize("size", [1, 8, 400])
def test_a_large_offset_costs_no_digits(size):
    # E[x^2] - E[x]^2 in float32 would leave no digit: 1e8 has a spacing of 8, the variance is 0.01
    features = draw(400, offset=1e4).float()
    statistics, _ = measured(features.split(size))
    std, mean = torch.std_mean(features.double(), dim=0)
    torch.testing.assert_close(statistics.std.double(), std, rtol=1e-7, atol=0)
    torch.testing.assert_close(statistics.mean.double(), mean, rtol=1e-7, atol=0)


def test_batches_are_read_once_and_keep_no_graph():
    features = draw(8).requires_grad_()
    statistics, count = measured(each for each in features.split(3))
    assert count == 8
    assert not statistics.std.requires_grad
    assert not statistics.mean.requires_grad


def test_a_second_measurement_replaces_the_first():
    statistics, _ = measured([draw(seed=1)])
    statistics.measure([draw(seed=2)])
    torch.testing.assert_close(statistics.std.double(), draw(seed=2).std(0), rtol=1e-7, atol=0)


def test_nothing_is_known_at_first():
    statistics = FeatureStatistics()
    assert not statistics.known
    statistics.measure([draw()])
    assert statistics.known


@pytest.mark.parametrize(
    ("batches", "count"),
    [
        ([], 0),
        ([torch.zeros(0, 5)], 0),
        ([torch.zeros(1, 5)], 1),
        ([torch.zeros(0, 5), torch.zeros(1, 5)], 1),
    ],
)
def test_fewer_than_two_images(batches, count):
    statistics = FeatureStatistics()
    with pytest.raises(InputError, match=f"two images or more, got {count}"):
        statistics.measure(batches)
    assert not statistics.known


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_features_that_are_not_finite_replace_nothing(value):
    statistics, _ = measured([draw()])
    std, mean = statistics.std.clone(), statistics.mean.clone()
    spoilt = draw(seed=2)
    spoilt[3, 2] = value
    with pytest.raises(InputError, match="of the clean images hold NaN or infinite"):
        statistics.measure([draw(seed=1), spoilt])
    assert torch.equal(statistics.std, std)
    assert torch.equal(statistics.mean, mean)


@pytest.mark.parametrize(
    ("std", "mean", "message"),
    [
        (
            [-1.0, 0.5],
            [1.0, 2.0],
            r"of it holds negative .*Expected \(std, mean\).* probably exchanged",
        ),
        ([-1.0, 0.5], [-1.0, 2.0], r"of it holds negative .*standard deviation first"),
        ([1.0, torch.nan], [1.0, 2.0], "of it hold NaN"),
        ([1.0, 1.0], [1.0, torch.inf], "of it hold NaN"),
        ([1.0, 1.0], [1.0, 1.0, 1.0], r"shapes \[2\] and \[3\]"),
        ([[1.0]], [[1.0]], r"shapes \[1, 1\] and \[1, 1\]"),
        ([], [], r"shapes \[0\] and \[0\]"),
    ],
)
def test_pairs_that_are_no_statistics(std, mean, message):
    statistics = FeatureStatistics()
    with pytest.raises(InputError, match=message):
        statistics.set(torch.tensor(std), torch.tensor(mean), "it")
    assert not statistics.known


def test_what_is_set_is_a_copy():
    statistics, std, mean = FeatureStatistics(), torch.ones(3), torch.zeros(3)
    statistics.set(std, mean, "it")
    std.fill_(7.0)
    mean.fill_(7.0)
    assert statistics.std.tolist() == [1.0, 1.0, 1.0]
    assert statistics.mean.tolist() == [0.0, 0.0, 0.0]


def test_the_state_goes_into_statistics_that_know_nothing_or_another_width():
    known, _ = measured([draw()])
    for other in (FeatureStatistics(), measured([draw(width=3)])[0]):
        other.load_state_dict(known.state_dict())
        assert torch.equal(other.std, known.std)
        assert torch.equal(other.mean, known.mean)
    other.load_state_dict(FeatureStatistics().state_dict())
    assert not other.known


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_precision_is_that_of_the_features_but_float32_at_least(dtype):
    statistics, _ = measured([draw().to(dtype)])
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert (statistics.std.dtype, statistics.mean.dtype) == (expected, expected)
    kept = statistics.std.clone()
    assert torch.equal(statistics.to(torch.bfloat16).std, kept)
