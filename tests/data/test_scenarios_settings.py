"""Scenarios that change severities, repeat, or say how their plan is served."""

import numpy as np
import pytest

from tta_lightning.data import Domain
from tta_lightning.data.scenarios import SCENARIOS
from tta_lightning.errors import InputError

SUBSET = np.arange(7, 67)
LABELS = np.arange(60) % 4
DOMAINS = [Domain("fog", 3), Domain("snow", 2)]


def make(name, domains=DOMAINS, **options):
    return SCENARIOS[name](SUBSET, LABELS, domains, np.random.default_rng(0), **options)


@pytest.mark.parametrize("name", ["gradual", "gradual_correlated"])
def test_severities_go_up_and_down(name):
    plan = make(name)
    assert [segment.name for segment in plan.segments] == [
        *("fog-1", "fog-2", "fog-3", "fog-2 (2)", "fog-1 (2)"),
        *("snow-1", "snow-2", "snow-1 (2)"),
    ]
    assert [str(d) for d in plan.domains] == ["fog-1", "fog-2", "fog-3", "snow-1", "snow-2"]
    severities = [plan.domain(segment.start).severity for segment in plan.segments]
    assert severities == [1, 2, 3, 2, 1, 1, 2, 1]
    assert [plan.domain(s.start).corruption for s in plan.segments] == ["fog"] * 5 + ["snow"] * 3
    for number, segment in enumerate(plan.segments):
        assert (segment.start, segment.stop) == (60 * number, 60 * number + 60)
        assert segment.reset is False
        assert sorted(plan.samples[segment.start : segment.stop]) == SUBSET.tolist()
    assert len({tuple(step) for step in plan.samples.reshape(8, 60).tolist()}) == 8  # each anew


def test_the_published_path():
    """One to five and back, fifteen times nine segments."""
    domains = [Domain(f"corruption{number}", 5) for number in range(15)]
    plan = make("gradual", domains)
    path = [plan.domain(segment.start).severity for segment in plan.segments]
    assert path == [1, 2, 3, 4, 5, 4, 3, 2, 1] * 15
    assert make("gradual", [Domain("fog", 1)]).segments[0].name == "fog-1"
    assert len(make("gradual", [Domain("fog", 1)]).segments) == 1


@pytest.mark.parametrize("name", ["gradual", "gradual_correlated"])
def test_the_clean_image_has_no_severity(name):
    with pytest.raises(InputError, match=f"{name} raises and lowers .* 'none' is the image"):
        make(name, [Domain("fog", 5), Domain("none", 0)])


def test_recurring_goes_round():
    plan = make("recurring", rounds=3)
    assert [segment.name for segment in plan.segments] == [
        *("fog-3", "snow-2", "fog-3 (2)", "snow-2 (2)", "fog-3 (3)", "snow-2 (3)"),
    ]
    assert plan.domains == (Domain("fog", 3), Domain("snow", 2))
    assert plan.domain_ids.tolist() == ([0] * 60 + [1] * 60) * 3
    assert not any(segment.reset for segment in plan.segments)
    visits = plan.samples.reshape(6, 60)
    assert np.array_equal(np.sort(visits), np.tile(SUBSET, (6, 1)))
    assert len({tuple(visit) for visit in visits.tolist()}) == 6  # each newly shuffled
    assert len(make("recurring").segments) == 2 * 20
    assert make("recurring", rounds=3.0).digest == plan.digest
    one = make("recurring", rounds=1)
    assert one.samples.tolist() == make("continual").samples.tolist()


def test_a_shuffled_visit_prefers_no_sample():
    """The mean place of each sample over many visits."""
    plan = make("recurring", [Domain("fog", 1)], rounds=2000)
    places = np.argsort(plan.samples.reshape(2000, 60), axis=1).mean(axis=0)
    assert places == pytest.approx(29.5, abs=5 * ((60**2 - 1) / 12 / 2000) ** 0.5)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("single_sample", (1, None, False)),
        ("sliding_window", (1, 64, False)),
        ("episodic", (None, None, True)),
    ],
)
def test_the_order_of_reset_each_shift_served_otherwise(name, settings):
    plan, plain = make(name), make("reset_each_shift")
    assert (plan.scenario, plan.batch_size, plan.window, plan.reset_each_batch) == (name, *settings)
    assert np.array_equal(plan.samples, plain.samples)
    assert (plan.segments, plan.domains) == (plain.segments, plain.domains)
    assert all(segment.reset for segment in plan.segments)


@pytest.mark.parametrize("name", sorted(set(SCENARIOS) - {"single_sample", "sliding_window"}))
def test_other_scenarios_leave_the_batch_size_to_the_stream(name):
    plan = make(name)
    assert (plan.batch_size, plan.window) == (None, None)
    assert plan.reset_each_batch is (name == "episodic")


@pytest.mark.parametrize("value", [0, -3, 0.5, 2.5, float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("name", "option"), [("recurring", "rounds"), ("sliding_window", "window")]
)
def test_numbers_that_are_not_possible(name, option, value):
    with pytest.raises(InputError, match=f"{option} = {value}: expected a whole number from 1 on"):
        make(name, **{option: value})


def test_the_window_is_a_whole_number():
    assert repr(make("sliding_window", window=3.0).window) == "3"
