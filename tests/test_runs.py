"""Run folders and the files in them."""

import pytest

from tests.loops.test_adaptation import quiet, tent
from tests.streams import make_stream
from tta_lightning.callbacks import AdaptCallback
from tta_lightning.runs import reserved, unused_folder, write_atomically, write_json


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "results"
    target.mkdir()  # a file cannot take the place of a folder
    with pytest.raises(OSError, match="results"):
        write_atomically(target, "new")
    assert [path.name for path in tmp_path.iterdir()] == ["results"]


def test_a_file_can_be_read_by_others_and_holds_no_nan(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o644
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"a": float("nan")})
    assert (tmp_path / "a.json").read_text() == '{\n  "a": 1\n}\n'


def test_names_of_folders_are_not_used_twice(tmp_path):
    first = unused_folder(tmp_path)
    first.mkdir()
    assert unused_folder(tmp_path) != first


@pytest.mark.parametrize("results", [True, False])
def test_a_folder_stays_once_it_holds_results(results, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt), reserved(folder, lambda: results):
        raise KeyboardInterrupt
    assert folder.exists() == results


def test_predictions_are_on_disk_after_every_batch(tmp_path):
    class Count(AdaptCallback):
        def __init__(self):
            self.lines = []

        def on_test_batch_end(self, trainer, *args):
            text = (trainer.run_folder / "predictions.csv").read_text()
            self.lines.append(text.count("\n"))

    count = Count()
    quiet(count, run_dir=tmp_path / "run").adapt(tent(), datamodule=make_stream())
    assert count.lines == [6, 11, 13, 18, 23, 25]  # a header, then batches of 5, 5, 2, 5, 5, 2
