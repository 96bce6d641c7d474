"""``tta report`` as it is typed."""

import re

import numpy as np
import pytest
from PIL import Image

from tests.report.run_folders import put_predictions, put_run, put_whole_run, stream
from tta_lightning.cli import main
from tta_lightning.report.command import find_runs

ROWS = [(s, n % 4, (n + (n % 3 == 0)) % 4) for s in ("fog-5", "snow-5") for n in range(12)]


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Runs of two methods and two seeds, below the folder one stands in."""
    monkeypatch.chdir(tmp_path)
    for seed in (0, 1):
        for method in ("Source", "Tent"):
            served = stream(seed=seed, plan_sha256=f"{seed}a" * 32)
            put_whole_run(tmp_path / f"seed{seed}" / method, method, ROWS, served=served)
    return tmp_path


def test_a_page_is_written(runs, capsys):
    assert main(["report", "seed0/Source", "seed0/Tent", "-o", "out/report.html"]) == 0
    page = (runs / "out" / "report.html").read_text()
    assert page.startswith("<!doctype html>")
    assert capsys.readouterr().out == "report  out/report.html\n"
    assert "No images are shown: it was not made by `tta adapt`" in page


def test_the_folder_of_runs_will_do(runs, capsys):
    assert main(["report", "seed0"]) == 0
    assert (runs / "report.html").is_file()
    found, names = find_runs(["seed0"])
    assert ([run.folder.name for run in found], names) == (["Source", "Tent"], None)


def test_a_folder_as_output_gets_the_page(runs, capsys):
    assert main(["report", "seed0", "-o", "seed1"]) == 0
    assert (runs / "seed1" / "report.html").is_file()


def test_names_with_patterns_are_repetitions(runs):
    found, names = find_runs(["a=seed*/Source", f"b={runs}/seed*/Tent"])
    assert names == ["a", "a", "b", "b"]
    assert [run.method for run in found] == ["Source", "Source", "Tent", "Tent"]


def test_a_run_that_is_given_twice_is_one(runs):
    found, _ = find_runs(["seed0/Tent", "seed0/Tent/", "seed0"])
    assert sorted(run.method for run in found) == ["Source", "Tent"]


def test_a_folder_with_an_equals_sign_is_a_folder(runs):
    put_whole_run(runs / "lr=0.1", "Tent", ROWS)
    found, names = find_runs(["lr=0.1"])
    assert (len(found), names) == (1, None)


def test_figures_are_written_as_png_and_pdf(runs, capsys):
    assert main(["report", "seed0/Source", "seed0/Tent", "--figures", "figures"]) == 0
    files = {path.name for path in (runs / "figures").iterdir()}
    stems = {"curves-running", "curves-segments", "run-1-Tent-classes-over-time"}
    stems |= {f"run-1-Tent-{kind}" for kind in ("entropy", "class-change", "reliability")}
    assert files == {f"{stem}.{form}" for stem in stems for form in ("png", "pdf")}
    with Image.open(runs / "figures" / "curves-running.png") as image:
        assert min(image.size) > 500
    assert "12 files" in capsys.readouterr().out


def test_different_protocols_are_said(runs, capsys):
    other = stream(batch_size=20, plan_sha256="0a" * 32)
    put_whole_run(runs / "other", "Tent", ROWS, served=other)
    assert main(["report", "seed0/Tent", "other", "--no-images"]) == 0
    assert "different protocols (stream.batch_size)" in capsys.readouterr().out
    assert main(["report", "seed0", "seed1", "--no-images"]) == 0
    assert "protocols" not in capsys.readouterr().out


def test_runs_are_in_the_order_of_their_numbers(runs):
    for number in (10, 2, 1):
        put_whole_run(runs / "many" / f"run{number}", f"M{number}", ROWS)
    found, _ = find_runs(["many"])
    assert [run.method for run in found] == ["M1", "M2", "M10"]


def test_runs_that_are_not_finished_are_left_out_and_named(runs, capsys):
    (put_run(runs / "seed0" / "begun") / "metrics.json").unlink()
    found, _ = find_runs(["seed0"])
    assert len(found) == 2
    assert "left out, not finished: seed0/begun" in capsys.readouterr().err


def test_a_pattern_may_be_a_folder_with_brackets(runs):
    put_whole_run(runs / "all[1]", "Tent", ROWS)
    found, names = find_runs(["a=all[1]"])
    assert (len(found), names) == (1, ["a"])


def test_the_name_of_a_folder_need_not_be_utf8(runs):
    name = b"t\xff".decode(errors="surrogateescape")
    put_whole_run(runs / name, "Tent", ROWS)
    assert main(["report", name, "--figures", "figures"]) == 0
    assert "t\\xff" in (runs / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere/manifest.json cannot be read"),
        (["seed0/Tnet"], "Did you mean 'seed0/Tent'?"),
        (["a=nowhere/*"], r"a=nowhere/\*: there is no run"),
        (["empty"], "empty: there is no run"),
        (["a=seed0/Tent", "seed0/Source"], "Name all of them, or none"),
        (["bare"], r"bare/predictions\.csv cannot be read.*PredictionWriter"),
        (["seed0", "-o", "file/report.html"], "file/report.html cannot be written"),
        (["seed0", "--figures", "file"], "file cannot be written to"),
        (["a="], "a=: expected NAME=PATTERN"),
        (["=seed0/Tent"], "=seed0/Tent: expected NAME=PATTERN"),
        (["a=seed0/*"], r"a= matches runs of different methods \(Source, Tent\)"),
        (["list"], r"list/metrics\.json is not of a run: it has no completed"),
        (["none"], "none: the run predicted nothing"),
    ],
)
def test_what_is_wrong_is_said(runs, capsys, arguments, message):
    (runs / "empty").mkdir()
    (runs / "file").write_text("")
    put_run(runs / "bare")
    (put_run(runs / "list") / "metrics.json").write_text("[1]")
    put_predictions(put_run(runs / "none"), [])
    assert main(["report", *arguments]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert bool(list(runs.glob("*.html"))) == ("--figures" in arguments)


# Real runs ----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Sixteen images without labels."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    for number in range(16):
        pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
    return tmp_path


ADAPT = [
    *("adapt", "--model", "Tent", "--model.network.spec", "tta_lightning.models.SmallConvNet"),
    *("--data", "Stream", "--data.source", "UnlabelledImages", "--data.source.root", "images"),
    *("--data.corruptions", "fog", "--data.batch_size", "8", "--data.image_size", "32"),
]


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_images_of_a_real_run_are_those_that_the_model_saw(folder, monkeypatch):
    assert main([*ADAPT, "--trainer.run_dir", "runs/tent"]) == 0
    assert main(["report", "runs/tent"]) == 0
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 8  # four of a kind
    monkeypatch.chdir(folder / "runs")
    assert main(["report", "tent"]) == 0
    page = (folder / "runs" / "report.html").read_text()
    assert "they cannot be had (&#39;images&#39; does not exist" in page
    assert "Relative paths are taken from the folder that one stands in" in page
    monkeypatch.chdir(folder)
    (folder / "images" / "3.png").unlink()
    assert main(["report", "runs/tent"]) == 0
    assert "they have changed since" in (folder / "report.html").read_text()


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_a_run_may_write_its_own_report(folder, capsys):
    more = ["--trainer.callbacks+=RunReport", "--trainer.run_dir", "runs/tent"]
    assert main([*ADAPT, *more]) == 0
    page = (folder / "runs" / "tent" / "report.html").read_text()
    assert "<h1>tent</h1>" in page
    assert page.count("data:image/png;base64,") == 8


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_a_report_that_cannot_be_written_takes_nothing_with_it(folder, capsys):
    more = ["--trainer.callbacks+=RunReport", "--trainer.callbacks.filename", "no/such/report.html"]
    with pytest.warns(UserWarning, match="no/such/report.html could not be written"):
        assert main([*ADAPT, *more, "--trainer.run_dir", "runs/tent"]) == 0
    assert (folder / "runs" / "tent" / "metrics.json").is_file()
