"""Checkpoints, interruption and wrong input of the meta-training of MT3."""

import signal
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from torch.utils.data import DataLoader, TensorDataset

from tests.meta.mt3_worker import NETWORK, Trace, make_module, make_trainer, source, tasks
from tests.meta.running import run_process
from tests.networks import are_equal
from tta_lightning.data import LabelledImages
from tta_lightning.errors import InputError
from tta_lightning.models import load_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    # a remark of Lightning on modules that keep older weights for it; what is saved is right
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization"),
]


class Rows(Logger):
    """Keeps what is logged, by step."""

    name, version = "rows", 0

    def __init__(self):
        super().__init__()
        self.rows = []

    @property
    @rank_zero_experiment
    def experiment(self):
        return self.rows

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, metrics))


def run(folder, resume=None, every=None, workers=0, module=None, **options):
    """Meta-train for two epochs of five steps; keep a checkpoint after every step."""
    given = {"every_n_train_steps": 1} if every is None else every
    saving = ModelCheckpoint(
        folder, "{step}", save_top_k=-1, auto_insert_metric_name=False, **given
    )
    trace, rows = Trace(), Rows()
    trainer = make_trainer(trace, saving, enable_checkpointing=True, logger=rows, **options)
    data = tasks(num_workers=workers)
    trainer.fit(make_module(**(module or {})), datamodule=data, ckpt_path=resume)
    return trainer, trace, rows.rows


def assert_the_same_end(whole, rest, done):
    """Compare a resumed training with the rest of one without interruption, bit for bit."""
    (trainer, trace, rows), (resumed, other, later) = whole, rest
    keys = [torch.stack(each.keys) for each in (trace, other)]
    assert torch.equal(keys[0][done:], keys[1])
    assert torch.equal(torch.stack(trace.weights)[done:], torch.stack(other.weights))
    states = [each.optimizers[0].state_dict() for each in (trainer, resumed)]
    assert are_equal(*states)
    assert [row for row in rows if row[0] >= done] == [row for row in later if row[0] >= done]
    assert trainer.callback_metrics == resumed.callback_metrics
    assert resumed.global_step == trainer.global_step
    assert resumed.current_epoch == trainer.current_epoch


@pytest.mark.parametrize(
    ("workers", "steps", "module", "options"),  # 5 steps are an epoch
    [
        (0, (3, 5, 7), {}, {"val_check_interval": 2}),
        (0, (5, 7), {"optimizer": "adam", "schedule": "cosine"}, {"log_every_n_steps": 2}),
        (2, (5, 7), {"schedule": "cosine"}, {}),
        (2, (3,), {"optimizer": "adam"}, {"val_check_interval": 2}),
    ],
)
def test_a_resumed_training_ends_as_one_without_interruption(
    workers, steps, module, options, tmp_path
):
    given = {"workers": workers, "module": module, **options}
    whole = run(tmp_path / "whole", **given)
    assert len(whole[1].keys) == 10
    assert {name for _, row in whole[2] for name in row} > {"train/loss_after", "val/loss_after"}
    for done in steps:
        rest = run(tmp_path / str(done), tmp_path / "whole" / f"{done}.ckpt", **given)
        assert_the_same_end(whole, rest, done)


def test_a_training_may_be_resumed_again(tmp_path):
    whole = run(tmp_path / "whole")
    run(tmp_path / "second", tmp_path / "whole" / "2.ckpt")
    run(tmp_path / "third", tmp_path / "second" / "4.ckpt")
    rest = run(tmp_path / "fourth", tmp_path / "third" / "8.ckpt")
    assert_the_same_end(whole, rest, 8)


@pytest.mark.parametrize(
    ("workers", "every"),
    [(0, {"every_n_epochs": 1}), (2, {"every_n_epochs": 1, "save_on_train_epoch_end": True})],
)
def test_resuming_at_the_end_of_an_epoch(every, workers, tmp_path):
    whole = run(tmp_path / "whole", every=every, workers=workers)
    path = tmp_path / "whole" / "5.ckpt"
    assert_the_same_end(whole, run(tmp_path / "rest", path, every, workers), 5)


def test_limited_epochs_resume_too(tmp_path):
    given = {"limit_train_batches": 3}
    whole = run(tmp_path / "whole", **given)
    rest = run(tmp_path / "rest", tmp_path / "whole" / "3.ckpt", workers=2, **given)
    assert_the_same_end(whole, rest, 3)


def test_a_training_that_max_steps_ended_goes_on_from_its_last_step(tmp_path):
    whole = run(tmp_path / "whole")
    run(tmp_path / "short", max_steps=3)
    rest = run(tmp_path / "rest", tmp_path / "short" / "3.ckpt")
    assert_the_same_end(whole, rest, 3)


def test_an_epoch_that_max_steps_cut_short_is_over_once_the_training_has_ended(tmp_path):
    """Lightning counts it as done, so the next one follows, as a whole."""
    whole = run(tmp_path / "whole")
    trainer, *_ = run(tmp_path / "short", max_steps=3)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    _, trace, _ = run(tmp_path / "rest", tmp_path / "end.ckpt", workers=2)
    assert torch.equal(torch.stack(trace.keys), torch.stack(whole[1].keys)[5:])


def test_a_data_module_forgets_what_it_was_resumed_from(tmp_path):
    _, whole, _ = run(tmp_path / "whole")
    data, trace = tasks(), Trace()
    with pytest.warns(UserWarning, match="callbacks used to create the checkpoint"):
        make_trainer().fit(make_module(), datamodule=data, ckpt_path=tmp_path / "whole" / "7.ckpt")
    make_trainer(trace).fit(make_module(), datamodule=data)
    assert torch.equal(torch.stack(trace.weights), torch.stack(whole.weights))


def test_the_checkpoint_is_a_model(tmp_path):
    _, trace, _ = run(tmp_path)
    network = load_model(str(tmp_path / "7.ckpt"))
    loaded = torch.nn.utils.parameters_to_vector(network.parameters())
    assert torch.equal(loaded, trace.weights[6])


# The command line -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config(tmp_path_factory, noise_images):
    """A configuration that trains a tiny network for two epochs of four meta-steps."""
    folder = tmp_path_factory.mktemp("mt3_cli")
    noise_images(folder / "images", "a", "b", "c", count=8, size=8)
    images = {"class_path": "ImageFolder", "init_args": {"root": str(folder / "images")}}
    saving = {"dirpath": None, "filename": "{step}", "auto_insert_metric_name": False}
    saving |= {"every_n_train_steps": 1, "save_top_k": -1}
    content = {
        "seed_everything": 0,
        "model": {
            "class_path": "tta_lightning.meta.MT3",
            "init_args": {"network": NETWORK, "lr": 0.1, "schedule": "cosine"},
        },
        "data": {
            "class_path": "LabelledTasks",
            "init_args": {
                **{"train": images, "test": images, "val_fraction": 0.2},
                **{"tasks": 2, "images_per_task": 2},
            },
        },
        "trainer": {
            **{"max_epochs": 2, "accelerator": "cpu", "log_every_n_steps": 1},
            **{"enable_progress_bar": False, "enable_model_summary": False},
            "callbacks": [{"class_path": "ModelCheckpoint", "init_args": saving}],
        },
    }
    path = folder / "mt3.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def finished(config, tta):
    """The run folder of that training."""
    outcome = tta(config.parent, "fit", "-c", config, "--trainer.run_dir", "whole")
    assert outcome.code == 0, outcome.err
    return config.parent / "whole"


def test_a_killed_process_is_resumed(config, finished, tta):
    content = yaml.safe_load(config.read_text())
    killed = {"class_path": "tests.meta.mt3_worker.Killed", "init_args": {"step": 6}}
    content["trainer"]["callbacks"].append(killed)
    path = config.with_name("killed.yaml")
    path.write_text(yaml.safe_dump(content))
    command = [Path(sys.executable).with_name("tta"), "fit", "-c", path]
    tried = (*command, "--trainer.run_dir", "killed")
    done = run_process(config.parent, *tried, threads=torch.get_num_threads())
    assert done.returncode == -signal.SIGKILL, done.stderr
    saved = config.parent / "killed" / "checkpoints"
    last = max(saved.glob("*.ckpt"), key=lambda path: int(path.stem))
    assert 4 < int(last.stem) < 8  # in the middle of the second epoch
    resumed = ("--ckpt_path", last, "--trainer.run_dir", "resumed")
    outcome = tta(config.parent, "fit", "-c", config, *resumed)
    assert outcome.code == 0, outcome.err
    one, other = (_saved(config.parent / name) for name in ("whole", "resumed"))
    assert are_equal(one["state_dict"], other["state_dict"])
    assert are_equal(one["optimizer_states"], other["optimizer_states"])
    assert one["global_step"] == other["global_step"] == 8


def _saved(folder):
    return torch.load(folder / "checkpoints" / "8.ckpt", weights_only=True)


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_a_meta_trained_network_is_measured(verb, config, finished, tta):
    checkpoint = finished / "checkpoints" / "8.ckpt"
    outcome = tta(config.parent, verb, "-c", config, "--ckpt_path", checkpoint)
    assert outcome.code == 0, outcome.err
    names = {
        "validate": ["val/loss_before", "val/accuracy_after", "val/ssl_after"],
        "test": ["test/loss", "test/accuracy"],
    }
    for name in names[verb]:
        assert name in outcome.out


def test_test_is_that_of_the_network_without_a_step():
    module = make_module()
    data = tasks(test=source(30, seed=5))
    (figures,) = make_trainer().test(module, datamodule=data, verbose=False)
    images = torch.stack([torch.from_numpy(source(30, seed=5).load(i)) for i in range(30)])
    labels = torch.arange(30) % 3
    logits = module.network(images.permute(0, 3, 1, 2) / 255)
    accuracy = (logits.argmax(1) == labels).float().mean().item()
    loss = -logits.log_softmax(1)[torch.arange(30), labels].mean().item()
    assert figures["test/accuracy"] == pytest.approx(accuracy, abs=1e-6)
    assert figures["test/loss"] == pytest.approx(loss, abs=1e-5)


# What people get wrong ------------------------------------------------------------------------


def test_batches_that_are_not_tasks():
    with pytest.raises(InputError, match=r"MT3 needs batches of tasks .* LabelledTasks gives"):
        make_trainer().fit(make_module(), datamodule=LabelledImages(source(), batch_size=8))
    loader = DataLoader(TensorDataset(torch.rand(8, 3, 8, 8)), batch_size=4)
    with pytest.raises(InputError, match="MT3 needs batches of tasks"):
        make_trainer(num_sanity_val_steps=1).fit(make_module(), loader, loader)


def test_repeat_takes_one_image_a_task():
    module = make_module(task_mode="repeat", copies=2)
    with pytest.raises(InputError, match=r"takes one image a task, and these have 2\. Set images"):
        make_trainer().fit(module, datamodule=tasks())
    make_trainer(max_steps=1).fit(module, datamodule=tasks(images_per_task=1))


def test_the_trainer_leaves_gradients_alone():
    with pytest.raises(InputError, match="MT3 takes its optimizer steps itself"):
        make_trainer(accumulate_grad_batches=2).fit(make_module(), datamodule=tasks())
