"""Runs side by side: which of them are comparable, and that the table has all of them."""

import re

import pytest

from tests.conftest import read_csv
from tests.report.run_folders import PLAN, SUBSET, metrics, put_run, stream
from tta_lightning.errors import InputError
from tta_lightning.report import pictures
from tta_lightning.report.compare import Run, compare, differences, summarise


@pytest.fixture
def table(capsys):
    """``table(folder, ...)`` calls ``tta compare`` and returns what it prints."""

    def call(*arguments):
        assert compare([str(argument) for argument in arguments]) == 0
        return re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)  # without colours

    return call


def row(text, label):
    """The figures of a row of a table."""
    (line,) = [li for li in text.splitlines() if li.startswith(f" {label} ")]
    return line.removeprefix(f" {label} ").split()


def runs_of(*folders):
    return [Run.load(folder) for folder in folders]


def visits(domains, count):
    return [d if n == 1 else f"{d} ({n})" for n in range(1, count + 1) for d in domains]


# All columns --------------------------------------------------------------------------------------


def put_ten(folder):
    accuracies = {n: {"fog-5": 0.101 + n / 100, "snow-5": 0.552 + n / 100} for n in range(10)}
    folders = [put_run(folder / f"run{n}", accuracies=a) for n, a in accuracies.items()]
    shown = [f"{100 * value:.1f}" for a in accuracies.values() for value in a.values()]
    return folders, shown


def test_ten_runs_are_one_wide_table_where_no_terminal_is(table, tmp_path, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    folders, shown = put_ten(tmp_path)
    text = table(*folders)
    assert row(text, "fog-5") + row(text, "snow-5") == shown[::2] + shown[1::2]
    (header,) = [line for line in text.splitlines() if " run0 " in line]
    assert header.split() == [f"run{n}" for n in range(10)]


def test_ten_runs_are_several_tables_on_a_narrow_terminal(table, tmp_path, monkeypatch):
    folders, shown = put_ten(tmp_path)
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal
    monkeypatch.setenv("COLUMNS", "60")
    text = table(*folders, put_run(tmp_path / "source", "Source", {"fog-5": 0.2, "snow-5": 0.9}))
    tables, _, _ = text.partition("run     ")
    assert max(map(len, tables.splitlines())) <= 60
    words = tables.split()
    assert words.count("fog-5") == 3  # 4 columns fit
    assert set(shown) <= set(words)
    assert {f"run{n}" for n in range(10)} | {"source"} <= set(words)


def test_a_terminal_too_narrow_for_one_run_loses_nothing(table, tmp_path, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "12")
    text = table(put_run(tmp_path / "a_run_with_a_long_name", accuracies={"fog-5": 0.123}))
    assert "a_run_with_a_long_name" in text.split()
    assert row(text, "fog-5") == ["12.3"]


def test_brackets_in_a_name_are_no_markup(table, tmp_path):
    text = table(put_run(tmp_path / "tent[bold]"))
    (header,) = [line for line in text.splitlines() if line.split() == ["tent[bold]"]]
    assert f"run     {tmp_path / 'tent[bold]'}" in text.replace("\n", " ")
    assert header


# Names --------------------------------------------------------------------------------------------


def test_folders_of_one_name_are_told_apart_by_their_path(table, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(pictures, "draw_curves", lambda runs, names: drawn.extend(names) or b"")
    folders = [
        put_run(tmp_path / path, accuracies={"fog-5": n / 10})
        for n, path in enumerate(("a/one/tent", "b/one/tent", "b/two/tent", "b/source"))
    ]
    text = table(*folders, "-o", tmp_path / "out")
    names = ["a/one/tent", "b/one/tent", "two/tent", "source"]
    assert drawn == names
    (header,) = [line for line in text.splitlines() if " two/tent " in line]
    assert header.split() == names
    (figures, mean) = read_csv(tmp_path / "out" / "table.csv")
    assert figures == {"segment": "fog-5", **{n: str(i / 10) for i, n in enumerate(names)}}
    assert mean == {**figures, "segment": "mean"}


def test_a_folder_given_twice_is_one_run(table, tmp_path):
    folder = put_run(tmp_path / "tent")
    assert row(table(folder, f"{folder}/", tmp_path / "." / "tent"), "fog-5") == ["50.0"]


def test_the_folder_one_stands_in_has_its_name(table, tmp_path, monkeypatch):
    monkeypatch.chdir(put_run(tmp_path / "tent"))
    assert "tent" in table(".").split()


# Protocols ----------------------------------------------------------------------------------------

REPLAYED = stream()
for _name in ("corruptions", "severity", "limit", "subset", "scenario_options"):
    del REPLAYED[_name]
OLDER = {k: v for k, v in stream().items() if k not in ("subset_sha256", "scenario_options")}
AS_IT_IS = {"size": None, "crop_pct": 1.0, "interpolation": "bilinear"}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (stream(), stream(clean={"class": "Digits", "digest": "5b" * 32}, clean_batch_size=64)),
        (stream(), stream(image_size=32, crop_pct=1.0)),
        (stream(), stream(on_bad_image="skip")),
        (stream(), stream(source={**stream()["source"], "root": "there"})),
        (stream(corruptions="common"), stream(corruptions=["fog", "snow"])),
        (stream(geometry=AS_IT_IS), stream(geometry={**AS_IT_IS, "crop_pct": 0.9})),
        (stream(), REPLAYED),
        (stream(), OLDER),
    ],
    ids=("clean", "asked", "skip", "root", "spelling", "no crop", "replayed", "older"),
)
def test_equal_protocols_are_comparable(one, other, tmp_path):
    a, b = put_run(tmp_path / "a", served=one), put_run(tmp_path / "b", served=other)
    assert differences(runs_of(a, b)) == {}


OTHER_PLAN = {"plan_sha256": "6a" * 32}
SMALLER = {**AS_IT_IS, "size": 16}


@pytest.mark.parametrize(
    ("changed", "fields"),
    [
        ({"served": stream(scenario="single_sample", batch_size=1, **OTHER_PLAN)}, ["batch_size"]),
        ({"served": stream(window=8, **OTHER_PLAN)}, ["window"]),
        ({"served": stream(reset_each_batch=True, **OTHER_PLAN)}, ["reset_each_batch"]),
        ({"served": stream(scenario_options={"delta": 1.0}, **OTHER_PLAN)}, ["delta"]),
        ({"served": stream(batch_size=20)}, ["batch_size"]),  # the plan leaves it to the stream
        ({"served": stream(seed=1)}, ["seed"]),  # of the noise
        ({"served": stream(table="cifar")}, ["table"]),
        ({"served": stream(geometry=SMALLER)}, ["size"]),
        ({"served": stream(source={**stream()["source"], "digest": "7f" * 32})}, ["digest"]),
        ({"served": stream(**OTHER_PLAN)}, ["plan_sha256"]),
        ({"precision": "bf16-mixed"}, ["precision"]),
        ({"measured": metrics({"fog-5": 0.5, "snow-5": 0.5}, completed=False)}, ["completed"]),
        ({"measured": metrics({"fog-5": 0.5})}, ["segments", "images"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_different_protocols_are_refused_by_name(changed, fields, tmp_path):
    folders = [put_run(tmp_path / "a"), put_run(tmp_path / "b", **changed)]
    with pytest.raises(InputError) as caught:
        compare([str(folder) for folder in folders])
    for field in fields:
        assert re.search(rf"[( .]{field}: ", str(caught.value))


def test_images_that_one_run_left_out_make_a_difference(tmp_path):
    full = metrics({"fog-5": 0.5, "snow-5": 0.75})
    short = {**full, "overall": {**full["overall"], "images": 39}}
    a, b = put_run(tmp_path / "a", measured=full), put_run(tmp_path / "b", measured=short)
    assert differences(runs_of(a, b)) == {"images": [40, 39]}


def test_streams_that_name_no_plan_are_compared_field_by_field(tmp_path):
    a = put_run(tmp_path / "a", served={"severity": 5})
    b = put_run(tmp_path / "b", served={"severity": 4})
    assert differences(runs_of(a, b)) == {"stream.severity": [5, 4]}


def test_the_message_has_the_most_telling_first_and_hashes_last_and_short(tmp_path):
    names = visits(["fog-5", "snow-5"], 40)
    source = {**stream()["source"], "digest": "7f" * 32}
    other = stream(
        **{"scenario": "recurring", "scenario_options": {"rounds": 40.0}, "batch_size": 1},
        **{"seed": 1, "window": 8, "reset_each_batch": True, "resets": [], "source": source},
        **{"plan_sha256": "6a" * 32, "subset_sha256": "5b" * 32, "table": "cifar"},
    )
    a = put_run(tmp_path / "a")
    b = put_run(tmp_path / "b", accuracies=dict.fromkeys(names, 0.5), served=other)
    with pytest.raises(InputError) as caught:
        compare([str(a), str(b)])
    fields, _, advice = str(caught.value).partition("(")[2].rpartition("). ")
    assert "--force" in advice
    # the names of visits hold no semicolon
    found = dict(field.split(": ", 1) for field in fields.split("; "))
    order = [name.removeprefix("stream.") for name in found]
    assert order == [
        *("scenario", "scenario_options.rounds", "window", "reset_each_batch", "batch_size"),
        *("seed", "images", "table", "segments", "resets"),
        *("plan_sha256", "source.digest", "subset_sha256"),
    ]
    assert found["stream.scenario"] == "reset_each_shift / recurring"
    assert found["stream.resets"] == "fog-5, snow-5 / none"
    assert found["stream.plan_sha256"] == f"{PLAN[:12]} / 6a6a6a6a6a6a"
    assert found["stream.subset_sha256"] == f"{SUBSET[:12]} / 5b5b5b5b5b5b"
    assert len(found["segments"]) < 100


# Different protocols by force ---------------------------------------------------------------------


def test_a_gain_is_over_a_source_of_the_same_protocol_alone(table, tmp_path):
    other = stream(severity=3, **OTHER_PLAN)
    folders = [
        put_run(tmp_path / "source", "Source", {"fog-5": 0.2}),
        put_run(tmp_path / "source3", "Source", {"fog-5": 0.3}, served=other),
        put_run(tmp_path / "tent", "Tent", {"fog-5": 0.45}),
        put_run(tmp_path / "tent3", "Tent", {"fog-5": 0.45}, served=other),
        put_run(tmp_path / "lone", "Tent", {"fog-5": 0.45}, served=stream(seed=1)),
        put_run(tmp_path / "alien", "Tent", {"fog-5": 0.45}, model={"weights_sha256": "ff"}),
    ]
    text = table(*folders, "--force")
    expected = ["20.0", "30.0", "45.0", "+25.0", "45.0", "+15.0", "45.0", "45.0"]
    assert row(text, "fog-5") == row(text, "mean") == expected
    assert "gain over the source model" in text
    assert "gain over" not in table(folders[0], folders[4], "--force")


def test_rows_are_of_all_runs_and_a_mean_is_over_the_runs_own(table, tmp_path):
    one = put_run(tmp_path / "one", accuracies={"fog-5": 0.2, "snow-5": 0.4})
    other = put_run(tmp_path / "other", accuracies={"snow-5": 0.6, "frost-5": 0.9})
    text = table(one, other, "--force", "-o", tmp_path / "out")
    assert row(text, "fog-5") == ["20.0", "-"]
    assert row(text, "snow-5") == ["40.0", "60.0"]
    assert row(text, "frost-5") == ["-", "90.0"]
    assert row(text, "mean") == ["30.0", "75.0"]
    assert "own segments" in " ".join(text.split())
    written = read_csv(tmp_path / "out" / "table.csv")
    assert [line["segment"] for line in written] == ["fog-5", "snow-5", "frost-5", "mean"]
    assert [line["other"] for line in written] == ["", "0.6", "0.9", "0.75"]
    assert "own segments" not in table(one)


# Streams with many segments -----------------------------------------------------------------------

DOMAINS = ("fog-5", "snow-5", "none")


def decaying(rounds):
    """Accuracies of visits: 60, 70, 80 % at first, and 1 % less from round to round."""
    names = visits(DOMAINS, rounds)
    return {name: (60 + 10 * (i % 3) - i // 3) / 100 for i, name in enumerate(names)}


def test_visits_are_rows_as_long_as_they_fit(table, tmp_path):
    accuracies = decaying(13)  # 39 visits
    text = table(put_run(tmp_path / "tent", accuracies=accuracies))
    assert row(text, "snow-5 (13)") == ["58.0"]
    assert "round" not in text


def test_many_visits_become_means_of_domains_and_of_rounds(table, tmp_path):
    accuracies = decaying(25)  # 75 visits
    source = put_run(tmp_path / "source", "Source", dict.fromkeys(accuracies, 0.5))
    tent = put_run(tmp_path / "tent", accuracies=accuracies)
    text = table(source, tent, "-o", tmp_path / "out")
    assert row(text, "fog-5") == ["50.0", "48.0", "-2.0"]  # 60 - (0 + ... + 24) / 25
    assert row(text, "snow-5") == ["50.0", "58.0", "+8.0"]
    assert row(text, "none") == ["50.0", "68.0", "+18.0"]
    rounds = re.findall(r"^ round (\d+) ", text, re.MULTILINE)
    assert rounds == ["1", "3", "6", "9", "12", "15", "18", "21", "24", "25"]
    assert row(text, "round 1") == ["50.0", "70.0", "+20.0"]
    assert row(text, "round 24") == ["50.0", "47.0", "-3.0"]
    assert row(text, "mean") == ["50.0", "58.0", "+8.0"]
    assert "(2)" not in text
    assert "mean over its visits" in " ".join(text.split())
    written = read_csv(tmp_path / "out" / "table.csv")
    assert [line["segment"] for line in written] == [*accuracies, "mean"]
    assert [float(line["tent"]) for line in written[:-1]] == list(accuracies.values())


def test_up_to_ten_rounds_are_all_shown(table, tmp_path):
    accuracies = dict.fromkeys(visits([f"c{n}-5" for n in range(5)], 10), 0.5)
    text = table(put_run(tmp_path / "tent", accuracies=accuracies))
    rounds = re.findall(r"^ round (\d+) ", text, re.MULTILINE)
    assert rounds == [str(number) for number in range(1, 11)]


def test_severities_up_and_down_become_means_of_corruptions(table, tmp_path):
    steps = ["1", "2", "3", "4", "5", "4 (2)", "3 (2)", "2 (2)", "1 (2)"]
    easier = (0.9, 0.8, 0.7, 0.6, 0.5, 0.6, 0.7, 0.8, 0.9)  # 6.5 in all
    names = ["gaussian_noise", "fog", "snow", "jpeg_compression", "frost"]
    accuracies = {
        f"{name}-{step}": value - number / 10
        for number, name in enumerate(names)
        for step, value in zip(steps, easier, strict=True)
    }
    text = table(put_run(tmp_path / "tent", accuracies=accuracies))
    for name, figure in zip(names, ("72.2", "62.2", "52.2", "42.2", "32.2"), strict=True):
        assert row(text, name) == [figure]
    assert row(text, "mean") == ["52.2"]
    assert "round" not in text
    assert "mean over its severities" in " ".join(text.split())


def test_many_different_domains_stay_a_row_each(table, tmp_path):
    names = [f"c{number}-5" for number in range(41)]
    text = table(put_run(tmp_path / "tent", accuracies=dict.fromkeys(names, 0.5)))
    assert all(row(text, name) == ["50.0"] for name in names)
    assert "mean over" not in text
    assert "round" not in text


# A run in words -----------------------------------------------------------------------------------


def test_one_of_a_kind_is_in_the_singular(tmp_path):
    one = {**metrics({"fog-5": 0.5}), "nonfinite_batches": 1, "bad_images": {"count": 1}}
    one["overall"] = {**one["overall"], "images": 1}
    first, _ = summarise(Run.load(put_run(tmp_path / "one", measured=one))).splitlines()
    assert first == (
        "1 image in 1 batch, accuracy 50.0% (mean over 1 segment), 1 image left out, "
        "1 batch not finite"
    )
    first, _ = summarise(Run.load(put_run(tmp_path / "two"))).splitlines()
    assert first == "40 images in 2 batches, accuracy 62.5% (mean over 2 segments)"


def test_segments_without_labels_count_in_no_mean(tmp_path, table):
    folder = put_run(tmp_path / "a", accuracies={"fog-5": 0.5, "snow-5": None})
    assert "(mean over 1 segment)" in summarise(Run.load(folder))
    assert row(table(folder), "snow-5") == ["-"]
    assert row(table(folder), "mean") == ["50.0"]
    folder = put_run(tmp_path / "b", accuracies={"fog-5": None})
    assert "accuracy" not in summarise(Run.load(folder))
