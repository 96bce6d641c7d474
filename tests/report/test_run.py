"""A run as tidy frames: every figure against one that was worked out by hand."""

import numpy as np
import pytest

from tests.report.run_folders import put_predictions, put_run, put_whole_run
from tta_lightning.errors import InputError
from tta_lightning.report import Run

ROWS = [
    *[("fog-5", 0, 0), ("fog-5", 1, 0), ("fog-5", 2, 2)],
    *[("snow-5", 0, 1), ("snow-5", 1, 1), ("snow-5", 2, -1)],
]


@pytest.fixture
def run(tmp_path):
    return Run.load(put_whole_run(tmp_path / "tent", "Tent", ROWS, batch=2))


def test_predictions(run):
    frame = run.predictions
    assert frame["segment"].tolist() == ["fog-5"] * 3 + ["snow-5"] * 3
    assert frame["corruption"].tolist() == ["fog"] * 3 + ["snow"] * 3
    assert frame["severity"].tolist() == [5] * 6
    assert frame["label"].tolist() == [0, 1, 2] * 2
    assert frame["prediction"].tolist() == [0, 0, 2, 1, 1, -1]
    assert frame["correct"].tolist() == [True, False, True, False, True, False]
    assert frame["batch"].tolist() == [0, 0, 1, 2, 2, 3]
    assert frame["confidence"].tolist() == [0.9] * 6
    assert frame["updated"].tolist() == [True] * 6
    assert frame["path"].tolist() == [f"{n}.png" for n in range(6)]


def test_predictions_without_labels(tmp_path):
    rows = [("fog-5", None, 0), ("fog-5", None, 1)]
    frame = Run.load(put_whole_run(tmp_path / "tent", "Tent", rows)).predictions
    assert frame["label"].isna().all()
    assert frame["correct"].isna().all()


def test_a_path_may_read_like_a_missing_value(tmp_path):
    folder = put_whole_run(tmp_path / "tent", "Tent", ROWS)
    path = folder / "predictions.csv"
    path.write_text(path.read_text().replace("0.png", "NA").replace("1.png", "null"))
    assert Run.load(folder).predictions["path"].tolist()[:2] == ["NA", "null"]


def test_a_confidence_that_is_none(tmp_path):
    folder = put_whole_run(tmp_path / "tent", "Tent", ROWS)
    path = folder / "predictions.csv"
    path.write_text(path.read_text().replace("0.900000,0.500000", "nan,nan", 1))
    frame = Run.load(folder).predictions
    assert np.isnan(frame["confidence"][0])
    assert np.isnan(frame["entropy"][0])


def test_metrics(run):
    frame = run.metrics
    assert frame["segment"].tolist() == ["fog-5", "snow-5"]
    assert frame["accuracy"].tolist() == [2 / 3, 1 / 3]
    assert frame["images"].tolist() == [3, 3]
    assert frame["nll"].isna().all()


def test_curve(run):
    frame = run.curve
    assert frame["batch"].tolist() == [0, 1, 2, 3]
    assert frame["segment"].tolist() == ["fog-5", "fog-5", "snow-5", "snow-5"]
    assert frame["seen"].tolist() == [2, 3, 5, 6]
    assert frame["correct"].tolist() == [1, 1, 1, 0]
    assert frame["accuracy"].tolist() == [0.5, 1, 0.5, 0]
    assert frame["running_accuracy"].tolist() == [0.5, 2 / 3, 0.5, 1 / 3]
    assert frame["running_entropy"].tolist() == [0.5] * 4


def test_running_accuracy_is_that_of_labelled_images(run):
    run.results["curve"] |= {"correct": [1, 0, 0, 1], "labelled": [1, 1, 0, 1]}
    frame = run.curve
    np.testing.assert_allclose(frame["accuracy"], [1, 0, np.nan, 1])
    np.testing.assert_allclose(frame["running_accuracy"], [1, 0.5, np.nan, 1])


def test_running_entropy_leaves_batches_of_nan_out(run):
    run.results["curve"]["entropy"] = [None, 0.2, 0.4, 1.0]
    frame = run.curve
    np.testing.assert_allclose(frame["running_entropy"], [np.nan, 0.2, 0.4, 0.6])


def test_manifest(run):
    values = dict(zip(run.manifest["field"], run.manifest["value"], strict=True))
    assert values["method.name"] == "Tent"
    assert values["stream.batch_size"] == 10
    assert values["stream.corruptions"] == ["fog", "snow"]
    assert values["stream.clean"] is None
    assert values["stream.scenario_options"] == {}
    assert not any(isinstance(value, dict) and value for value in values.values())


def test_a_run_without_predictions_says_which_callback_it_needs(tmp_path):
    run = Run.load(put_run(tmp_path / "tent"))
    with pytest.raises(InputError, match=r"predictions\.csv cannot be read.*PredictionWriter"):
        _ = run.predictions


@pytest.mark.parametrize(
    ("old", "new"), [("prediction", "guess"), (",0.900000,", ",high,"), ("fog,5,1,", "fog,5,one,")]
)
def test_predictions_that_were_changed_are_refused(tmp_path, old, new):
    folder = put_predictions(put_run(tmp_path / "tent"), ROWS)
    path = folder / "predictions.csv"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(InputError, match="not as it was written"):
        _ = Run.load(folder).predictions


def test_frames_are_read_once(run):
    assert run.predictions is run.predictions
