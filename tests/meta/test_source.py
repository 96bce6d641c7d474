"""Supervised training of the source model."""

import math
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch.nn.utils import parameters_to_vector
from torch.utils.data import DataLoader

from tests.streams import make_source
from tta_lightning.data import ArraySource, LabelledImages
from tta_lightning.errors import InputError
from tta_lightning.meta import SourceTraining
from tta_lightning.meta.source import cosine_with_warmup
from tta_lightning.models import ResNet26GN, describe, load_model
from tta_lightning.trainer import Trainer

NETWORK = {"class_path": "tta_lightning.models.SmallConvNet", "init_args": {"width": 8}}


def two_colours(images=64):
    """Dark and bright noise: two classes that any network can tell apart."""
    rng = np.random.default_rng(0)
    labels = np.arange(images) % 2
    pixels = rng.integers(0, 100, (images, 32, 32, 3)) + 120 * labels[:, None, None, None]
    return ArraySource(pixels.astype(np.uint8), labels, ("dark", "bright"))


def trainer(tmp_path, **options):
    given = {
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
        "log_every_n_steps": 1,
        "max_epochs": 2,
    }
    return Trainer(run_dir=tmp_path / "run", **{**given, **options})


@pytest.fixture
def fitted(tmp_path):
    pl.seed_everything(0, verbose=False)
    module = SourceTraining({**NETWORK, "num_classes": 2}, lr=1e-2)
    data = LabelledImages(two_colours(), test=two_colours(20), batch_size=8, flip=True)
    fitting = trainer(tmp_path, max_epochs=6)
    fitting.fit(module, datamodule=data)
    return fitting, module, data


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_learns_and_the_checkpoint_is_a_model(fitted, tmp_path):
    fitting, module, data = fitted
    assert fitting.callback_metrics["val/accuracy"] == 1.0
    assert fitting.optimizers[0].param_groups[0]["lr"] < 1e-6  # the cosine is stepwise
    (test,) = trainer(tmp_path).test(module, datamodule=data, verbose=False)
    assert test["test/accuracy"] == 1.0
    (path,) = (tmp_path / "run" / "checkpoints").glob("*.ckpt")
    network = load_model(str(path))
    assert describe(network).class_names == ("dark", "bright")
    images = torch.rand(4, 3, 32, 32)
    module.eval()
    assert torch.equal(network(images), module(images))


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_batch_normalisation_learns_its_statistics(fitted):
    _, module, _ = fitted
    layers = [m for m in module.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert layers
    assert all(layer.num_batches_tracked > 0 for layer in layers)
    assert all(not torch.equal(m.running_var, torch.ones_like(m.running_var)) for m in layers)


def test_schedule():
    factors = [cosine_with_warmup(step, 100, 0.1) for step in range(101)]
    assert factors[:3] == pytest.approx([1 / 11, 2 / 11, 3 / 11])
    assert factors[10] == 1.0
    assert factors[55] == pytest.approx(0.5)
    assert factors[100] == pytest.approx(0.0)
    assert cosine_with_warmup(25, 100, 0.0) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))


class Steps(pl.Callback):
    """Keeps the learning rate that each step is taken with, and the weights after it."""

    def __init__(self):
        self.rates, self.weights = [], []

    def on_train_batch_start(self, trainer, *args):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(self, trainer, module, *args):
        self.weights.append(parameters_to_vector(module.network.parameters()).detach())
        trainer.should_stop = trainer.max_epochs == -1


def fixed_batches():
    """Three batches of eight, in the same order every epoch."""
    images = torch.rand(24, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return DataLoader(list(zip(images, torch.arange(24) % 2, strict=True)), batch_size=8)


def train(module, **options):
    steps = Steps()
    given = {"limit_val_batches": 0, "enable_checkpointing": False, "callbacks": steps}
    fitting = trainer(Path(), **{**given, **options})
    fitting.run_dir = False  # writes nothing
    fitting.fit(module, fixed_batches(), fixed_batches())
    return steps


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0.0, [1, 1, 1, 1, 1, 1]),
        ("constant", 0.5, [1 / 4, 2 / 4, 3 / 4, 1, 1, 1]),
        ("cosine", 0.0, [0.5 * (1 + math.cos(math.pi * step / 6)) for step in range(6)]),
        ("cosine", 0.5, [1 / 4, 2 / 4, 3 / 4, 1, 3 / 4, 1 / 4]),
    ],
)
def test_the_learning_rate_of_each_step(schedule, warmup, expected):
    module = SourceTraining({**NETWORK, "num_classes": 2}, 0.2, schedule=schedule, warmup=warmup)
    steps = train(module)
    assert steps.rates == pytest.approx([0.2 * factor for factor in expected], abs=1e-9)


def test_a_constant_learning_rate_needs_no_end():
    options = {"weight_decay": 0.0, "schedule": "constant", "warmup": 0.0}
    module = SourceTraining({**NETWORK, "num_classes": 2}, **options)
    assert train(module, max_epochs=-1).rates == [1e-3]
    with pytest.raises(InputError, match="depends on when the training ends: set max_epochs"):
        train(
            SourceTraining({**NETWORK, "num_classes": 2}, schedule="constant", warmup=0.1),
            max_epochs=-1,
        )


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_supervised_baseline_of_mt3_is_plain_sgd(nesterov):
    """SGD at a constant 0.1 with momentum 0.9, no weight decay, a head without bias."""

    def make():
        torch.manual_seed(0)
        return ResNet26GN(num_classes=2, width=4, groups=2, head_bias=False)

    options = {"schedule": "constant", "warmup": 0.0, "weight_decay": 0.0, "nesterov": nesterov}
    steps = train(SourceTraining(make(), 0.1, "sgd", **options))
    network = make()
    assert network.head.bias is None
    reference = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, nesterov=nesterov)
    for number, (images, labels) in enumerate([*fixed_batches(), *fixed_batches()]):
        reference.zero_grad()
        torch.nn.functional.cross_entropy(network(images), labels).backward()
        reference.step()
        weights = parameters_to_vector(network.parameters()).detach()
        torch.testing.assert_close(steps.weights[number], weights, rtol=1e-4, atol=1e-6)


def test_label_smoothing_is_torchs():
    logits, labels = torch.randn(5, 10), torch.arange(5)
    module = SourceTraining(NETWORK, label_smoothing=0.2)
    log_p = logits.log_softmax(1)
    by_hand = -(0.8 * log_p[torch.arange(5), labels] + 0.2 * log_p.mean(1)).mean()
    torch.testing.assert_close(module.training_loss(logits, labels), by_hand)


def test_validation_images_are_not_trained_on():
    data = LabelledImages(two_colours(50), val_fraction=0.2, batch_size=5)
    train, val = set(data._train_indices.tolist()), set(data._val_indices.tolist())
    assert len(train) == 40
    assert len(val) == 10
    assert not train & val


def test_crops_and_flips():
    source = make_source(1)
    data = LabelledImages(source, val=source, batch_size=1, crop_padding=2, flip=True)
    original = torch.from_numpy(source.load(0)).permute(2, 0, 1) / 255
    padded = torch.nn.functional.pad(original, (2,) * 4)
    views = {
        v.numpy().tobytes()
        for top in range(5)
        for left in range(5)
        for view in (padded[:, top : top + 32, left : left + 32],)
        for v in (view, view.flip(2))
    }
    seen = {next(iter(data.train_dataloader())).images[0].numpy().tobytes() for _ in range(60)}
    assert seen <= views
    assert len(seen) > 20
    assert next(iter(data.val_dataloader())).images[0].equal(original)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SourceTraining(NETWORK, label_smoothing=1.0), "label_smoothing = 1.0"),
        (lambda: SourceTraining(NETWORK, warmup=-0.1), "warmup = -0.1"),
        (lambda: SourceTraining(NETWORK, schedule="cosin"), "Did you mean 'cosine'"),
        (lambda: SourceTraining(NETWORK, optimizer="adam"), "Did you mean 'adamw'"),
        (lambda: SourceTraining(NETWORK, lr=0.0), "lr = 0.0 is out of range"),
        (lambda: SourceTraining(NETWORK, lr=float("nan")), "lr = nan is out of range"),
        (lambda: SourceTraining(NETWORK, weight_decay=-0.1), "weight_decay = -0.1 is out of range"),
        (lambda: LabelledImages(two_colours(), val_fraction=1.5), "val_fraction = 1.5"),
        (lambda: LabelledImages(two_colours(1)), "none to train on"),
        (lambda: LabelledImages(two_colours(), limit=-5), "limit = -5"),
        (lambda: LabelledImages(two_colours(), seed=-1), "seed = -1"),
        (lambda: LabelledImages(two_colours(), batch_size=0), "batch_size = 0"),
        (
            lambda: LabelledImages(ArraySource(np.zeros((3, 32, 32, 3), np.uint8))),
            "without labels",
        ),
        (lambda: LabelledImages(two_colours(), val=make_source()), "different classes"),
    ],
)
def test_arguments_that_are_not_possible(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_the_cosine_needs_an_end(tmp_path):
    module = SourceTraining({**NETWORK, "num_classes": 2})
    with pytest.raises(InputError, match="max_epochs"):
        trainer(tmp_path, max_epochs=-1).fit(module, datamodule=LabelledImages(two_colours()))


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_each_fit_of_a_trainer_has_its_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fitting = trainer(tmp_path, max_epochs=1)
    fitting.run_dir = None
    for _ in range(2):
        fitting.fit_loop.epoch_progress.reset()
        fitting.fit(
            SourceTraining({**NETWORK, "num_classes": 2}),
            datamodule=LabelledImages(two_colours(), batch_size=8),
        )
    assert len(list((tmp_path / "runs").glob("*/checkpoints/*.ckpt"))) == 2


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_tests_see_the_size_that_the_model_was_made_for(tmp_path):
    network = {"spec": "timm:resnet10t", "pretrained": False, "num_classes": 2}
    module = SourceTraining(network)
    data = LabelledImages(two_colours(), test=two_colours(4))
    trainer(tmp_path).test(module, datamodule=data, verbose=False)
    assert data.geometry.size == describe(module.network).input_size is not None


@pytest.mark.parametrize("classes", [2, 20])
def test_a_head_of_another_width_is_refused_before_training(classes, tmp_path):
    module = SourceTraining({**NETWORK, "num_classes": classes})
    with pytest.raises(InputError, match=f"{classes} logits"):
        trainer(tmp_path).fit(module, datamodule=LabelledImages(make_source(), batch_size=4))
    assert not (tmp_path / "run").exists()
