"""What is on the picture of curves."""

import numpy as np
import pytest

from tests.report.run_folders import metrics
from tta_lightning.report import plots


@pytest.fixture
def drawn(monkeypatch):
    """``drawn(runs)`` returns the upper and the lower panel instead of a PNG."""

    def call(runs):
        figures = []
        with monkeypatch.context() as patch:
            patch.setattr(plots.Figure, "savefig", lambda figure, *a, **k: figures.append(figure))
            plots.draw_curves(runs)
        (figure,) = figures
        return figure.axes

    return call


def segments(count, accuracy=0.5):
    return {f"fog-5 ({number})": accuracy for number in range(count)}


def vertical(axes):
    return [line.get_xdata()[0] for line in axes.lines if list(line.get_ydata()) == [0, 1]]


@pytest.mark.parametrize(("count", "labels"), [(15, 15), (30, 30), (31, 16), (135, 27), (300, 30)])
def test_labels_of_segments_do_not_run_into_each_other(drawn, count, labels):
    _, wholes = drawn({"tent": metrics(segments(count))})
    texts = [label.get_text() for label in wholes.get_xticklabels()]
    assert len(texts) == labels
    for place, text in zip(wholes.get_xticks(), texts, strict=True):
        assert text == f"fog-5 ({place})"


@pytest.mark.parametrize(("count", "edges"), [(4, 3), (60, 59), (61, 0), (300, 0)])
def test_lines_between_segments_do_not_hide_the_curves(drawn, count, edges):
    curves, _ = drawn({"tent": metrics(segments(count)), "eata": metrics(segments(count))})
    assert vertical(curves) == [20 * (edge + 1) for edge in range(edges)]


def test_edges_that_differ_between_runs_are_not_drawn(drawn):
    curves, _ = drawn({"tent": metrics(segments(4)), "eata": metrics(segments(3))})
    assert vertical(curves) == []


def test_a_segment_of_one_batch_is_a_dot_and_a_longer_one_a_line(drawn):
    results = metrics(segments(3))
    results["curve"] |= {"images": [20] * 4, "correct": [10, 4, 8, 20], "entropy": [1.0] * 4}
    curves, _ = drawn({"tent": results})  # the last segment has two batches
    line, dots = curves.lines[:2]
    nan = np.nan
    np.testing.assert_array_equal(line.get_xdata(), [20, nan, 40, nan, 60, 80, nan])
    np.testing.assert_allclose(line.get_ydata(), [50, nan, 20, nan, 40, 70, nan])
    assert (line.get_linestyle(), line.get_marker()) == ("-", "None")
    assert (dots.get_linestyle(), dots.get_marker()) == ("None", ".")
    np.testing.assert_allclose(dots.get_xydata(), [[20, 50], [40, 20]])


def test_many_segments_are_a_line_and_few_are_bars(drawn):
    _, wholes = drawn({"tent": metrics(segments(60, 0.25))})
    assert [bar.get_height() for bar in wholes.patches] == [25] * 60
    assert len(wholes.lines) == 0
    _, wholes = drawn({"tent": metrics(segments(61, 0.25))})
    assert len(wholes.patches) == 0
    assert wholes.lines[0].get_ydata().tolist() == [25] * 61


def test_bars_of_runs_with_other_segments_stand_over_their_names(drawn):
    one = metrics({"fog-5": 0.2, "snow-5": 0.4})
    other = metrics({"snow-5": 0.6, "frost-5": 0.8})
    _, wholes = drawn({"one": one, "other": other})
    names = [label.get_text() for label in wholes.get_xticklabels()]
    assert names == ["fog-5", "snow-5", "frost-5"]
    found = [
        (names[round(bar.get_center()[0])], round(bar.get_height()))
        for bar in wholes.patches
        if np.isfinite(bar.get_height())
    ]
    assert found == [("fog-5", 20), ("snow-5", 40), ("snow-5", 60), ("frost-5", 80)]


def test_ten_runs_look_different_in_both_panels(drawn):
    runs = {f"run{number}": metrics({"fog-5": 0.5}) for number in range(10)}
    curves, wholes = drawn(runs)
    assert curves.lines[0].get_label() == "run0"
    lines = [line for line in curves.lines if line.get_label() in runs]
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 10
    looks = {(bar.get_facecolor(), bar.get_hatch()) for bar in wholes.patches}
    assert len(looks) == 10
    legend = [text.get_text() for text in curves.get_legend().get_texts()]
    assert legend == list(runs)


def test_a_stream_without_labels_shows_its_entropy(drawn):
    results = metrics({"fog-5": None, "snow-5": None})
    results["curve"]["correct"] = None
    curves, wholes = drawn({"tent": results})
    assert curves.lines[1].get_ydata().tolist() == [1.0, 1.0]  # two dots
    assert [bar.get_height() for bar in wholes.patches] == [1.0, 1.0]
    assert "entropy" in wholes.get_ylabel()


def test_the_picture_is_a_png_without_a_warning():
    picture = plots.draw_curves({"tent": metrics(segments(3)), "eata": metrics(segments(70))})
    assert picture.startswith(b"\x89PNG")
