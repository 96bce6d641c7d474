"""The page as a person meets it, in a real Chromium."""

import csv
import json

import numpy as np
import pytest

from tests.browser import Visit, chromium
from tests.report.run_folders import put_run, put_whole_run, stream
from tta_lightning.callbacks.predictions import COLUMNS
from tta_lightning.report import Run
from tta_lightning.report.detail import Pictures
from tta_lightning.report.page import Page

RUNS, SEGMENTS, IMAGES, BATCH = 15, 15, 1000, 10
SECONDS = 3.0


def images(index, corruption, severity):
    return np.full((16, 16, 3), 20 * index % 256, np.uint8)


def draw_all(page):
    """Open every run, and wait until each figure is drawn."""
    page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    done = "[...document.querySelectorAll('.chart')].every((c) => c.dataset.drawn === 'done')"
    page.wait_for_function(done, timeout=60_000)


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A page of three runs, one of which collapses."""
    folder = tmp_path_factory.mktemp("small")
    good = [
        (f"{s}-5", n % 10, (n + (n % 3 == 0)) % 10) for s in ("fog", "snow") for n in range(200)
    ]
    better = [(s, label, label) for s, label, _ in good]
    bad = [(s, label, 3 if s == "snow-5" else label) for s, label, _ in good]
    cost = {
        **{"images_per_second": 500.0, "forwards_per_batch": 1.0, "backwards_per_batch": 1.0},
        "inference": {"seconds_per_batch": 0.1, "peak_memory_bytes": 5_000_000},
    }
    given = {"source": ("Source", good), "tent": ("Tent", better), "sar": ("SAR", bad)}
    runs = [
        Run.load(put_whole_run(folder / name, method, rows, cost=cost))
        for name, (method, rows) in given.items()
    ]
    path = folder / "report.html"
    path.write_text(Page(runs, pictures=lambda run: Pictures(images, None)).html())
    return path


def put_long_run(folder, number, rng):
    """A run of 15 corruptions with 1,000 images each."""
    names = [f"c{n}-5" for n in range(SEGMENTS)]
    labels = np.arange(SEGMENTS * IMAGES) % 10
    right = rng.random(len(labels)) < 0.5 + number / 40
    predictions = np.where(right, labels, rng.integers(0, 10, len(labels)))
    correct = predictions == labels
    batches = SEGMENTS * IMAGES // BATCH
    accuracy = correct.reshape(SEGMENTS, IMAGES).mean(axis=1)
    entries = [
        {"segment": s, "images": IMAGES, "accuracy": float(a), "entropy": 0.5}
        for s, a in zip(names, accuracy, strict=True)
    ]
    measured = {
        **{"completed": True, "batches": batches, "nonfinite_batches": 0},
        "bad_images": {"count": 0, "files": []},
        "overall": {"images": len(labels), "accuracy": float(correct.mean())},
        "segments": entries,
        "curve": {
            "segments": [{"segment": s, "batch": n * IMAGES // BATCH} for n, s in enumerate(names)],
            "images": [BATCH] * batches,
            "correct": correct.reshape(batches, BATCH).sum(axis=1).tolist(),
            "entropy": rng.random(batches).tolist(),
        },
    }
    method = "Source" if number == 0 else f"M{number}"
    put_run(folder, method, served=stream(domains=names, resets=names), measured=measured)
    with (folder / "predictions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for place, (label, prediction) in enumerate(zip(labels, predictions, strict=True)):
            name = names[place // IMAGES]
            image = [place % IMAGES, f"{place}.png", name, name[:-2], 5, label, prediction]
            writer.writerow([*image, "0.9", "0.5", 1])
    return Run.load(folder)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A page of 15 runs over 15 corruptions with 1,000 images each."""
    folder, rng = tmp_path_factory.mktemp("large"), np.random.default_rng(0)
    runs = [put_long_run(folder / f"run{n}", n, rng) for n in range(RUNS)]
    path = folder / "report.html"
    path.write_text(Page(runs, pictures=lambda run: Pictures(images, None)).html())
    return path


def test_every_figure_is_drawn_without_a_word(browser, small):
    visit = Visit(browser, small)
    draw_all(visit.page)
    marks = (
        "[...document.querySelectorAll('.chart')].map((c) => c.querySelectorAll('svg path').length)"
    )
    counts = visit.page.evaluate(marks)
    assert len(counts) == 3 + 2 * 4  # curves, segments, cost; four a run but the source model's
    assert min(counts) > 3
    pictures = visit.page.query_selector_all(".chart svg.marks[role=img]")
    assert [len(each.get_attribute("aria-label")) > 30 for each in pictures] == [True] * len(counts)
    assert visit.said == []
    assert visit.elsewhere() == []
    visit.page.close()


def test_a_run_of_one_segment_without_labels_is_drawn_without_a_word(browser, tmp_path):
    rows = [("fog-5", None, n % 3) for n in range(40)]
    run = Run.load(put_whole_run(tmp_path / "tent", "Tent", rows))
    path = tmp_path / "report.html"
    path.write_text(Page([run]).html())
    visit = Visit(browser, path)
    draw_all(visit.page)
    assert len(visit.page.query_selector_all(".chart svg.marks")) == 4
    assert visit.said == []
    visit.page.close()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200], ids=["phone", "desk"])
def test_who_cannot_see_or_point_can_read_it(browser, small, width, dark):
    visit = Visit(browser, small, width=width, dark=dark)
    draw_all(visit.page)
    assert visit.violations() == []
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= width
    visit.page.close()


def test_the_keyboard_reaches_everything(browser, small):
    visit = Visit(browser, small)
    page = visit.page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "theme"
    assert page.evaluate("document.documentElement.dataset.theme") == "light"
    page.keyboard.press("Enter")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    assert page.evaluate("document.activeElement.getAttribute('aria-pressed')") == "true"
    page.focus("#run-2 > summary")
    page.keyboard.press("Enter")
    assert page.evaluate("document.getElementById('run-2').open")
    page.wait_for_selector("#run-2 .chart svg")
    page.close()


def test_text_of_the_figures_can_be_read_in_the_dark(browser, small):
    visit = Visit(browser, small, dark=True)
    draw_all(visit.page)
    colours = visit.page.evaluate(
        "[...document.querySelectorAll('.chart svg.marks text')]"
        ".map((text) => getComputedStyle(text).fill)"
    )
    assert set(colours) == {"rgb(230, 233, 236)"}
    ground = "getComputedStyle(document.querySelector('.chart svg.marks')).backgroundColor"
    assert visit.page.evaluate(ground) == "rgba(0, 0, 0, 0)"
    visit.page.close()


def test_it_prints_dark_on_light(browser, small):
    visit = Visit(browser, small, dark=True)
    draw_all(visit.page)
    visit.page.emulate_media(media="print")
    ink = "getComputedStyle(document.body).color"
    text = "getComputedStyle(document.querySelector('.chart svg.marks text')).fill"
    assert visit.page.evaluate(ink) == visit.page.evaluate(text) == "rgb(27, 31, 36)"
    visit.page.close()


def test_a_link_to_a_run_opens_it(browser, small):
    page = browser.new_page()
    page.goto(f"{small.resolve().as_uri()}#run-2")
    assert page.evaluate("document.getElementById('run-2').open")
    page.close()


def test_a_page_of_fifteen_long_runs_opens_at_once(browser, large):
    visit = Visit(browser, large)
    page = visit.page
    page.wait_for_selector(".chart svg", state="attached")
    seconds = page.evaluate("performance.now()") / 1000
    assert seconds < SECONDS
    draw_all(page)
    assert (
        len(page.query_selector_all(".chart svg.marks")) == 2 + 14 * 4
    )  # no run measured its cost
    assert visit.said == []
    spec = page.evaluate("document.querySelector('[data-spec]').textContent")
    lines = json.loads(spec)["datasets"]
    drawn = max(len(rows) for rows in lines.values())
    assert RUNS * SEGMENTS * 2 < drawn <= RUNS * 830
    page.close()
