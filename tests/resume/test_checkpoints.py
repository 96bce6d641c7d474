"""Checkpoint files: whole, verified, without code; and runs that may not go on."""

import hashlib
import os
import pickle
import random
import shutil
import subprocess
import sys
from collections import defaultdict

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback

from tests.conftest import read_json
from tests.loops.test_adaptation import quiet, tent
from tests.meta.running import ROOT
from tests.networks import are_equal, make_batches, make_network
from tests.streams import make_stream
from tta_lightning import InputError, checkpoints
from tta_lightning.callbacks import (
    STAG,
    AdaptationCheckpoint,
    AdaptCallback,
    PredictionWriter,
    StreamMetrics,
)
from tta_lightning.checkpoints import path_of, read, stored, write
from tta_lightning.data import Stream
from tta_lightning.methods import EATA, CoTTA, Tent
from tta_lightning.rules import SGD, Adam
from tta_lightning.runs import locked
from tta_lightning.snapshots import size_in_bytes

MARK = b"tta_lightning adaptation 1 sha256:"


class Parameters(list):
    """A list by another name."""


class BadAt(Stream):
    """A stream whose loader fails before a batch is drawn, as where a disk goes away."""

    def test_dataloader(self):
        loader = super().test_dataloader()
        ends = self.ends

        class Ends(type(loader.dataset)):
            def __getitem__(self, position):
                if position >= ends:
                    raise ValueError("the disk went away")
                return super().__getitem__(position)

        loader.dataset.__class__ = Ends
        return loader


def stream_that_ends(position, **options):
    stream = make_stream(**options)
    stream.__class__, stream.ends = BadAt, position
    return stream


def begun(folder, *callbacks, position=17, adapter=None, checkpoint=None, **options):
    """A run of 6 batches (5, 5, 2, 5, 5, 2) that stopped before the batch that has a position."""
    every_batch = checkpoint or AdaptationCheckpoint(1)
    with pytest.raises(ValueError, match="the disk went away"):
        quiet(every_batch, *callbacks, run_dir=folder).adapt(
            adapter or tent(), datamodule=stream_that_ends(position, **options)
        )
    return folder


def resume(folder, *callbacks, adapter=None, resume_from=None, run_dir=None, **options):
    return quiet(AdaptationCheckpoint(1), *callbacks, run_dir=run_dir).adapt(
        adapter or tent(), datamodule=make_stream(**options), resume_from=resume_from or folder
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The same run without an interruption."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    quiet(AdaptationCheckpoint(1), run_dir=folder).adapt(tent(), datamodule=make_stream())
    return folder


def same_end(one, other):
    """Whether two runs have the same predictions and end in the same model."""
    first, second = (read(stored(folder)[0])["adapter"] for folder in (one, other))
    texts = [(folder / "predictions.csv").read_bytes() for folder in (one, other)]
    return texts[0] == texts[1] and are_equal(first, second)


class TestFiles:
    state = {"a": torch.arange(6.0), "b": [1, None, "x", {"c": (2.5, True)}]}  # noqa: RUF012

    def test_what_is_read_is_what_was_written(self, tmp_path):
        write(tmp_path / "one", self.state)
        assert are_equal(read(tmp_path / "one"), self.state)

    def test_the_checksum_is_that_of_the_content(self, tmp_path):
        write(tmp_path / "one", self.state)
        line, _, payload = (tmp_path / "one").read_bytes().partition(b"\n")
        assert line == MARK + hashlib.sha256(payload).hexdigest().encode()

    def test_any_cut_and_any_altered_byte_is_noticed(self, tmp_path):
        path = tmp_path / "one"
        write(path, self.state)
        content = path.read_bytes()
        rng = random.Random(0)
        places = [len(MARK), len(MARK) + 64, len(content) - 1, *rng.sample(range(100, 1000), 20)]
        for place in places:
            path.write_bytes(content[:place])
            with pytest.raises(checkpoints.DamagedCheckpointError, match="checksum"):
                read(path)
            path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
            with pytest.raises(checkpoints.DamagedCheckpointError, match="checksum"):
                read(path)

    @pytest.mark.parametrize("sealed", [True, False])
    def test_code_in_a_file_is_refused_and_not_run(self, sealed, tmp_path):
        class Hostile:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "was_run"),)

        torch.save({"adapter": Hostile()}, tmp_path / "hostile")
        payload = (tmp_path / "hostile").read_bytes()
        if sealed:  # with the checksum that belongs to it
            head = MARK + hashlib.sha256(payload).hexdigest().encode() + b"\n"
            (tmp_path / "hostile").write_bytes(head + payload)
        with pytest.raises(InputError, match="never run" if sealed else "is no checkpoint"):
            read(tmp_path / "hostile")
        assert not (tmp_path / "was_run").exists()

    def test_a_plain_pickle_is_refused(self, tmp_path):
        (tmp_path / "one").write_bytes(pickle.dumps({"loop": 1}))
        with pytest.raises(InputError, match="is no checkpoint of a running adaptation"):
            read(tmp_path / "one")

    def test_a_missing_file_is_told_of(self, tmp_path):
        with pytest.raises(InputError, match="cannot be read: No such file"):
            read(tmp_path / "none")

    @pytest.mark.parametrize(
        "value",
        [np.float64(1.0), {1, 2}, object(), torch.Size([1]), defaultdict(int), Parameters([])],
    )
    def test_only_plain_values_are_written(self, value, tmp_path):
        with pytest.raises(InputError, match=r"^callbacks\.Mine\.x of a checkpoint is a"):
            write(tmp_path / "one", {"callbacks": {"Mine": {"x": [value]}}})
        assert list(tmp_path.iterdir()) == []

    def test_random_numbers_go_on(self):
        state = checkpoints.random_state()
        draws = [(torch.rand(3), np.random.rand(3).tolist(), random.random()) for _ in range(2)]  # noqa: NPY002
        checkpoints.set_random_state(state)
        again = [(torch.rand(3), np.random.rand(3).tolist(), random.random()) for _ in range(2)]  # noqa: NPY002
        assert are_equal(draws, again)


class TestWhen:
    """The stream has batches of 5, 5, 2 images in each of two segments."""

    @staticmethod
    def written(monkeypatch, tmp_path, **options):
        names = []
        keep = write

        def note(path, state):
            names.append(int(path.stem.removeprefix("batch-")))
            keep(path, state)

        monkeypatch.setattr("tta_lightning.callbacks.checkpoint.write", note)
        callback = AdaptationCheckpoint(**options)
        quiet(callback, run_dir=tmp_path / "run").adapt(tent(), datamodule=make_stream())
        return names

    def test_every_n_batches(self, monkeypatch, tmp_path):
        # the end is a state of its own: nothing follows
        assert self.written(monkeypatch, tmp_path, every_n_batches=2) == [0, 2, 4, 6, 6]

    def test_after_segments(self, monkeypatch, tmp_path):
        options = {"every_n_batches": None, "on_segment": True}
        assert self.written(monkeypatch, tmp_path, **options) == [0, 3, 6, 6]

    def test_at_the_ends_whatever_is_asked(self, monkeypatch, tmp_path):
        assert self.written(monkeypatch, tmp_path, every_n_batches=None) == [0, 6]

    @pytest.mark.parametrize("keep", [1, 2, 4])
    def test_so_many_are_kept_and_of_a_complete_run_the_last(self, keep, tmp_path):
        begun(tmp_path / "run", checkpoint=AdaptationCheckpoint(1, keep_last=keep))
        numbers = [int(path.stem[-2:]) for path in stored(tmp_path / "run")]
        assert numbers == [4, 3, 2, 1, 0][:keep]
        resume(tmp_path / "run")
        assert [path.name for path in stored(tmp_path / "run")] == ["batch-00000006.state"]

    def test_nothing_is_written_without_a_run_folder(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        quiet(AdaptationCheckpoint(1)).adapt(tent(), datamodule=make_stream())
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        "option", [{"every_n_batches": 0}, {"keep_last": 0}, {"keep_last": None}]
    )
    def test_a_number_below_one_is_refused(self, option):
        ((name, value),) = option.items()
        with pytest.raises(InputError, match=f"^{name} = {value}: expected a whole number from 1"):
            AdaptationCheckpoint(**option)

    def test_an_error_between_two_batches_writes_one(self, tmp_path):
        begun(tmp_path / "a", checkpoint=AdaptationCheckpoint(None))
        begun(tmp_path / "b", checkpoint=AdaptationCheckpoint(None, on_exception=False))
        assert [int(p.stem[-2:]) for p in stored(tmp_path / "a")] == [4, 0]
        assert [int(p.stem[-2:]) for p in stored(tmp_path / "b")] == [0]

    def test_two_of_them_are_refused(self, tmp_path):
        with pytest.raises(InputError, match="more than one AdaptationCheckpoint"):
            quiet(AdaptationCheckpoint(1), AdaptationCheckpoint(2), run_dir=tmp_path / "run").adapt(
                tent(), datamodule=make_stream()
            )

    def test_an_error_in_the_middle_of_a_batch_writes_none(self, tmp_path):
        class Breaks(Tent):
            def loss(self, out, images):
                if len(images) == 2:
                    raise ValueError("in the middle")
                return super().loss(out, images)

        adapter = Breaks(make_network("bn"), SGD(lr=0.05, momentum=0.9))
        with pytest.raises(ValueError, match="in the middle"):
            quiet(AdaptationCheckpoint(2), run_dir=tmp_path / "run").adapt(
                adapter, datamodule=make_stream()
            )
        assert [int(p.stem[-2:]) for p in stored(tmp_path / "run")] == [2, 0]

    def test_it_holds_what_moves_and_not_the_model(self, tmp_path):
        adapter = Tent(make_network("gn"), SGD(lr=0.05, momentum=0.9))
        quiet(AdaptationCheckpoint(1), run_dir=tmp_path / "run").adapt(
            adapter, datamodule=make_stream()
        )
        state = read(stored(tmp_path / "run")[0])
        affine = 2 * (8 + 16)  # of two normalisation layers
        momentum, step = affine, 1
        held = size_in_bytes(state["adapter"])
        assert held == 4 * (affine + momentum) + adapter.rule_state["step"].nbytes * step
        assert set(state["adapter"]) == {
            *("network.1.weight", "network.1.bias", "network.4.weight", "network.4.bias"),
            "_extra_state",
        }


class TestResuming:
    def test_a_folder_a_file_and_last(self, whole, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for name in ("a", "b", "c"):
            begun(tmp_path / "runs" / name)
        resume(tmp_path / "runs" / "a")
        resume(None, resume_from=stored(tmp_path / "runs" / "b")[1])  # not the newest
        resume(None, resume_from="last", run_dir="runs/c")
        assert all(same_end(whole, tmp_path / "runs" / name) for name in ("a", "b", "c"))

    def test_the_figures_are_equal_and_the_manifest_says_so(self, whole, tmp_path):
        begun(tmp_path / "run")
        returned = resume(tmp_path / "run")
        figures = ("overall", "segments", "domains", "curve", "completed", "batches")
        metrics = [read_json(folder / "metrics.json") for folder in (whole, tmp_path / "run")]
        assert [{k: m[k] for k in figures} for m in metrics] == 2 * [
            {k: returned[k] for k in figures}
        ]
        before, after = (read_json(f / "manifest.json") for f in (whole, tmp_path / "run"))
        (again,) = after.pop("resumed")
        assert again["batches"] == 4
        for varying in ("started", "command"):
            del before[varying], after[varying]
        assert before == after

    @pytest.mark.parametrize("damage", ["cut", "altered", "empty"])
    def test_a_damaged_checkpoint_gives_way_to_the_one_before(self, damage, whole, tmp_path):
        begun(tmp_path / "run")
        newest, older = stored(tmp_path / "run")
        content = newest.read_bytes()
        newest.write_bytes(
            {"cut": content[:-1], "altered": content[:-9] + b"x" + content[-8:], "empty": b""}[
                damage
            ]
        )
        with pytest.warns(UserWarning, match=r"is damaged: .* The one before it is used") as told:
            resume(tmp_path / "run")
        assert str(newest) in str(told[0].message)
        assert str(older) in str(told[0].message)
        assert same_end(whole, tmp_path / "run")

    def test_a_run_that_was_killed_before_its_first_batch_begins(self, whole, tmp_path):
        begun(tmp_path / "run")
        shutil.rmtree(tmp_path / "run" / "checkpoints")
        table = tmp_path / "run" / "predictions.csv"
        for name in ("metrics.json", "metrics.csv", "curves.png"):
            (tmp_path / "run" / name).unlink()
        with pytest.raises(InputError, match="has no checkpoint"):  # some is predicted: it stays
            resume(tmp_path / "run")
        table.write_bytes(table.read_bytes().partition(b"\n")[0] + b"\n")
        resume(tmp_path / "run")
        assert same_end(whole, tmp_path / "run")
        assert "resumed" not in read_json(tmp_path / "run" / "manifest.json")

    @pytest.mark.parametrize("content", ["logs/metrics.csv", "checkpoints/last.ckpt", "notes.txt"])
    def test_a_folder_of_something_else_is_not_taken_over(self, content, tmp_path):
        for name in (".lock", "config.yaml", content):
            (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "run" / name).touch()
        with pytest.raises(InputError, match="has no checkpoint of an adaptation"):
            resume(tmp_path / "run")
        assert (tmp_path / "run" / "config.yaml").exists()

    def test_none_that_is_whole_is_told_of(self, tmp_path):
        begun(tmp_path / "run")
        for path in stored(tmp_path / "run"):
            path.write_bytes(path.read_bytes()[:-1])
        before = sorted((p, p.read_bytes()) for p in (tmp_path / "run").rglob("*") if p.is_file())
        with pytest.raises(InputError, match="There is none before it: start the run anew"):
            resume(tmp_path / "run")
        after = sorted((p, p.read_bytes()) for p in (tmp_path / "run").rglob("*") if p.is_file())
        assert before == after

    def test_batches_are_limited_as_they_were(self, tmp_path):
        for name, position in (("whole", 99), ("part", 12)):
            adapter, stream = tent(), stream_that_ends(position)
            trainer = quiet(AdaptationCheckpoint(1), run_dir=tmp_path / name, limit_test_batches=5)
            if name == "whole":
                trainer.adapt(adapter, datamodule=stream)
            else:
                with pytest.raises(ValueError, match="disk"):
                    trainer.adapt(adapter, datamodule=stream)
        trainer = quiet(AdaptationCheckpoint(1), run_dir=None, limit_test_batches=5)
        results = trainer.adapt(tent(), datamodule=make_stream(), resume_from=tmp_path / "part")
        assert results["batches"] == 5
        assert same_end(tmp_path / "whole", tmp_path / "part")
        # and what was left out comes when the limit is gone
        resume(tmp_path / "part")
        assert read_json(tmp_path / "part" / "metrics.json")["completed"] is True

    def test_a_run_that_was_stopped_goes_on_in_its_segment(self, whole, tmp_path):
        class Stop(Callback):
            def on_test_batch_end(self, trainer, *args):
                trainer.should_stop = trainer.test_loop.drawn == 2

        quiet(Stop(), run_dir=tmp_path / "run").adapt(tent(), datamodule=make_stream())
        assert read_json(tmp_path / "run" / "metrics.json")["completed"] is False
        resume(tmp_path / "run")
        assert same_end(whole, tmp_path / "run")

    def test_an_image_that_was_mended_lets_the_run_go_on(self, noise_images, tmp_path):
        from tta_lightning.data import UnlabelledImages

        def folder_stream():
            source = UnlabelledImages(str(tmp_path / "images"))
            return Stream(source, corruptions=["contrast"], batch_size=2, image_size=32)

        noise_images(tmp_path, "images", count=6)
        bad = tmp_path / "images" / "0.png"  # among the last of the stream
        good = bad.read_bytes()
        quiet(run_dir=tmp_path / "whole").adapt(tent("gn"), datamodule=folder_stream())
        bad.write_bytes(good[:200])
        with pytest.raises(InputError, match="truncated"):
            quiet(run_dir=tmp_path / "run").adapt(tent("gn"), datamodule=folder_stream())
        bad.write_bytes(good)
        trainer = quiet(run_dir=None)
        trainer.adapt(tent("gn"), datamodule=folder_stream(), resume_from=tmp_path / "run")
        assert same_end(tmp_path / "whole", tmp_path / "run")

    def test_a_run_that_was_killed_while_it_wrote_its_results_writes_them(self, whole, tmp_path):
        for name, gone in {"a": ["metrics.json"], "b": ["metrics.json", "curves.png"]}.items():
            shutil.copytree(whole, tmp_path / name)
            for file in gone:
                (tmp_path / name / file).unlink()
            resume(tmp_path / name)
            assert same_end(whole, tmp_path / name)
            first, second = (read_json(f / "metrics.json") for f in (whole, tmp_path / name))
            for varying in ("cost",):
                del first[varying], second[varying]
            assert first == second
            assert (tmp_path / name / "curves.png").exists()

    def test_an_error_after_the_last_batch_leaves_a_checkpoint_that_is_whole(self, whole, tmp_path):
        class Late(Callback):
            def on_adapt_end(self, *args):
                raise ValueError("too late")

        trainer = quiet(Late(), run_dir=tmp_path / "run", limit_test_batches=4)
        with pytest.raises(ValueError, match="too late"):
            trainer.adapt(tent(), datamodule=make_stream())
        resume(tmp_path / "run")
        assert same_end(whole, tmp_path / "run")
        assert [s["images"] for s in read_json(tmp_path / "run" / "metrics.json")["segments"]] == [
            12,
            12,
        ]

    def test_one_that_is_older_may_be_interrupted_again(self, whole, tmp_path):
        begun(tmp_path / "run", checkpoint=AdaptationCheckpoint(1, keep_last=5))
        with pytest.raises(ValueError, match="the disk went away"):
            quiet(AdaptationCheckpoint(None, on_exception=False), run_dir=None).adapt(
                tent(),
                datamodule=stream_that_ends(12),
                resume_from=path_of(tmp_path / "run", 1),
            )
        assert stored(tmp_path / "run") == [path_of(tmp_path / "run", 1)]
        # 17 were predicted; of the new ones, from the sixth on, 7: nothing of before is behind them
        assert (tmp_path / "run" / "predictions.csv").read_bytes().count(b"\n") == 1 + 12
        resume(tmp_path / "run")
        assert same_end(whole, tmp_path / "run")

    def test_what_was_half_written_is_removed(self, tmp_path):
        begun(tmp_path / "run")
        part = tmp_path / "run" / "checkpoints" / ".batch-00000005.state.abc"
        part.write_bytes(b"half")
        resume(tmp_path / "run")
        assert not part.exists()

    def test_bad_images_may_be_left_out_from_then_on(self, noise_images, tmp_path):
        from tta_lightning.data import UnlabelledImages

        def folder_stream(choice):
            source = UnlabelledImages(str(tmp_path / "images"))
            return Stream(
                source, corruptions=["contrast"], batch_size=2, image_size=32, on_bad_image=choice
            )

        noise_images(tmp_path, "images", count=6)
        bad = tmp_path / "images" / "0.png"  # among the last of the stream
        bad.write_bytes(bad.read_bytes()[:200])
        with pytest.raises(InputError, match="set on_bad_image: skip"):
            quiet(run_dir=tmp_path / "run").adapt(tent("gn"), datamodule=folder_stream("stop"))
        with pytest.warns(UserWarning, match="Left out"):
            results = quiet(run_dir=None).adapt(
                tent("gn"), datamodule=folder_stream("skip"), resume_from=tmp_path / "run"
            )
        assert (results["completed"], results["bad_images"]["count"]) == (True, 1)
        assert results["overall"]["images"] == 5

    def test_a_batch_without_a_good_image_counts(self, noise_images, tmp_path):
        from tta_lightning.data import UnlabelledImages

        noise_images(tmp_path, "images", count=6)
        source = UnlabelledImages(str(tmp_path / "images"))
        stream = Stream(source, corruptions=["contrast"], batch_size=1, on_bad_image="skip")
        for position in (1, 2):
            bad = tmp_path / "images" / source.path(int(stream.plan.samples[position]), "none", 0)
            bad.write_bytes(bad.read_bytes()[:200])
        names = []

        class Note(AdaptCallback):
            def on_adapt_boundary(self, trainer, adapter):
                names.append((trainer.test_loop.drawn, trainer.test_loop.completed_batches))

        with pytest.warns(UserWarning, match="Left out"):
            quiet(Note()).adapt(tent("gn"), datamodule=stream)
        assert names == [(0, 0), (1, 1), (2, 1), (3, 1), (4, 2), (5, 3), (6, 4), (6, 4)]

    def test_clean_images_are_not_looked_at_again(self, tmp_path, monkeypatch):
        def eata():
            return EATA(make_network("gn"), Adam(lr=0.01), e_margin=5.0, d_margin=2.0)

        from tests.streams import make_source

        options = {"clean": make_source(8, seed=9)}
        whole = tmp_path / "whole"
        quiet(run_dir=whole).adapt(eata(), datamodule=make_stream(**options))
        begun(tmp_path / "run", adapter=eata(), **options)
        monkeypatch.setattr(EATA, "prepare", None)
        resume(tmp_path / "run", adapter=eata(), **options)
        assert same_end(whole, tmp_path / "run")

    def test_callbacks_of_the_user_keep_their_state(self, tmp_path):
        class Count(Callback):
            def __init__(self):
                self.count = 0

            def on_test_batch_end(self, *args):
                self.count += 1

            def state_dict(self):
                return {"count": self.count}

            def load_state_dict(self, state):
                self.count = state["count"]

        begun(tmp_path / "run", Count())
        count = Count()
        resume(tmp_path / "run", count)
        assert count.count == 6

    def test_a_callback_with_a_state_may_not_be_left_out(self, tmp_path):
        class Keeps(Callback):
            def state_dict(self):
                return {"a": 1}

        begun(tmp_path / "run", Keeps())
        before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
        with pytest.raises(InputError, match=r"had the callback .*Keeps, which is missing now"):
            resume(tmp_path / "run")
        assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before

    def test_two_writers_go_on_each_in_its_file(self, whole, tmp_path):
        writers = [PredictionWriter(), PredictionWriter("again.csv")]
        begun(tmp_path / "run", *writers)
        resume(tmp_path / "run", PredictionWriter(), PredictionWriter("again.csv"))
        assert same_end(whole, tmp_path / "run")
        text = (whole / "predictions.csv").read_bytes()
        assert (tmp_path / "run" / "again.csv").read_bytes() == text

    def test_logs_of_both_processes_stay(self, tmp_path):
        begun(tmp_path / "run", position=13)
        quiet(AdaptationCheckpoint(1), run_dir=None, logger=True).adapt(
            tent(), datamodule=make_stream(), resume_from=tmp_path / "run"
        )
        assert (tmp_path / "run" / "logs" / "resumed_2" / "metrics.csv").is_file()


class TestRefusals:
    @pytest.fixture(scope="class")
    @staticmethod
    def run(tmp_path_factory):
        return begun(tmp_path_factory.mktemp("refused") / "run", STAG(0.5))

    CASES = (
        ({"adapter": lambda: tent(lr=0.1)}, r"rule\.lr: 0\.05 then, 0\.1 now"),
        ({"adapter": lambda: CoTTA(make_network("bn"))}, r"method\.name: Tent then, CoTTA now"),
        ({"adapter": lambda: tent("gn")}, r"model\.weights_sha256: .* then, .* now"),
        ({"batch_size": 4}, r"stream\.batch_size: 5 then, 4 now"),
        ({"severity": 2}, r"stream\.severity: 3 then, 2 now"),
        ({"seed": 1}, r"stream\.seed: 0 then, 1 now"),
        ({"scenario": "continual"}, r"stream\.scenario: reset_each_shift then, continual now"),
        ({"images": 11}, r"stream\..*then"),
        ({"callbacks": [STAG(0.25)]}, r"callbacks\.STAG\.weight: 0\.5 then, 0\.25 now"),
        ({"callbacks": []}, r"callbacks\.STAG\.weight: 0\.5 then, nothing now"),
        ({"callbacks": [STAG(0.5), StreamMetrics(10)]}, r"StreamMetrics\.bins: 15 then, 10 now"),
    )

    @pytest.mark.parametrize(("change", "message"), CASES, ids=[case[1][:24] for case in CASES])
    def test_another_run_is_refused_naming_the_difference(self, run, change, message):
        change = dict(change)
        adapter = change.pop("adapter", tent)()
        callbacks = change.pop("callbacks", [STAG(0.5)])
        before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
        with pytest.raises(InputError, match=f"belongs to another run .*{message}"):
            resume(run, *callbacks, adapter=adapter, **change)
        assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before

    def test_other_classes_are_refused(self, tmp_path):
        def of(classes):
            adapter = tent("gn")
            adapter.restrict_classes(classes)
            return adapter

        def stream(make):
            nameless = make()
            nameless.source.classes = None
            return nameless

        options = {"images": 12}
        with pytest.raises(ValueError, match="the disk went away"):
            quiet(AdaptationCheckpoint(1), run_dir=tmp_path / "run").adapt(
                of(range(10)[::-1]), datamodule=stream(lambda: stream_that_ends(17, **options))
            )
        with pytest.raises(
            InputError, match=r"method\.classes: \[9, 8.* then, nothing now|None now"
        ):
            quiet(AdaptationCheckpoint(1), run_dir=None).adapt(
                of(None), datamodule=stream(make_stream), resume_from=tmp_path / "run"
            )

    def test_content_of_another_version_is_refused(self, run, tmp_path):
        shutil.copytree(run, tmp_path / "run")
        write(path_of(tmp_path / "run", 9), {"loop": {"drawn": 9}})
        with pytest.raises(InputError, match="does not hold what this version"):
            resume(tmp_path / "run", STAG(0.5))

    @pytest.mark.parametrize("content", ["{", "[]"])
    def test_a_manifest_that_is_damaged_is_told_of(self, run, content, tmp_path):
        shutil.copytree(run, tmp_path / "run")
        (tmp_path / "run" / "manifest.json").write_text(content)
        before = (tmp_path / "run" / "predictions.csv").read_bytes()
        with pytest.raises(InputError, match=r"manifest.json .*Move it away"):
            resume(tmp_path / "run", STAG(0.5))
        assert (tmp_path / "run" / "predictions.csv").read_bytes() == before

    def test_another_precision_is_refused(self, run):
        with pytest.raises(InputError, match="precision: 32-true then, bf16-mixed now"):
            quiet(STAG(0.5), run_dir=None, precision="bf16-mixed").adapt(
                tent(), datamodule=make_stream(), resume_from=run
            )

    def test_another_rule_of_the_same_name_is_refused(self, tmp_path):
        from tests.test_adapter import make_mgg, make_mgtta
        from tta_lightning.rules import MGG

        torch.manual_seed(3)
        rules = [make_mgg(), MGG(lr=0.01)]  # equal options, other random weights
        begun(tmp_path / "run", adapter=make_mgtta(make_network("gn"), rules[0]), **self.clean())
        other = make_mgtta(make_network("gn"), rules[1])
        with pytest.raises(InputError, match=r"rule\.weights_sha256"):
            resume(tmp_path / "run", adapter=other, **self.clean())

    @staticmethod
    def clean():
        from tests.streams import make_source

        return {"clean": make_source(8, seed=9)}

    def test_a_complete_run_is_refused(self, whole):
        with pytest.raises(InputError, match="is complete: there is nothing to resume"):
            resume(whole)

    def test_another_run_dir_is_refused(self, run):
        with pytest.raises(InputError, match=r"goes on in its own folder .* but run_dir is other"):
            resume(run, STAG(0.5), run_dir="other")

    @pytest.mark.parametrize("option", [{"run_dir": False}, {"fast_dev_run": True}])
    def test_a_trainer_that_writes_nothing_is_refused(self, run, option):
        with pytest.raises(InputError, match="goes on in a run folder"):
            quiet(**option).adapt(tent(), datamodule=make_stream(), resume_from=run)

    def test_plain_dataloaders_are_refused(self, run):
        with pytest.raises(InputError, match="resume_from needs a Stream"):
            quiet(run_dir=None).adapt(tent(), make_batches(), resume_from=run)

    def test_what_is_not_there_is_refused(self, run, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "empty").mkdir()
        copy = shutil.copy(stored(run)[0], tmp_path / "copy.state")
        cases = {
            "nowhere": "There is no run folder or checkpoint 'nowhere'",
            "empty": "has no checkpoint of an adaptation to resume from. A run writes",
            str(run.parent): f"There is one in {run}",
            "last": "There is no run under runs/ that has checkpoints",
            "x" * 300: "There is no run folder or checkpoint",
            "": "resume_from is empty",
            copy: "does not lie in a run folder",
            str(run / "manifest.json"): "does not lie in a run folder",
        }
        for given, message in cases.items():
            with pytest.raises(InputError, match=message):
                resume(given, STAG(0.5))

    def test_predictions_that_are_gone_or_cut_are_told_of(self, tmp_path):
        begun(tmp_path / "run")
        path = tmp_path / "run" / "predictions.csv"
        text, before = path.read_bytes(), self.others(tmp_path / "run")
        path.write_bytes(text[:100])
        with pytest.raises(InputError, match=r"has 100 bytes, but had \d+ when"):
            resume(tmp_path / "run")
        assert path.read_bytes() == text[:100]
        path.unlink()
        with pytest.raises(InputError, match=r"predictions.csv is gone"):
            resume(tmp_path / "run")
        assert self.others(tmp_path / "run") == before
        path.write_bytes(text)  # as the message says
        resume(tmp_path / "run")

    @staticmethod
    def others(folder):
        files = [path for path in folder.rglob("*") if path.is_file()]
        return {p: p.read_bytes() for p in files if p.name != "predictions.csv"}

    def test_two_processes_never_share_a_folder(self, run):
        program = (
            "import sys; from pathlib import Path; from tta_lightning.runs import locked\n"
            "with locked(Path(sys.argv[1])): print('mine', flush=True); sys.stdin.read()"
        )
        other = subprocess.Popen(
            [sys.executable, "-c", program, str(run)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
        )
        assert other.stdout.readline() == b"mine\n"
        with pytest.raises(InputError, match="is in use: another process writes to it"):
            resume(run, STAG(0.5))
        other.kill()  # a process that dies lets go
        other.communicate()
        with locked(run):
            pass


class TestFullDisk:
    """A limit on the size of files stands for a disk without room."""

    @staticmethod
    def limited(folder, limit, every=1):
        program = (
            "import resource, sys, warnings; warnings.simplefilter('ignore')\n"
            "from tests.resume.test_checkpoints import *\n"
            "class Fill(Callback):\n"
            "    def on_test_batch_end(self, trainer, *args):\n"
            "        if trainer.test_loop.drawn == 3:\n"
            f"            resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
            "try:\n"
            f"    quiet(Fill(), AdaptationCheckpoint({every}), run_dir=sys.argv[1]).adapt(\n"
            "        tent(), datamodule=make_stream())\n"
            "except InputError as error:\n"
            "    print(error)\n"
        )
        return subprocess.run(
            [sys.executable, "-c", program, str(folder)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        ).stdout

    def test_a_checkpoint_that_has_no_room_leaves_the_one_before(self, whole, tmp_path):
        told = self.limited(tmp_path / "run", 10_000)
        assert "A checkpoint cannot be written to" in told
        assert "The last good one is" in told
        assert f"resume from {tmp_path / 'run'}" in told
        newest = stored(tmp_path / "run")[0]
        assert newest == path_of(tmp_path / "run", 2)
        read(newest)
        assert not list((tmp_path / "run" / "checkpoints").glob(".*"))  # nothing half written
        resume(tmp_path / "run")
        assert same_end(whole, tmp_path / "run")

    def test_predictions_that_have_no_room_end_with_a_sentence(self, whole, tmp_path):
        told = self.limited(tmp_path / "run", 700, every=2)
        assert "Nothing more can be written" in told
        assert "File too large" in told
        resume(tmp_path / "run")
        assert same_end(whole, tmp_path / "run")

    def test_the_error_of_a_full_disk_is_among_those_that_are_told_of(self, tmp_path):
        with pytest.raises(OSError, match="No space left") as full, open("/dev/full", "w") as file:  # noqa: PTH123
            file.write("x" * 10_000)
        from tta_lightning.trainer import _NO_ROOM

        assert full.value.errno in _NO_ROOM


def test_a_segment_that_was_entered_is_not_entered_again(tmp_path):
    seen = []

    class Resets(AdaptCallback):
        def on_adapt_reset(self, trainer, adapter, reason):
            seen.append(reason)

    begun(tmp_path / "run", Resets())
    resume(tmp_path / "run", Resets())
    assert len(seen) == 1  # before the second segment, by the first process
