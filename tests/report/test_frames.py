"""Frames over several runs: every figure against one that was worked out by hand."""

import numpy as np
import pytest

from tests.report.run_folders import put_whole_run, stream
from tta_lightning.errors import InputError
from tta_lightning.report import Run, frames
from tta_lightning.report.collapses import collapses
from tta_lightning.report.groups import group, unlike


def rows(**right):
    """Ten images a segment, as many of them right as given; classes 0 to 4 by turns."""
    return [
        (segment.replace("_", "-"), n % 5, n % 5 if n < count else (n + 1) % 5)
        for segment, count in right.items()
        for n in range(10)
    ]


def seeded(seed):
    return stream(seed=seed, plan_sha256=f"{seed}a" * 32, subset_sha256=f"{seed}b" * 32)


@pytest.fixture
def runs(tmp_path):
    """Source and Tent, two seeds each."""
    right = {
        ("Source", 0): {"fog_5": 4, "snow_5": 6},
        ("Source", 1): {"fog_5": 2, "snow_5": 6},
        ("Tent", 0): {"fog_5": 7, "snow_5": 5},
        ("Tent", 1): {"fog_5": 3, "snow_5": 5},
    }
    return [
        Run.load(put_whole_run(tmp_path / f"{m}_{s}", m, rows(**r), batch=5, served=seeded(s)))
        for (m, s), r in right.items()
    ]


def test_accuracies_and_gains_are_those_of_the_same_seed(runs):
    frame = frames.accuracies(runs).set_index(["name", "domain"])
    assert frame.loc[("Tent_0", "fog-5"), "accuracy"] == pytest.approx(0.7)
    assert frame.loc[("Tent_0", "fog-5"), "gain"] == pytest.approx(0.3)
    assert frame.loc[("Tent_1", "fog-5"), "gain"] == pytest.approx(0.1)
    assert frame.loc[("Tent_1", "mean"), "accuracy"] == pytest.approx(0.4)
    assert frame.loc[("Tent_1", "mean"), "source"] == pytest.approx(0.4)
    assert frame.loc[("Tent_0", "mean"), "gain"] == pytest.approx(0.1)
    assert np.isnan(frame.loc[("Source_0", "fog-5"), "gain"])
    assert frame.loc[("Tent_0", "mean"), "images"] == 20


def test_summary_is_mean_and_deviation_over_seeds(runs):
    names = group(runs)
    assert names == ["Source", "Source", "Tent", "Tent"]
    frame = frames.summary(frames.accuracies(runs, names)).set_index(["name", "domain"])
    fog = frame.loc[("Tent", "fog-5")]
    assert fog["runs"] == 2
    assert fog["accuracy"] == pytest.approx(0.5)
    assert fog["accuracy_sd"] == pytest.approx(np.std([0.7, 0.3], ddof=1))
    assert fog["gain"] == pytest.approx(0.2)
    assert fog["gain_sd"] == pytest.approx(np.std([0.3, 0.1], ddof=1))
    mean = frame.loc[("Tent", "mean")]
    assert mean["accuracy_sd"] == pytest.approx(np.std([0.6, 0.4], ddof=1))
    assert frame.loc[("Tent", "snow-5"), "accuracy_sd"] == 0


def test_a_gain_is_that_of_all_seeds_or_none(runs):
    frame = frames.summary(frames.accuracies([runs[0], runs[2]]))
    assert frame["gain"].notna().any()
    names = ["Source", "Tent", "Tent"]
    some = frames.summary(frames.accuracies([runs[0], runs[1], runs[3]], names))
    assert some["gain"].isna().all()
    assert some.loc[some["name"] == "Tent", "accuracy"].notna().all()


def test_one_run_has_no_deviation(runs):
    frame = frames.summary(frames.accuracies(runs[:1]))
    assert frame["accuracy_sd"].isna().all()


def test_a_mixed_stream_is_split_by_corruption(tmp_path):
    mixed = [(f"{'fog' if n % 2 else 'snow'}-5", 0, 0 if n % 2 or n == 0 else 1) for n in range(10)]
    run = Run.load(put_whole_run(tmp_path / "tent", "Tent", mixed))
    run.predictions["segment"] = "mixed"
    frame = frames.accuracies([run]).set_index("domain")
    assert frame.loc["fog-5", "accuracy"] == 1
    assert frame.loc["snow-5", "accuracy"] == pytest.approx(0.2)
    assert frame.loc["mean", "accuracy"] == pytest.approx(0.6)


def test_visits_of_a_corruption_are_taken_together(tmp_path):
    twice = [("fog-5", 0, 0), ("fog-5", 0, 1), ("fog-5 (2)", 0, 0), ("fog-5 (2)", 0, 0)]
    run = Run.load(put_whole_run(tmp_path / "tent", "Tent", twice))
    frame = frames.accuracies([run])
    assert frame["domain"].tolist() == ["fog-5", "mean"]
    assert frame["accuracy"].tolist() == [0.75, 0.75]


def test_many_domains_become_corruptions(tmp_path):
    many = [(f"c{n}-{s}", 0, int(s > 2)) for n in range(9) for s in range(1, 6)]
    run = Run.load(put_whole_run(tmp_path / "tent", "Tent", many))
    frame = frames.accuracies([run])
    assert frame["domain"].tolist() == [*(f"c{n}" for n in range(9)), "mean"]
    assert frame["accuracy"].tolist() == pytest.approx([0.4] * 10)


def test_curves_average_seeds(runs):
    frame = frames.curves(runs, group(runs))
    tent = frame[frame["name"] == "Tent"]
    assert tent["seen"].tolist() == [5, 10, 15, 20]
    assert tent["visit"].tolist() == [0, 0, 1, 1]
    # of the first five images five and three are right, of the ten seven and three
    assert tent["running_accuracy"].tolist() == pytest.approx([0.8, 0.5, 1.0, 0.5])
    assert tent["sd"].tolist() == pytest.approx([np.std([1, 0.6], ddof=1), 0.4 / 2**0.5, 0, 0])


def test_curves_of_long_streams_are_thinned_and_keep_the_ends(tmp_path):
    long = [(f"fog-{s}", 0, 0) for s in (1, 2) for _ in range(1000)]
    run = Run.load(put_whole_run(tmp_path / "tent", "Tent", long, batch=1))
    frame = frames.curves([run], points=100)
    assert len(frame) <= 104
    for visit, first in ((0, 1), (1, 1001)):
        seen = frame.loc[frame["visit"] == visit, "seen"]
        assert (seen.min(), seen.max()) == (first, first + 999)


def test_segments(runs):
    frame = frames.segments(runs, group(runs)).set_index(["name", "segment"])["accuracy"]
    assert frame["Tent", "fog-5"] == pytest.approx(0.5)
    assert frame["Source", "snow-5"] == pytest.approx(0.6)


def test_over_time_counts_predictions_within_segments(tmp_path):
    stream_of = [("fog-5", 0, 0)] * 10 + [("fog-5", 0, 1)] * 10 + [("snow-5", 0, 2)] * 20
    run = Run.load(put_whole_run(tmp_path / "tent", "Tent", stream_of))
    frame = frames.over_time(run, bins=4)
    wide = frame.pivot(index="start", columns="class", values="share")
    assert wide.index.tolist() == [0, 10, 20, 30]
    assert wide["0"].tolist() == [1, 0, 0, 0]
    assert wide["1"].tolist() == [0, 1, 0, 0]
    assert wide["2"].tolist() == [0, 0, 1, 1]
    first = frame.drop_duplicates("start")
    assert first["segment"].tolist() == ["fog-5", "fog-5", "snow-5", "snow-5"]
    assert first["accuracy"].tolist() == [1, 0, 0, 0]
    assert first["stop"].tolist() == [10, 20, 30, 40]


def test_over_time_never_cuts_across_a_segment_of_a_few(tmp_path):
    uneven = [("fog-5", 0, 0)] * 7 + [("snow-5", 0, 0)] * 90 + [("frost-5", 0, 0)] * 3
    run = Run.load(put_whole_run(tmp_path / "tent", "Tent", uneven))
    first = frames.over_time(run, bins=10).drop_duplicates("start")
    assert {7, 97} <= set(first["start"])
    assert first["stop"].iloc[-1] == 100


def test_over_time_of_more_segments_than_bins(tmp_path):
    many = [(f"c{n}-5", 0, 0) for n in range(100) for _ in range(2)]
    run = Run.load(put_whole_run(tmp_path / "tent", "Tent", many))
    first = frames.over_time(run, bins=10).drop_duplicates("start")
    assert first["start"].tolist() == list(range(0, 200, 20))


def test_over_time_has_stretches_of_ten_images_or_more(tmp_path):
    run = Run.load(put_whole_run(tmp_path / "tent", "Tent", [("fog-5", 0, 0)] * 35))
    first = frames.over_time(run).drop_duplicates("start")
    assert (first["stop"] - first["start"]).min() >= 10


def test_over_time_without_a_finite_prediction_is_empty(tmp_path):
    run = Run.load(put_whole_run(tmp_path / "tent", "Tent", [("fog-5", 0, -1)] * 35))
    assert frames.over_time(run).empty


def test_over_time_puts_rare_classes_together(tmp_path):
    few = [("fog-5", 0, n) for n in (0, 0, 0, 1, 1, 2, 3, -1)]
    run = Run.load(put_whole_run(tmp_path / "tent", "Tent", few))
    shares = frames.over_time(run, bins=1, classes=3).set_index("class")["share"]
    assert shares.to_dict() == {"0": 3 / 8, "1": 2 / 8, "other": 2 / 8}  # -1 is no class


def test_per_class_says_what_changed(tmp_path):
    before = [("fog-5", n % 2, 0) for n in range(10)]  # class 1 is never predicted
    after = [("fog-5", n % 2, 1) for n in range(10)]
    source = Run.load(put_whole_run(tmp_path / "source", "Source", before))
    run = Run.load(put_whole_run(tmp_path / "tent", "Tent", after))
    frame = frames.per_class(run, source).set_index("class")
    assert frame["images"].tolist() == [5, 5]
    assert frame["predicted"].tolist() == [0, 10]
    assert frame["before"].tolist() == [1, 0]
    assert frame["after"].tolist() == [0, 1]
    assert frame["change"].tolist() == [-1, 1]
    assert frames.per_class(run, None)["change"].isna().all()


def test_per_class_without_labels_is_about_predictions(tmp_path):
    before = [("fog-5", None, 0)] * 3 + [("fog-5", None, 1)]
    source = Run.load(put_whole_run(tmp_path / "source", "Source", before))
    after = [("fog-5", None, 2)] * 4
    run = Run.load(put_whole_run(tmp_path / "tent", "Tent", after))
    frame = frames.per_class(run, source).set_index("class")
    assert frame["before"].tolist() == [0.75, 0.25, 0]
    assert frame["after"].tolist() == [0, 0, 1]
    assert frame["change"].tolist() == [-0.75, -0.25, 1]


def test_reliability(tmp_path):
    given = [
        ("fog-5", 0, 0, 0.95),
        ("fog-5", 0, 1, 0.99),
        ("fog-5", 0, 0, 0.12),
        ("fog-5", 0, 0, 1),
    ]
    run = Run.load(put_whole_run(tmp_path / "tent", "Tent", given))
    frame = frames.reliability([run], bins=10)
    assert frame["bin"].tolist() == [1, 9]
    assert frame["images"].tolist() == [1, 3]
    assert frame["confidence"].tolist() == pytest.approx([0.12, 0.98])
    assert frame["accuracy"].tolist() == pytest.approx([1, 2 / 3])
    ece = (0.88 + 3 * (0.98 - 2 / 3)) / 4
    assert frame["ece"].tolist() == pytest.approx([ece, ece])


def test_reliability_without_labels_is_empty(tmp_path):
    run = Run.load(put_whole_run(tmp_path / "tent", "Tent", [("fog-5", None, 0)]))
    assert frames.reliability([run]).empty


def test_cost(tmp_path):
    measured = {
        "images_per_second": 500.0,
        "forwards_per_batch": 2.0,
        "backwards_per_batch": 1.0,
        "inference": {"seconds_per_batch": 0.1, "peak_memory_bytes": 100},
        "update": {"seconds_per_batch": 0.1, "peak_memory_bytes": 300},
    }
    run = Run.load(put_whole_run(tmp_path / "tent", "Tent", rows(fog_5=5), cost=measured))
    without = Run.load(put_whole_run(tmp_path / "other", "Tent", rows(fog_5=6)))
    frame = frames.cost([run, without], ["a", "b"]).set_index("name")
    assert frame.loc["a"].to_dict() == {
        **{"accuracy": 0.5, "forwards": 2, "backwards": 1, "images_per_second": 500},
        **{"milliseconds": 2, "memory": 300},
    }
    assert frame.loc["b"].drop("accuracy").isna().all()


# Collapse -----------------------------------------------------------------------------------------


def many(predict, count=200):
    return [("fog-5", n % 10, predict(n)) for n in range(count)]


@pytest.fixture
def sound(tmp_path):
    return Run.load(put_whole_run(tmp_path / "source", "Source", many(lambda n: n % 10)))


def test_a_run_that_ends_in_one_class_collapsed(tmp_path, sound):
    rows_of = many(lambda n: n % 10 if n < 100 else 3)
    run = Run.load(put_whole_run(tmp_path / "tent", "Tent", rows_of))
    assert collapses(run, sound) == ["fog-5"]
    assert collapses(run, None) == ["fog-5"]  # by its own first half
    frame = frames.accuracies([sound, run]).set_index(["name", "domain"])
    assert frame.loc[("tent", "fog-5"), "collapsed"]
    assert frame.loc[("tent", "mean"), "collapsed"]
    assert not frame.loc[("source", "fog-5"), "collapsed"]


def test_half_of_the_classes_is_where_it_begins(tmp_path, sound):
    five = Run.load(put_whole_run(tmp_path / "five", "Tent", many(lambda n: n % 5)))
    four = Run.load(put_whole_run(tmp_path / "four", "Tent", many(lambda n: n % 4)))
    assert collapses(five, sound) == []
    assert collapses(four, sound) == ["fog-5"]


def test_few_classes_are_no_collapse_where_the_source_model_predicts_few(tmp_path):
    source = Run.load(put_whole_run(tmp_path / "source", "Source", many(lambda n: n % 2)))
    run = Run.load(put_whole_run(tmp_path / "tent", "Tent", many(lambda n: 0)))
    assert collapses(run, source) == []  # one class of two is half
    assert collapses(source, None) == []  # nothing adapts


def test_few_classes_that_are_right_are_no_collapse(tmp_path):
    alone = [("fog-5", 3, n % 10) for n in range(200)]
    source = Run.load(put_whole_run(tmp_path / "source", "Source", alone))
    run = Run.load(put_whole_run(tmp_path / "tent", "Tent", [("fog-5", 3, 3)] * 200))
    assert collapses(run, source) == []


def test_too_few_images_say_nothing(tmp_path):
    def ends(n):
        return n % 10 if n < 49 else 3

    run = Run.load(put_whole_run(tmp_path / "tent", "Tent", many(ends, count=98)))
    assert collapses(run, None) == []
    more = Run.load(put_whole_run(tmp_path / "more", "Tent", many(ends, count=99)))
    assert collapses(more, None) == ["fog-5"]


def test_a_model_that_is_weak_from_the_start_did_not_collapse(tmp_path):
    run = Run.load(put_whole_run(tmp_path / "tent", "Tent", many(lambda n: 3)))
    assert collapses(run, None) == []


def test_what_the_guard_found_counts(tmp_path, sound):
    run = Run.load(put_whole_run(tmp_path / "tent", "Tent", many(lambda n: n % 10)))
    run.results["collapse"] = {"alarms": 1, "detections": [{"segment": "fog-5", "batch": 3}]}
    assert collapses(run, sound) == ["fog-5"]


# Names --------------------------------------------------------------------------------------------


def test_runs_and_names_must_be_as_many(runs):
    with pytest.raises(InputError, match="1 names for 4 runs"):
        frames.accuracies(runs, ["one"])
    with pytest.raises(InputError, match="no runs"):
        frames.accuracies([])


def test_seeds_are_compared_with_their_like(runs, tmp_path):
    assert unlike(runs, group(runs)) == []
    assert "stream.seed" in unlike(runs[:3], group(runs[:3]))  # Tent lacks a seed
    served = stream(batch_size=7, **{k: seeded(1)[k] for k in ("seed", "plan_sha256")})
    other = Run.load(put_whole_run(tmp_path / "Tent_x", "Tent", rows(fog_5=1), served=served))
    assert "stream.batch_size" in unlike([*runs[:3], other], ["s", "s", "t", "t"])


def test_where_images_lie_and_the_order_of_domains_make_no_other_setting(tmp_path):
    def put(number, **changed):
        served = stream(seed=number, **changed)
        folder = tmp_path / f"tent_{number}"
        return Run.load(put_whole_run(folder, "Tent", rows(fog_5=5), served=served))

    elsewhere = {**stream()["source"], "root": "there"}
    found = [put(0), put(1, domains=["snow-5", "fog-5"]), put(2, source=elsewhere)]
    assert group(found) == ["tent"] * 3


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        (["tent_0", "tent_1"], ["tent", "tent"]),
        (["0/tent", "1/tent"], ["tent", "tent"]),
        (["seed3/tent", "seed4/tent"], ["tent", "tent"]),
        (["a", "b"], ["a and 1 more"] * 2),
        (["tent_10", "tent_11"], ["tent", "tent"]),
    ],
)
def test_repetitions_are_called_what_their_folders_have_in_common(tmp_path, folders, expected):
    found = [
        Run.load(put_whole_run(tmp_path / f, "Tent", rows(fog_5=n), served=seeded(n)))
        for n, f in enumerate(folders)
    ]
    assert group(found) == expected


def test_what_differs_in_more_than_seeds_is_no_repetition(tmp_path):
    def put(name, method="Tent", **changed):
        return Run.load(put_whole_run(tmp_path / name, method, rows(fog_5=5), **changed))

    found = [
        put("tent_0"),
        put("tent_1", method={"name": "Tent", "rule": {"name": "SGD", "lr": 0.1}}),
        put("tent_2", served=stream(batch_size=20)),
        put("tent_3", model={"name": "models.Net", "weights_sha256": "5d" * 32}),
        put("tent_4", callbacks={"STAG": {"weight": 1.0}}),
        put("tent_5", precision="bf16-mixed"),
    ]
    assert group(found) == [f"tent_{n}" for n in range(6)]
