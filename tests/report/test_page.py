"""The page as text: what stands in it, and that its parts can be read without seeing it."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from tests.report.run_folders import put_run, put_whole_run, stream
from tta_lightning.errors import InputError
from tta_lightning.report import Run
from tta_lightning.report.detail import Pictures, pictures_each
from tta_lightning.report.page import Page
from tta_lightning.report.samples import examples, picture

COST = {
    "images_per_second": 500.0,
    "forwards_per_batch": 2.0,
    "backwards_per_batch": 1.0,
    "inference": {"seconds_per_batch": 0.1, "peak_memory_bytes": 5_000_000},
}


class Reader(HTMLParser):
    """Collects elements with their attributes, and the text of tables."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.rows = [], []
        self._cell = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        self._cell = tag in ("td", "th") or (self._cell and tag in ("small", "span", "br"))
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self._cell = False

    def handle_data(self, data):
        if self._cell:
            self.rows[-1][-1] += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def row(self, name):
        found = [row for row in self.rows if row and row[0].strip() == name]
        return [" ".join(cell.split()) for cell in found[0]]


def body(page):
    """The page without the library that draws and without what it is to draw."""
    return re.sub(r"<script.*?</script>", "", page.html(), flags=re.DOTALL)


def images(index, corruption, severity):
    return np.full((8, 8, 3), 20 * index % 256, np.uint8)


def rows(right, label=lambda n: n % 5, segments=("fog-5", "snow-5")):
    return [
        (s, label(n), label(n) if n < count else (label(n) + 1) % 5)
        for s, count in zip(segments, right, strict=True)
        for n in range(10)
    ]


@pytest.fixture
def runs(tmp_path):
    given = {"source": ("Source", (4, 6)), "tent": ("Tent", (7, 5)), "sar": ("SAR", (4, 6))}
    return [
        Run.load(put_whole_run(tmp_path / name, method, rows(right), cost=COST))
        for name, (method, right) in given.items()
    ]


def test_the_summary_has_accuracy_and_gain(runs):
    page = Reader(body(Page(runs)))
    assert page.row("fog-5") == ["fog-5", "40.0", "70.0 +30.0", "40.0 +0.0"]
    assert page.row("snow-5") == ["snow-5", "60.0", "50.0 −10.0", "60.0 +0.0"]  # noqa: RUF001
    assert page.row("mean") == ["mean", "50.0", "60.0 +10.0", "50.0 +0.0"]
    tones = [a["class"] for a in page.all("span") if a.get("class") in ("gain", "loss", "same")]
    assert tones == ["gain", "same", "loss", "same", "gain", "same"]


def test_the_summary_averages_seeds(tmp_path):
    def put(method, seed, right):
        served = stream(seed=seed, plan_sha256=f"{seed}a" * 32)
        folder = tmp_path / f"{method}_{seed}"
        return Run.load(put_whole_run(folder, method, rows(right), served=served))

    found = [put("Source", 0, (4, 6)), put("Source", 1, (2, 6))]
    found += [put("Tent", 0, (7, 5)), put("Tent", 1, (3, 5))]
    page = Reader(body(Page(found)))
    # gains of 30 and 10 points; deviations: 20/sqrt(2), 40/sqrt(2), 20/sqrt(2)
    assert page.row("fog-5") == ["fog-5", "30.0 ± 14.1", "50.0 ± 28.3 +20.0 ± 14.1"]


def test_the_best_and_the_worse_are_named(runs):
    text = body(Page(runs))
    assert "Best on average: 60.0 %, tent (+10.0 points over its source model)." in text
    assert "Worse than the source model" not in text


def test_runs_that_are_equally_good_are_all_named(runs):
    assert "Best on average: 50.0 %, source and sar (+0.0 points" in body(Page([runs[0], runs[2]]))


def test_a_loss_is_named(tmp_path, runs):
    bad = Run.load(put_whole_run(tmp_path / "eata", "EATA", rows((1, 5))))
    text = body(Page([*runs, bad]))
    assert "Worse than the source model on average: eata (−20.0)." in text  # noqa: RUF001


def test_a_collapse_is_flagged_and_named(tmp_path):
    good = [("fog-5", n % 10, n % 10) for n in range(200)]
    bad = [("fog-5", n % 10, 3) for n in range(200)]
    found = [
        Run.load(put_whole_run(tmp_path / "source", "Source", good)),
        Run.load(put_whole_run(tmp_path / "tent", "Tent", bad)),
    ]
    text = body(Page(found))
    assert "Collapsed: tent (fog-5)." in text
    assert Reader(text).row("fog-5")[2].endswith("⚠ collapsed")
    assert "Never predicted: 0, 1, 2, 4" in text


def test_every_figure_has_text_and_a_specification(runs):
    html = Page(runs).html()
    page = Reader(html)
    charts = [a for a in page.all("div") if "data-figure" in a]
    # two of curves, cost, and four of each run but the source model
    assert len(charts) == 3 + 2 * 4
    specs = re.findall(r'data-spec="([\w-]+)">(.*?)</script>', html)
    assert [a["data-figure"] for a in charts] == [name for name, _ in specs]
    for attributes in charts:
        assert len(attributes["data-title"]) > 3
        assert len(attributes["data-text"]) > 10
    for _, spec in specs:
        assert json.loads(spec)["description"]
    assert len(page.all("figcaption")) == len(charts)


def test_tables_have_captions_and_headers(runs):
    page = Reader(body(Page(runs)))
    assert len(page.all("caption")) == len(page.all("table")) > 5
    assert all("scope" in attributes for attributes in page.all("th"))
    assert "lang" in page.all("html")[0]


def test_nothing_is_loaded_from_elsewhere(runs):
    page = Reader(body(Page(runs, pictures=lambda run: Pictures(images, None))))
    addresses = [a[key] for _, a in page.elements for key in ("src", "href") if key in a]
    assert addresses
    assert all(address.startswith(("#", "data:")) for address in addresses)
    assert all(attributes.get("src") is None for attributes in page.all("script"))


def test_names_are_text_and_no_markup(tmp_path):
    name = "<b>x</b>&\"'</script><script>alert(1)</script>"
    run = Run.load(put_whole_run(tmp_path / "tent", "Tent", rows((7, 5))))
    html = Page([run], [name], title=name).html()
    assert "<script>alert" not in html
    assert "<b>x" not in html
    assert Reader(body(Page([run], [name]))).row("fog-5")[1] == "70.0"


def test_cost_is_a_table_too(runs):
    page = Reader(body(Page(runs)))
    assert page.row("tent") == ["tent", "60.0", "2.00", "1.00", "500", "2.00", "5"]


def test_without_labels_the_page_is_about_entropy(tmp_path):
    given = [("fog-5", None, n % 3) for n in range(20)]
    run = Run.load(put_whole_run(tmp_path / "tent", "Tent", given))
    page = Page([run], pictures=lambda run: Pictures(images, None))
    text = body(page)
    assert Reader(text).row("fog-5") == ["fog-5", "0.50"]
    assert "no labels" in text
    assert "Most and least certain" in text
    assert "Best on average" not in text
    assert [figure.id for figure in page.figures] == [
        "curves-running",
        *("run-1-classes-over-time", "run-1-entropy", "run-1-class-change"),
    ]


def test_runs_of_different_protocols_are_said_to_be(runs, tmp_path):
    other = put_whole_run(tmp_path / "o", "Tent", rows((1, 1)), served=stream(batch_size=7))
    text = body(Page([*runs, Run.load(other)]))
    assert "follow different protocols" in text
    assert "batch_size" in text
    assert "Best on average" not in text
    assert 'class="best"' not in text
    assert "follow different protocols" not in body(Page(runs))


def test_manifests_and_what_differs_in_them(runs):
    page = Reader(body(Page(runs)))
    assert page.row("method.name") == ["method.name", "Source", "Tent", "SAR"]
    shown = [row for row in page.rows if row and row[0] == "stream.batch_size"]
    assert shown == [["stream.batch_size", "10"]] * 3  # in each manifest, and not as a difference


def test_a_run_that_ended_early_is_named(tmp_path, runs):
    runs[1].results.update(completed=False, stopped="disk full", nonfinite_batches=2)
    text = body(Page(runs))
    said = "tent: it ended early (disk full); batches that were not finite: 2."
    assert said in text


# Images -------------------------------------------------------------------------------------------


def test_examples_are_what_the_run_fixed_and_broke(runs):
    source, tent, _ = runs
    found = examples(tent, source, most=2)
    by_kind = {(e.segment, e.kind) for e in found}
    assert by_kind == {("fog-5", "fixed"), ("snow-5", "broke")}
    fixed = [e for e in found if e.kind == "fixed"]
    assert len(fixed) == 2
    assert {e.index for e in fixed} <= {4, 5, 6}  # right for tent, wrong for source
    assert all(e.after == e.label != e.before for e in fixed)
    (broke,) = [e for e in found if e.kind == "broke"]
    assert (broke.index, broke.corruption, broke.severity) == (15, "snow", 5)
    assert examples(tent, source, most=2) == found  # the same each time


def test_examples_without_a_source_are_the_most_and_least_certain(tmp_path):
    given = [("fog-5", None, 0, n / 10) for n in range(10)]
    run = Run.load(put_whole_run(tmp_path / "tent", "Tent", given))
    found = [(e.kind, e.index) for e in examples(run, None, most=2)]
    assert found == [
        *[("most certain", 9), ("most certain", 8)],
        *[("least certain", 0), ("least certain", 1)],
    ]


def test_pictures_are_in_the_page_with_text(runs):
    text = body(Page(runs, pictures=lambda run: Pictures(images, tuple("abcde"))))
    shown = Reader(text).all("img")
    assert len(shown) == 4
    assert all(a["src"].startswith("data:image/png;base64,") for a in shown)
    assert re.match(
        r"Image \d+\.png, class [a-e]: before [a-e], now [a-e] with 90%", shown[0]["alt"]
    )


def test_a_large_image_is_made_small(runs):
    example = examples(runs[1], runs[0])[0]
    noise = np.random.default_rng(0).integers(0, 256, (300, 200, 3), dtype=np.uint8)
    address = picture(lambda *_: noise, example)
    assert address.startswith("data:image/jpeg;base64,")
    assert len(address) < 12_000


def test_an_image_that_is_gone_is_left_out(runs):
    def gone(index, corruption, severity):
        raise InputError("no such file")

    text = body(Page(runs, pictures=lambda run: Pictures(gone, None)))
    assert Reader(text).all("img") == []
    assert "4 of 4 images can no longer be read." in text
    assert "cannot be read</li>" in text


def test_a_run_without_a_finite_prediction_is_shown(tmp_path):
    given = [("fog-5", 0, -1)] * 20
    page = Page([Run.load(put_whole_run(tmp_path / "tent", "Tent", given))])
    assert Reader(body(page)).row("fog-5")[1] == "0.0"
    assert "run-1-classes-over-time" not in [figure.id for figure in page.figures]


def test_repetitions_are_shown_by_the_first(tmp_path):
    found = [
        Run.load(
            put_whole_run(
                tmp_path / f"tent_{seed}",
                "Tent",
                rows((5, 5)),
                served=stream(seed=seed, plan_sha256=f"{seed}a" * 32),
            )
        )
        for seed in (0, 1)
    ]
    text = body(Page(found))
    assert "the first of 2 runs" in text
    assert "different protocols" not in text


def test_values_that_differ_late_are_shown_where_they_do(tmp_path):
    long = "/a/very/long/path/to/the/images/of/the/stream/version"
    found = [
        Run.load(
            put_whole_run(
                tmp_path / name,
                "Tent",
                rows((5, 5)),
                served=stream(source={**stream()["source"], "root": f"{long}/{name}"}),
            )
        )
        for name in ("one", "two")
    ]
    row = Reader(body(Page(found))).row("stream.source.root")
    assert row[1] != row[2]
    assert row[1].endswith("/one")


def test_images_that_cannot_be_had_are_explained(runs):
    def none(run):
        raise InputError("its images have changed since")

    assert "No images are shown: its images have changed since." in body(Page(runs, pictures=none))


@pytest.mark.parametrize(("count", "segments", "each"), [(1, 15, 4), (14, 15, 2), (100, 100, 0)])
def test_a_page_has_no_more_pictures_than_it_can_bear(count, segments, each):
    assert pictures_each(count, segments) == each
    assert 2 * each * count * segments <= 1200


def test_a_run_without_predictions_is_refused(tmp_path):
    with pytest.raises(InputError, match="PredictionWriter"):
        Page([Run.load(put_run(tmp_path / "tent"))])
