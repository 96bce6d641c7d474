"""Plans and scenarios: order, coverage, batches, serialisation."""

import json
from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest

from tta_lightning.data import Domain, Plan, Segment
from tta_lightning.data.plan import concatenate
from tta_lightning.data.scenarios import SCENARIOS
from tta_lightning.errors import InputError

DOMAINS = [Domain("fog", 5), Domain("snow", 5), Domain("contrast", 3)]
SUBSET = np.array([3, 5, 8, 13, 21, 34, 55], dtype=np.int64)
LABELS = np.array([0, 1, 0, 2, 1, 2, 0], dtype=np.int64)

PLAN = {
    "scenario": "x",
    "samples": [0, 1],
    "domain_ids": [0, 0],
    "domains": [["fog", 5]],
    "segments": [["fog-5", 0, 2, False]],
}


def make(name, seed=0):
    return SCENARIOS[name](SUBSET, LABELS, DOMAINS, np.random.default_rng(seed))


@pytest.mark.parametrize("name", SCENARIOS)
class TestEveryScenario:
    def test_every_segment_holds_every_sample_of_its_domains_once(self, name):
        plan = make(name)
        for segment in plan.segments:
            here = slice(segment.start, segment.stop)
            ids = plan.domain_ids[here].tolist()
            pairs = zip(plan.samples[here].tolist(), ids, strict=True)
            assert sorted(pairs) == sorted(product(SUBSET.tolist(), set(ids)))
        assert set(plan.domains) >= set(DOMAINS)
        assert set(plan.domain_ids.tolist()) == set(range(len(plan.domains)))

    def test_names_are_unique(self, name):
        plan = make(name)
        assert len({segment.name for segment in plan.segments}) == len(plan.segments)
        assert len(set(plan.domains)) == len(plan.domains)

    def test_the_seed_decides(self, name):
        assert make(name).digest == make(name).digest
        assert make(name).digest != make(name, seed=1).digest

    def test_serialises(self, name, tmp_path):
        plan = make(name)
        plan.save(tmp_path / "plan.json")
        loaded = Plan.load(tmp_path / "plan.json")
        assert loaded.digest == plan.digest
        assert list(loaded.batches(2)) == list(plan.batches(2))
        assert loaded.segments == plan.segments
        for setting in ("batch_size", "window", "reset_each_batch"):
            assert getattr(loaded, setting) == getattr(plan, setting)

    def test_batches_cover_in_order_and_respect_segments(self, name):
        plan = make(name)
        batches = list(plan.batches(4))
        assert [p for batch in batches for p in batch] == list(range(len(plan)))
        for batch in batches:
            assert plan.segment_at(batch[0]) == plan.segment_at(batch[-1])
            assert len(batch) <= 4


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("reset_each_shift", "53a038328b49558a8920d8ed827a174376a5bab1c9b66f3b5677abd508ec238e"),
        ("continual", "92c132c7dd2bc0c9a264148cfffb4e4600199866aa16e119ea6d5bfa3a741a67"),
        ("mixed_domains", "342390533f00658d78b24898fc19ef17d0fe67dc83da72ed0850890a05396d90"),
        ("label_shift", "22fc100e5aca70981558afa42630312d115f353387c15ca84d40a6c43316d38b"),
    ],
)
def test_plans_stay_what_they_were(name, digest):
    """Three of the first version, and all before plans had a batch size or a window."""
    assert make(name).digest == digest


def test_segments_and_resets():
    for name, reset in (("reset_each_shift", True), ("continual", False), ("label_shift", True)):
        plan = make(name)
        assert [s.name for s in plan.segments] == ["fog-5", "snow-5", "contrast-3"]
        assert [(s.start, s.stop) for s in plan.segments] == [(0, 7), (7, 14), (14, 21)]
        assert {s.reset for s in plan.segments} == {reset}
        for segment in plan.segments:
            ids = plan.domain_ids[segment.start : segment.stop]
            assert len(set(ids.tolist())) == 1


def test_mixed_is_one_shuffled_segment():
    plan = make("mixed_domains")
    assert plan.segments == (Segment("mixed", 0, 21, reset=False),)
    changes = sum(a != b for a, b in pairwise(plan.domain_ids.tolist()))
    assert changes > 8  # sorted it would be 2, shuffled 14 are expected


def test_orders_differ_between_domains():
    plan = make("continual")
    assert plan.samples[:7].tolist() != plan.samples[7:14].tolist()


def test_batches_by_hand():
    plan = make("continual")
    assert [list(batch) for batch in plan.batches(5)][:3] == [
        [0, 1, 2, 3, 4],
        [5, 6],
        [7, 8, 9, 10, 11],
    ]
    assert [plan.segment_at(p) for p in (0, 6, 7, 13, 14, 20)] == [0, 0, 1, 1, 2, 2]


def test_settings_are_part_of_the_digest_where_they_are_set():
    plan = make("continual")
    one_by_one = replace(plan, batch_size=1)
    others = [one_by_one, replace(one_by_one, window=4), replace(plan, reset_each_batch=True)]
    assert len({p.digest for p in (plan, *others)}) == 4
    assert set(plan.to_dict()) == set(PLAN)
    assert {p.subset_digest for p in (plan, *others)} == {plan.subset_digest}


def test_visits_are_counted():
    fog, snow = Domain("fog", 1), Domain("snow", 1)
    orders = [np.array([0, 1]), np.array([2]), np.array([1]), np.array([3, 4])]
    plan = concatenate("x", orders, [fog, snow, fog, fog], reset=False)
    assert [(s.name, s.start, s.stop) for s in plan.segments] == [
        ("fog-1", 0, 2),
        ("snow-1", 2, 3),
        ("fog-1 (2)", 3, 4),
        ("fog-1 (3)", 4, 6),
    ]
    assert plan.domains == (fog, snow)
    assert plan.domain_ids.tolist() == [0, 0, 1, 0, 0, 0]
    assert plan.samples.tolist() == [0, 1, 2, 1, 3, 4]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No plan at"),
        ("{not json", "is not JSON"),
        (json.dumps({"scenario": "x"}), "Not a plan"),
        (json.dumps([1, 2]), "Not a plan"),
        (
            json.dumps(
                {
                    "scenario": "x",
                    "samples": [0, 1],
                    "domain_ids": [0],
                    "domains": [["fog", 5]],
                    "segments": [["fog-5", 0, 2, False]],
                }
            ),
            "one domain a sample",
        ),
        (
            json.dumps(
                {
                    "scenario": "x",
                    "samples": [0, 1],
                    "domain_ids": [0, 0],
                    "domains": [["fog", 5]],
                    "segments": [["fog-5", 0, 1, False]],
                }
            ),
            "cover all samples",
        ),
        (json.dumps(PLAN | {"samples": [0, -1]}), "negative"),
        (json.dumps(PLAN | {"domain_ids": [0, 1]}), "domain 1 of 1"),
        (json.dumps(PLAN | {"domains": [["fog"]]}), "Not a plan"),
        (json.dumps(PLAN | {"segments": [["fog-5", 0]]}), "Not a plan"),
        (json.dumps(PLAN | {"batch_size": 0}), "batch_size = 0"),
        (json.dumps(PLAN | {"batch_size": 1, "window": 0}), "window = 0"),
        (json.dumps(PLAN | {"window": 4}), "one by one"),
        (json.dumps(PLAN | {"batch_size": 2, "window": 4}), "one by one"),
        (
            json.dumps(PLAN | {"batch_size": 1, "window": 4, "reset_each_batch": True}),
            "no reset before every batch",
        ),
        (json.dumps(PLAN | {"batch_size": "many"}), "Not a plan"),
    ],
)
def test_files_that_are_no_plan(content, message, tmp_path):
    path = tmp_path / "plan.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=message):
        Plan.load(path)
