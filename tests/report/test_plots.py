"""What is on the figures, read off what is given to the renderer."""

import re

import numpy as np
import pandas as pd
import pytest

from tests.report.run_folders import metrics, put_run, put_whole_run
from tta_lightning.report import Run, frames, pictures, plots


def run_of(folder, accuracies, **curve):
    """A run with a batch of 20 images a segment, or the batches that are given."""
    measured = metrics(accuracies)
    measured["curve"] |= curve
    return Run.load(put_run(folder, measured=measured))


def segments(count, accuracy=0.5):
    return {f"fog-5 ({number})": accuracy for number in range(count)}


def layers(chart):
    """The layers of a chart by the kind of their marks, with their rows."""
    spec = chart.to_dict()
    found = {}
    for layer in spec["layer"]:
        name = layer.get("data", spec.get("data"))["name"]  # the chart's, where all share it
        rows = spec["datasets"][name]
        found.setdefault(layer["mark"]["type"], []).append((layer["encoding"], rows))
    return found


def test_lines_are_the_running_accuracy(tmp_path):
    curve = {"images": [20] * 4, "correct": [10, 4, 8, 20], "entropy": [1.0] * 4}
    run = run_of(tmp_path / "tent", segments(3), **curve)
    chart = layers(plots.running_accuracy(frames.curves([run])))
    ((encoding, rows),) = chart["line"]
    assert [row["seen"] for row in rows] == [20, 40, 60, 80]
    assert [row["running_accuracy"] for row in rows] == [0.5, 0.2, 0.4, 0.7]
    assert encoding["detail"]["field"] == "visit"  # no line from one segment to the next
    ((_, dots),) = chart["point"]  # a line of one point is none
    assert [row["seen"] for row in dots] == [20, 40]


@pytest.mark.parametrize(("count", "edges"), [(1, 0), (4, 3), (60, 59), (61, 0), (300, 0)])
def test_lines_between_segments_do_not_hide_the_curves(tmp_path, count, edges):
    runs = [run_of(tmp_path / name, segments(count)) for name in ("tent", "eata")]
    chart = layers(plots.running_accuracy(frames.curves(runs)))
    rules = [row["seen"] for _, rows in chart.get("rule", []) for row in rows]
    assert rules == [20 * (edge + 1) for edge in range(edges)]
    names = [row["segment"] for _, rows in chart.get("text", []) for row in rows]
    assert names == ([f"fog-5 ({n})" for n in range(count)] if 1 < count <= 20 else [])


def test_edges_that_differ_between_runs_are_not_drawn(tmp_path):
    runs = [run_of(tmp_path / f"r{count}", segments(count)) for count in (4, 3)]
    assert "rule" not in layers(plots.running_accuracy(frames.curves(runs)))


def test_repetitions_have_a_band(tmp_path):
    runs = [run_of(tmp_path / f"r{a}", {"fog-5": a, "snow-5": 0.5}) for a in (0.4, 0.6)]
    chart = layers(plots.running_accuracy(frames.curves(runs, ["tent", "tent"])))
    ((_, rows),) = chart["area"]
    assert [row["sd"] for row in rows] == [pytest.approx(np.std([0.4, 0.6], ddof=1), abs=1e-5), 0]
    assert "area" not in layers(plots.running_accuracy(frames.curves(runs)))


def test_thirty_names_look_different():
    frame = pd.DataFrame({"name": [f"run{n}" for n in range(30)], "segment": "fog-5"})
    frame = frame.assign(visit=0, seen=1, running_accuracy=0.5, sd=np.nan)
    (line,) = [
        layer
        for layer in plots.running_accuracy(frame).to_dict()["layer"]
        if layer["mark"]["type"] == "line"
    ]
    colours, dashes = (line["encoding"][k]["scale"]["range"] for k in ("color", "strokeDash"))
    assert len({(c, tuple(d)) for c, d in zip(colours, dashes, strict=True)}) == 30
    assert line["encoding"]["color"]["scale"]["domain"] == [f"run{n}" for n in range(30)]


def test_a_name_has_one_colour_in_every_figure(tmp_path):
    run = Run.load(put_whole_run(tmp_path / "b", "Tent", [("fog-5", 0, 0)] * 20))
    names = ["a", "b", "c"]
    charts = [
        plots.running_accuracy(frames.curves([run]), names),
        plots.segment_accuracy(frames.segments([run]), names),
        plots.reliability(frames.reliability([run]), names),
    ]
    for chart in charts:
        scales = re.findall(
            r"'domain': \['a', 'b', 'c'\], 'range': \['(#\w+)', '(#\w+)'", f"{chart.to_dict()}"
        )
        assert set(scales) == {plots.COLOURS[:2]}


def test_colours_are_told_apart_and_from_the_ground():
    assert len(set(plots.COLOURS)) == len(plots.COLOURS) == 9
    assert all(re.fullmatch("#[0-9A-F]{6}", colour) for colour in plots.COLOURS)


def test_many_segments_are_a_line_and_few_are_bars(tmp_path):
    few = run_of(tmp_path / "few", segments(60, 0.25))
    ((_, rows),) = layers(plots.segment_accuracy(frames.segments([few])))["bar"]
    assert [row["accuracy"] for row in rows] == [0.25] * 60
    many = run_of(tmp_path / "many", segments(61, 0.25))
    ((encoding, rows),) = layers(plots.segment_accuracy(frames.segments([many])))["line"]
    assert len(rows) == 61
    assert len(encoding["x"]["axis"]["values"]) <= 40  # names do not run into each other


def test_more_names_than_colours_are_lines_with_dashes(tmp_path):
    runs = [run_of(tmp_path / f"r{n}", {"fog-5": 0.5, "snow-5": 0.5}) for n in range(10)]
    assert "bar" in layers(plots.segment_accuracy(frames.segments(runs[:9])))
    ((encoding, _),) = layers(plots.segment_accuracy(frames.segments(runs)))["line"]
    looks = zip(*(encoding[k]["scale"]["range"] for k in ("color", "strokeDash")), strict=True)
    assert len({(colour, tuple(dash)) for colour, dash in looks}) == 10


def test_bars_of_runs_with_other_segments_stand_over_their_names(tmp_path):
    one = run_of(tmp_path / "one", {"fog-5": 0.2, "snow-5": 0.4})
    other = run_of(tmp_path / "other", {"snow-5": 0.6, "frost-5": 0.8})
    ((encoding, rows),) = layers(plots.segment_accuracy(frames.segments([one, other])))["bar"]
    assert encoding["x"]["sort"] == ["fog-5", "snow-5", "frost-5"]
    found = [(row["name"], row["segment"], row["accuracy"]) for row in rows]
    assert found == [
        *[("one", "fog-5", 0.2), ("one", "snow-5", 0.4)],
        *[("other", "snow-5", 0.6), ("other", "frost-5", 0.8)],
    ]


def test_a_stream_without_labels_shows_its_entropy(tmp_path):
    run = run_of(tmp_path / "tent", {"fog-5": None, "snow-5": None}, correct=None)
    ((encoding, rows),) = layers(plots.running_accuracy(frames.curves([run])))["line"]
    assert [row["running_entropy"] for row in rows] == [1.0, 1.0]
    assert "entropy" in encoding["y"]["title"]
    ((encoding, rows),) = layers(plots.segment_accuracy(frames.segments([run])))["bar"]
    assert [row["entropy"] for row in rows] == [1.0, 1.0]
    assert "entropy" in encoding["y"]["title"]


def test_the_heat_map_has_a_cell_a_class_and_stretch(tmp_path):
    stream = [("fog-5", 0, 0)] * 10 + [("snow-5", 0, 1)] * 10
    run = Run.load(put_whole_run(tmp_path / "tent", "Tent", stream))
    ((encoding, rows),) = layers(plots.prediction_histogram(frames.over_time(run, bins=2)))["rect"]
    shares = {(row["start"], row["class"]): row["share"] for row in rows}
    assert shares == {(0, "0"): 1, (0, "1"): 0, (10, "0"): 0, (10, "1"): 1}
    assert encoding["y"]["sort"] == ["0", "1"]
    assert encoding["color"]["scale"]["scheme"] == "cividis"


def test_class_change_names_the_dead_and_shows_the_ends_of_many():
    frame = pd.DataFrame({"class": range(100), "images": 10, "predicted": 5, "before": 0.5})
    frame["after"] = frame["class"] / 100
    frame["change"] = frame["after"] - frame["before"]
    frame.loc[0, "predicted"] = 0
    chart = layers(plots.class_change(frame))
    ((encoding, rows),) = chart["bar"]
    assert encoding["y"]["sort"] == [*range(20), *range(80, 100)]
    assert [row["class"] for row in rows if row["note"] == "never predicted"] == [0]
    assert [row["class"] for row in rows if row["gained"]] == list(range(80, 100))


def test_reliability_leaves_bins_of_few_images_out():
    frame = pd.DataFrame({"name": "a", "bin": [0, 1], "confidence": [0.1, 0.2], "ece": 0.1})
    frame = frame.assign(accuracy=[1.0, 0.2], images=[9, 10])
    lines = layers(plots.reliability(frame))["line"]
    assert [[row["confidence"] for row in rows] for _, rows in lines] == [[0, 1], [0.2]]


def test_cost_leaves_out_what_was_not_measured():
    frame = pd.DataFrame({"name": ["a", "b"], "accuracy": 0.5, "milliseconds": [2.0, np.nan]})
    frame = frame.assign(images_per_second=1.0, forwards=1.0, backwards=1.0, memory=1e6)
    ((encoding, rows),) = layers(plots.cost(frame))["point"]
    assert [row["name"] for row in rows] == ["a"]
    assert encoding["x"]["scale"]["type"] == "log"


def test_every_figure_says_what_it_is(tmp_path):
    run = Run.load(put_whole_run(tmp_path / "tent", "Tent", [("fog-5", 0, 0)] * 20))
    time = frames.over_time(run)
    charts = [
        plots.running_accuracy(frames.curves([run])),
        plots.segment_accuracy(frames.segments([run])),
        plots.prediction_histogram(time),
        plots.entropy_over_time(time),
        plots.class_change(frames.per_class(run, run)),
        plots.reliability(frames.reliability([run])),
    ]
    for chart in charts:
        assert len(chart.to_dict()["description"]) > 20


@pytest.mark.parametrize(("form", "begin"), [("png", b"\x89PNG"), ("pdf", b"%PDF")])
def test_a_figure_is_written_without_a_browser(tmp_path, form, begin):
    run = run_of(tmp_path / "tent", segments(3))
    assert pictures.draw(plots.running_accuracy(frames.curves([run])), form).startswith(begin)


def test_curves_picture_of_runs_of_different_length(tmp_path):
    runs = [run_of(tmp_path / f"r{n}", segments(n)) for n in (3, 70)]
    assert pictures.draw_curves(runs).startswith(b"\x89PNG")


def test_save_writes_both_forms(tmp_path):
    run = run_of(tmp_path / "tent", segments(2))
    paths = pictures.save(plots.running_accuracy(frames.curves([run])), tmp_path, "curves")
    assert [path.name for path in paths] == ["curves.png", "curves.pdf"]
    assert all(path.stat().st_size > 1000 for path in paths)
