"""Joint training, the network to compare MT3 with."""

import copy
import math

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector
from torch.utils.data import DataLoader

from tests.meta.mt3_worker import NETWORK, make_trainer, source
from tta_lightning.data import LabelledImages
from tta_lightning.errors import InputError
from tta_lightning.meta import JointTraining
from tta_lightning.methods import MT3
from tta_lightning.models import load_model
from tta_lightning.models.byol import find_byol_heads


def make_module(**options):
    torch.manual_seed(0)
    return JointTraining(NETWORK, **options)


def loader(batches=4, size=6):
    """The same batches in every epoch."""
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(batches * size, 3, 8, 8, generator=generator)
    labels = torch.arange(batches * size) % 3
    return DataLoader(list(zip(images, labels, strict=True)), batch_size=size)


class Recorder(Callback):
    """Keeps the views that were drawn, and the weights after every batch."""

    def __init__(self, module):
        self.views, self.online, self.slow, draw = [], [], [], module._views

        def drawn(images):
            self.views.append(draw(images))
            return self.views[-1]

        module._views = drawn

    def on_train_batch_end(self, trainer, module, *args):
        self.online.append(parameters_to_vector(module.network.parameters()).detach())
        self.slow.append(parameters_to_vector(module.target.parameters()).detach())


def fit(module, **options):
    recorder = Recorder(module)
    trainer = make_trainer(recorder, limit_val_batches=0, **options)
    trainer.fit(module, loader(), loader())
    return trainer, recorder


def parts(network):
    """Take the backbone apart: what gives the features, and the head."""
    layers = list(network.backbone.network)
    return nn.Sequential(*layers[:-1]), layers[-1]


def unit(vectors):
    return vectors / vectors.norm(dim=1, keepdim=True)


def by_hand(views, labels, accumulated=1, ssl_weight=0.1, tau_base=0.996):
    """Weights of network and average after each batch, the recipe written out."""
    network = find_byol_heads(make_module().network).double()
    slow = copy.deepcopy(network)
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
    steps, step = len(views) // accumulated, 0
    online_path, slow_path = [], []
    for number, ((pair, classified), target) in enumerate(zip(views, labels, strict=True), 1):
        trunk, head = parts(network)
        predictions = network.predictor(network.projector(trunk(pair)))
        goals = slow.projector(parts(slow)[0](pair)).detach()
        count = len(pair) // 2
        similar = unit(predictions) * unit(torch.cat([goals[count:], goals[:count]]))
        ssl = (2 - 2 * similar.sum(1)).sum() / count
        loss = F.cross_entropy(head(trunk(classified)), target) + ssl_weight * ssl
        (loss / accumulated).backward()
        if number % accumulated == 0:
            optimizer.step()
            optimizer.zero_grad()
            tau = 1 - (1 - tau_base) * (math.cos(math.pi * step / steps) + 1) / 2
            with torch.no_grad():
                for old, new in zip(slow.parameters(), network.parameters(), strict=True):
                    old.copy_(tau * old + (1 - tau) * new)
            step += 1
        online_path.append(parameters_to_vector(network.parameters()).detach())
        slow_path.append(parameters_to_vector(slow.parameters()).detach())
    return torch.stack(online_path), torch.stack(slow_path)


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("options", [{}, {"ssl_weight": 2.0, "tau_base": 0.5}])
def test_training_equals_the_recipe_written_out(accumulated, options):
    module = make_module(**options)
    _, seen = fit(module, precision="64-true", accumulate_grad_batches=accumulated)
    labels = [labels for _ in range(2) for _, labels in loader()]
    online, slow = by_hand(seen.views, labels, accumulated, **options)
    assert len(online) == 8
    torch.testing.assert_close(torch.stack(seen.online), online, rtol=0, atol=1e-10)
    torch.testing.assert_close(torch.stack(seen.slow), slow, rtol=0, atol=1e-10)
    assert (slow[-1] - slow[0]).abs().max() > 1e-5
    other, _ = by_hand(seen.views, labels, accumulated, **{**options, "ssl_weight": 0.0})
    assert (other[-1] - online[-1]).abs().max() > 1e-4


def test_the_average_is_not_trained():
    module = make_module(tau_base=1.0)  # keeps all of itself in the first step
    trainer, seen = fit(module, max_epochs=1)
    trained = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert not any(p.requires_grad or p.grad is not None for p in module.target.parameters())
    assert trained == {id(parameter) for parameter in module.network.parameters()}
    start = parameters_to_vector(make_module().target.parameters())
    assert all(torch.equal(weights, start) for weights in seen.slow)
    assert not torch.equal(seen.online[-1], start)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_views_are_drawn_for_each_batch_from_the_seed(accumulated):
    options = {"accumulate_grad_batches": accumulated, "max_epochs": 2}
    (_, one), (_, same) = (fit(make_module(seed=4), **options) for _ in range(2))
    _, other = fit(make_module(seed=5), **options)
    for number in range(8):
        pairs = [recorder.views[number] for recorder in (one, same, other)]
        assert all(torch.equal(a, b) for a, b in zip(pairs[0], pairs[1], strict=True))
        assert not torch.equal(pairs[0][0], pairs[2][0])
        assert (pairs[0][0].shape, pairs[0][1].shape) == ((12, 3, 8, 8), (6, 3, 8, 8))
    # the second epoch has the same images, and other views of them
    assert not any(torch.equal(one.views[i][0], one.views[i + 4][0]) for i in range(4))
    constant = torch.full((6, 3, 8, 8), 0.5)  # of which only draws make different views
    module = make_module()
    drawn = []
    trainer = make_trainer(limit_val_batches=0, **{**options, "max_epochs": 1})
    draw = module._views
    module._views = lambda images: drawn.append(draw(constant)) or drawn[-1]
    trainer.fit(module, loader(), loader())
    assert len({views.numpy().tobytes() for views, _ in drawn}) == 4


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("options", [{}, {"optimizer": "adamw", "schedule": "cosine"}])
def test_a_resumed_training_ends_as_one_without_interruption(options, tmp_path):
    def run(folder, resume=None):
        saving = ModelCheckpoint(
            tmp_path / folder,
            "{step}",
            save_top_k=-1,
            every_n_train_steps=4,
            auto_insert_metric_name=False,
        )
        module = make_module(**options)
        recorder = Recorder(module)
        trainer = make_trainer(recorder, saving, enable_checkpointing=True, limit_val_batches=0)
        trainer.fit(module, loader(), loader(), ckpt_path=resume)
        return recorder

    whole, rest = run("whole"), run("rest", tmp_path / "whole" / "4.ckpt")
    assert len(rest.online) == 4
    for what in ("online", "slow"):
        ours, theirs = getattr(rest, what), getattr(whole, what)[4:]
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    pairs = zip(rest.views, whole.views[4:], strict=True)
    assert all(torch.equal(a[0], b[0]) for a, b in pairs)


def test_the_checkpoint_is_what_the_adapter_takes(tmp_path):
    module = make_module()
    trainer, seen = fit(module)
    trainer.save_checkpoint(tmp_path / "jt.ckpt")
    network = load_model(str(tmp_path / "jt.ckpt"))
    assert torch.equal(parameters_to_vector(network.parameters()), seen.online[-1])
    adapter = MT3(str(tmp_path / "jt.ckpt"), copies=2, lr=0.01, episodes="loop")
    images = next(iter(loader()))[0]
    logits = adapter.adapt_step(images)
    assert logits.shape == (6, 3)
    assert logits.isfinite().all()
    assert 0 < (logits - network.eval()(images)).abs().max() < 1


def test_validation_is_that_of_the_network_as_it_is():
    module = make_module()
    data = LabelledImages(source(30), val=source(20, seed=2), batch_size=10)
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, datamodule=data)
    images, labels = (torch.cat(parts) for parts in zip(*data.val_dataloader(), strict=True))
    logits = module.network.eval()(images)
    figures = trainer.callback_metrics
    accuracy = (logits.argmax(1) == labels).float().mean()
    assert set(figures) == {"train/loss", "train/ssl", "val/loss", "val/accuracy"}
    assert figures["val/loss"].item() == pytest.approx(
        F.cross_entropy(logits, labels).item(), abs=1e-5
    )
    assert figures["val/accuracy"].item() == pytest.approx(accuracy.item(), abs=1e-6)
    assert 0 < figures["train/ssl"] < 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ssl_weight": -0.1}, "ssl_weight = -0.1 is out of range: expected 0 or more"),
        ({"ssl_weight": float("nan")}, "ssl_weight = nan"),
        ({"tau_base": 1.1}, "tau_base = 1.1 is out of range: expected 0 <= tau_base <= 1"),
        ({"tau_base": -0.1}, "tau_base = -0.1"),
        ({"seed": -1}, "seed = -1 is out of range: expected 0 or more"),
        ({"schedule": "constnat"}, "Did you mean 'constant'?"),
        ({"warmup": 1.0}, "warmup = 1.0"),
    ],
)
def test_arguments_that_are_not_possible(options, message):
    with pytest.raises(InputError) as error:
        make_module(**options)
    assert message in str(error.value)


def test_a_network_without_heads_is_refused():
    with pytest.raises(InputError, match="has no BYOL heads"):
        JointTraining(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)))


def test_a_crop_that_is_larger_than_the_images_is_refused():
    with pytest.raises(InputError, match="crops of 5 to 9 px, but the images have 8 x 8 px"):
        fit(make_module(crop=(5, 9)))
