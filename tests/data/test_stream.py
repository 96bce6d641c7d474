"""The stream serves its plan, whoever loads it and in whatever batches."""

import hashlib
import json

import numpy as np
import pytest
import torch

from tests.streams import make_source, make_stream
from tta_lightning.data import ArraySource, BadImageError, ImageSource, Stream
from tta_lightning.data.corruptions import COMMON, EXTRA, corrupt
from tta_lightning.data.geometry import Geometry
from tta_lightning.errors import InputError


def served(stream):
    """Position to (image, label)."""
    rows = {}
    for batch in stream.test_dataloader():
        for position, image, label in zip(batch.positions, batch.images, batch.labels, strict=True):
            rows[int(position)] = (image, int(label))
    return rows


def test_images_are_those_of_the_plan():
    stream = make_stream(seed=3)
    rows = served(stream)
    assert sorted(rows) == list(range(24))
    for position, (image, label) in rows.items():
        index, domain = int(stream.plan.samples[position]), stream.plan.domain(position)
        expected = corrupt(
            stream.source.load(index), domain.corruption, domain.severity, index=index, seed=3
        )
        assert torch.equal(
            (image * 255).round().to(torch.uint8).permute(1, 2, 0), torch.tensor(expected)
        )
        assert image.dtype == torch.float32
        assert 0 <= float(image.min()) <= float(image.max()) <= 1
        assert label == stream.source.labels[index]


def test_the_table_is_used():
    stream = make_stream(table="cifar", corruptions=["contrast"])
    for position, (image, _) in served(stream).items():
        index = int(stream.plan.samples[position])
        milder = corrupt(stream.source.load(index), "contrast", 3, index=index, table="cifar")
        assert torch.equal((image * 255).round().byte().permute(1, 2, 0), torch.tensor(milder))


@pytest.mark.parametrize("options", [{"batch_size": 3}, {"num_workers": 2}])
def test_batch_size_and_workers_do_not_matter(options):
    first, second = served(make_stream()), served(make_stream(**options))
    assert all(torch.equal(first[p][0], second[p][0]) for p in first)


def test_the_same_image_is_corrupted_alike_in_every_order():
    reset, mixed = make_stream(), make_stream(scenario="mixed_domains")

    def by_sample(stream):
        rows = served(stream)
        return {
            (int(stream.plan.samples[p]), stream.plan.domain(p)): image
            for p, (image, _) in rows.items()
        }

    first, second = by_sample(reset), by_sample(mixed)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("common", COMMON),
        ("extra", EXTRA),
        ("all", COMMON + EXTRA),
        ("fog", ("fog",)),
        (None, ("none",)),
    ],
)
def test_names_of_corruptions(given, expected):
    assert tuple(d.corruption for d in make_stream(corruptions=given).plan.domains) == expected


def test_subsets():
    first = make_stream(limit=4, subset="first")
    assert sorted(set(first.plan.samples.tolist())) == [0, 1, 2, 3]
    sampled = make_stream(limit=4, seed=1)
    assert len(set(sampled.plan.samples.tolist())) == 4
    assert sampled.plan.digest == make_stream(limit=4, seed=1).plan.digest
    assert sampled.plan.digest != make_stream(limit=4, seed=2).plan.digest
    assert make_stream(limit=99).plan.digest == make_stream().plan.digest


def test_a_saved_plan_is_replayed(tmp_path):
    stream = make_stream(scenario="mixed_domains", seed=5)
    stream.plan.save(tmp_path / "plan.json")
    again = Stream(make_source(), plan=str(tmp_path / "plan.json"), seed=5)
    assert again.describe()["plan_sha256"] == stream.describe()["plan_sha256"]
    with pytest.raises(InputError, match="holds 3"):
        Stream(make_source(3), plan=str(tmp_path / "plan.json"))


def classes_in_order(stream):
    return [int(label) for _, (_, label) in sorted(served(stream).items())]


def test_options_reach_the_scenario():
    stream = make_stream(
        30, scenario="label_shift", limit=20, scenario_options={"imbalance_ratio": float("inf")}
    )
    for labels in np.split(np.array(classes_in_order(stream)), 2):  # the two corruptions
        changes = int((labels[1:] != labels[:-1]).sum())
        assert changes == len(set(labels.tolist())) - 1
    described = stream.describe()
    assert described["scenario_options"] == {"imbalance_ratio": "inf"}
    json.dumps(described, allow_nan=False)


def test_options_in_the_description(tmp_path):
    assert make_stream().describe()["scenario_options"] == {}
    shift = make_stream(scenario="label_shift")
    assert shift.describe()["scenario_options"] == {"imbalance_ratio": 500_000}
    milder = make_stream(scenario="label_shift", scenario_options={"imbalance_ratio": 2.0})
    assert milder.describe()["scenario_options"] == {"imbalance_ratio": 2.0}
    assert milder.plan.digest != shift.plan.digest
    milder.plan.save(tmp_path / "plan.json")
    again = make_stream(plan=str(tmp_path / "plan.json")).describe()
    assert "scenario_options" not in again  # those of the plan are not known
    assert again["plan_sha256"] == milder.plan.digest


def test_the_plan_decides_how_it_is_served(tmp_path):
    clean = make_source(seed=9)
    stream = make_stream(scenario="sliding_window", scenario_options={"window": 7}, clean=clean)
    loader = stream.test_dataloader()
    assert len(loader) == 24
    assert [len(batch.images) for batch in loader] == [1] * 24
    assert [len(images) for images in stream.clean_batches()] == [5, 5, 2]
    described = stream.describe()
    assert (described["batch_size"], described["clean_batch_size"]) == (1, 5)
    assert described["window"] == 7
    assert "reset_each_batch" not in described
    stream.plan.save(tmp_path / "plan.json")
    again = make_stream(plan=str(tmp_path / "plan.json")).describe()
    assert (again["scenario"], again["batch_size"], again["window"]) == ("sliding_window", 1, 7)
    assert "clean_batch_size" not in again  # it has no clean images
    assert make_stream(scenario="episodic").describe()["reset_each_batch"] is True
    plain = make_stream(clean=clean).describe()
    assert plain["batch_size"] == 5
    assert not {"clean_batch_size", "window", "reset_each_batch"} & set(plain)


def test_the_subset_is_known_by_its_hash():
    """Whatever the order, and however often an image comes."""
    seven = [make_stream(limit=7, subset="first", seed=s, scenario=n) for s, n in enumerate(SOME)]
    expected = hashlib.sha256(json.dumps([0, 1, 2, 3, 4, 5, 6]).encode()).hexdigest()
    assert {stream.describe()["subset_sha256"] for stream in seven} == {expected}
    sampled = make_stream(limit=7, seed=1).describe()
    assert sampled["subset_sha256"] != expected
    assert (sampled["limit"], sampled["subset"], sampled["seed"]) == (7, "sample", 1)


SOME = ("continual", "mixed_domains", "recurring", "gradual", "correlated", "single_sample")


class OnDisk(ImageSource):
    """Two corruptions at two severities whose pixels say which they are."""

    classes = ("a", "b")
    domains = (("fog", 3), ("fog", 5), ("snow", 3), ("snow", 5))

    def __init__(self):
        self.labels = np.array([0, 1, 0], dtype=np.int64)

    def load(self, index, corruption="none", severity=0):
        self.check(index, corruption, severity)
        return np.full((8, 8, 3), 10 * severity + (corruption == "snow"), np.uint8)

    def path(self, index, corruption="none", severity=0):
        return f"{corruption}/{severity}/{index}.png"


def test_stored_corruptions_are_read_not_made():
    stream = Stream(OnDisk(), severity=5)
    assert [str(d) for d in stream.plan.domains] == ["fog-5", "snow-5"]
    values = [int((image * 255).round().max()) for image, _ in served(stream).values()]
    assert sorted(values) == [50, 50, 50, 51, 51, 51]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"severity": 4}, "no corruption at severity 4"),
        ({"corruptions": ["frost"]}, "frost-5"),
        ({"corruptions": ["none"]}, "none"),
    ],
)
def test_corruptions_that_are_not_stored(options, message):
    with pytest.raises(InputError, match=message):
        Stream(OnDisk(), **{"severity": 5, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"severity": 6}, "severity 6"),
        ({"corruptions": ["fogg"]}, "Did you mean 'fog'"),
        ({"scenario": "continuall"}, "Did you mean 'continual'"),
        ({"scenario_options": {"ratio": 2}}, "reset_each_shift has no options.*'ratio'"),
        (
            {"scenario": "label_shift", "scenario_options": {"imbalance": 2}},
            "Unknown option of label_shift 'imbalance'. Did you mean 'imbalance_ratio'?",
        ),
        (
            {"scenario": "label_shift", "scenario_options": {"imbalance_ratio": 0.9}},
            "imbalance_ratio = 0.9: expected 1",
        ),
        ({"scenario": "recurring", "scenario_options": {"rounds": 2.5}}, "rounds = 2.5"),
        ({"scenario": "gradual", "corruptions": None}, "'none' is the image as it is"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"limit": 0}, "limit = 0"),
        ({"corruptions": []}, "empty list"),
        ({"table": "imagnet"}, "imagenet"),
        ({"corruptions": ["fog", "fog"]}, "twice"),
    ],
)
def test_arguments_that_are_not_possible(options, message):
    with pytest.raises(InputError, match=message):
        make_stream(**options)


class WithABadImage(ArraySource):
    def load(self, index, corruption="none", severity=0):
        if index == 2:
            raise BadImageError("images/2.jpg is truncated.")
        return super().load(index, corruption, severity)


def test_a_bad_image_is_handed_on_with_its_reason():
    source = make_source(4)
    bad = WithABadImage(np.stack([source.load(i) for i in range(4)]), source.labels, source.classes)
    stream = Stream(bad, batch_size=4, num_workers=1)
    (batch,) = stream.test_dataloader()
    position = stream.plan.samples.tolist().index(2)
    assert len(batch.images) == len(batch.labels) == len(batch.positions) == 3
    assert batch.bad == ((position, "images/2.jpg is truncated."),)


def test_geometry():
    wide = np.zeros((20, 40, 3), np.uint8)
    wide[:, 20:] = 200
    assert Geometry()(wide) is wide
    assert Geometry(20)(wide[:, :20]).shape == (20, 20, 3)
    small = Geometry(16, crop_pct=0.8)(wide)  # 20 px to 20 px, then the centre 16
    assert np.array_equal(small, wide[2:18, 12:28])
    assert Geometry(32)(wide).shape == (32, 32, 3)


def test_the_model_decides_the_size_unless_the_user_does():
    stream = make_stream()
    assert served(stream)[0][0].shape == (3, 32, 32)
    stream.suit(28, 1.0, "bilinear")
    assert served(stream)[0][0].shape == (3, 28, 28)
    fixed = make_stream(image_size=28)
    fixed.suit(64, 0.9, "bicubic")
    assert fixed.geometry == Geometry(28, 0.9, "bicubic")
    kept = make_stream(image_size="keep", crop_pct=0.5)
    kept.suit(64, 0.9, "bicubic")
    assert kept.geometry.size is None
