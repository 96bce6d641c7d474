"""Meta-training of MT3 through the trainer against steps written by hand."""

import copy
import math
import warnings

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader

from tests.meta.pretraining import make_trainer
from tests.streams import CLASSES, make_source
from tta_lightning.data import LabelledImages, LabelledTasks
from tta_lightning.errors import InputError
from tta_lightning.inner_loop import InnerLoop, Task, task_loss, unstack
from tta_lightning.meta import MT3
from tta_lightning.models import BYOLHeads, SmallConvNet, load_model
from tta_lightning.models.byol import Embedder
from tta_lightning.views import (
    ViewOptions,
    generator,
    shift_together,
    ssl_views,
    supervised_views,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers.*")

GAMMA, ALPHA, LR = 0.1, 0.1, 0.05


class GroupNet(nn.Module):
    """A group-normalised convolution over patches, a hidden layer, a head."""

    def __init__(self, num_classes: int = 10, dropout: float = 0.0) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 4, stride=4),
            nn.GroupNorm(2, 8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(32, 12),
            nn.ReLU(),
        )
        self.head = nn.Linear(12, num_classes)

    def forward(self, images):
        return self.head(self.body(images))


class AttentionNet(nn.Module):
    """Patches that look at each other through ``nn.MultiheadAttention``, their mean, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 8, stride=8)
        self.norm, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 10)

    def forward(self, images):
        tokens = self.norm(self.patches(images).flatten(2).mT)
        seen, _ = self.attention(tokens, tokens, tokens, need_weights=False)
        return self.head((tokens + seen).mean(dim=1))


def heads_on(backbone):
    torch.manual_seed(0)
    return BYOLHeads(backbone, hidden=8, projection=6)


def make_network(dropout=0.0):
    torch.manual_seed(0)
    return heads_on(GroupNet(dropout=dropout))


def make_module(network=None, dtype=torch.float64, **options):
    given = {"lr": LR, **options}
    return MT3(make_network() if network is None else network, **given).to(dtype)


def make_data(images=60, tasks=3, images_per_task=4, limit=None, **options):
    return LabelledTasks(
        make_source(images),
        val_fraction=0.4,
        tasks=tasks,
        images_per_task=images_per_task,
        limit=limit,
        image_size="keep",
        **options,
    )


class Trace(Callback):
    """Keeps the batches, the weights before and after each, and what was logged."""

    def __init__(self):
        self.batches, self.val, self.weights, self.logged, self.rates = [], [], [], [], []
        self.modes = []

    def on_train_start(self, trainer, module):
        self.weights.append(copy.deepcopy(module.network.state_dict()))

    def on_train_batch_start(self, trainer, module, batch, *args):
        self.modes.append(module.network.training)
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(self, trainer, module, outputs, batch, *args):
        self.batches.append(batch)
        self.weights.append(copy.deepcopy(module.network.state_dict()))
        self.logged.append({n: v.item() for n, v in trainer.callback_metrics.items()})

    def on_validation_batch_end(self, trainer, module, outputs, batch, *args):
        self.val.append(batch)


def fit(module, data=None, val=False, **options):
    """Train; by default for one epoch of three meta-steps in float64."""
    trace = Trace()
    given = {"precision": "64-true", "limit_val_batches": 1.0 if val else 0, **options}
    trainer = make_trainer(trace, **given)
    trainer.fit(module, datamodule=make_data() if data is None else data)
    return trainer, trace


# One meta-step, written by hand -------------------------------------------------------------------


class ByHand:
    """The published recipe: tasks one after the other, averaged, clipped, SGD with momentum."""

    def __init__(self, network, clip=10.0, inner_clip=10.0, momentum=0.9, steps=1):
        self.network, self.clip, self.inner_clip = copy.deepcopy(network).double(), clip, inner_clip
        self.steps, self.momentum, self.buffers = steps, momentum, {}
        self.parameters = dict(self.network.named_parameters())

    def run(self, parameters, images):
        """Logits, projections and predictions of images under other parameters."""
        network = self.network

        def part(name, inputs):
            module = network.get_submodule(name)
            own = {n: parameters[f"{name}.{n}"] for n, _ in module.named_parameters()}
            return torch.func.functional_call(module, own, (inputs,))

        features = part("backbone.body", images)
        projections = part("projector", features)
        return part("backbone.head", features), projections, part("predictor", projections)

    def ssl(self, parameters, views):
        a, b = views
        total = 0
        for online, target in ((a, b), (b, a)):
            aim = self.run(parameters, target)[1].detach()
            total = total + 2 - 2 * F.cosine_similarity(self.run(parameters, online)[2], aim)
        return total.mean()

    def adapted(self, parameters, views):
        for _ in range(self.steps):
            found = torch.autograd.grad(
                self.ssl(parameters, views),
                list(parameters.values()),
                create_graph=True,
                allow_unused=True,
            )
            moved = {}
            for (name, tensor), g in zip(parameters.items(), found, strict=True):
                g = torch.zeros_like(tensor) if g is None else clipped(g, self.inner_clip)
                moved[name] = tensor - ALPHA * g
            parameters = moved
        return parameters

    def losses(self, parameters, task):
        logits = self.run(parameters, task.images)[0]
        accuracy = (logits.argmax(1) == task.labels).double().mean()
        return F.cross_entropy(logits, task.labels), self.ssl(parameters, task.views), accuracy

    def figures(self, tasks):
        """Means over tasks of the losses before and after the steps."""
        before = [self.losses(self.parameters, task) for task in tasks]
        after = [self.losses(self.adapted(self.parameters, t.views), t) for t in tasks]
        named = {}
        for when, each in (("before", before), ("after", after)):
            means = (
                torch.tensor([[n.item() for n in losses] for losses in each], dtype=torch.float64)
                .mean(0)
                .tolist()
            )
            named |= dict(
                zip((f"loss_{when}", f"ssl_{when}", f"accuracy_{when}"), means, strict=True)
            )
        return named

    def gradients(self, tasks):
        total = 0
        for task in tasks:
            ce, ssl, _ = self.losses(self.adapted(self.parameters, task.views), task)
            total = total + (ce + GAMMA * ssl) / len(tasks)
        return torch.autograd.grad(total, list(self.parameters.values()))

    def step(self, tasks):
        for (name, p), g in zip(self.parameters.items(), self.gradients(tasks), strict=True):
            self.buffers[name] = self.momentum * self.buffers.get(name, 0) + clipped(g, self.clip)
            p.data -= LR * self.buffers[name]


def clipped(gradient, clip):
    norm = gradient.square().sum().sqrt()
    return gradient * clip / norm if norm > clip else gradient


def assert_equal_weights(ours, expected, atol=1e-12):
    assert ours.keys() == expected.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, expected[name].to(tensor), rtol=0, atol=atol, msg=name)


@pytest.mark.parametrize("backend", ["loop", "vmap"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.0},
        {"clip": 0.2},
        {"steps": 2},
    ],
    ids=["published", "no momentum", "clipped", "two steps"],
)
def test_meta_steps_equal_those_by_hand(backend, options):
    network = make_network()
    by_hand = ByHand(network, **options)
    module = make_module(network, backend=backend, **options)
    _, trace = fit(module)
    assert len(trace.batches) == 3
    assert not any(trace.modes)
    for batch, weights in zip(trace.batches, trace.weights[1:], strict=True):
        tasks = unstack(module.draw(batch))
        if "clip" in options:  # after averaging, and some tensors alone
            norms = [g.norm() for g in by_hand.gradients(tasks)]
            assert min(norms) < 0.2 < max(norms)
        by_hand.step(tasks)
        assert_equal_weights(weights, by_hand.network.state_dict())
    first, last = trace.weights[0], trace.weights[-1]
    assert max((last[n] - first[n]).abs().max() for n in last) > 1e-3


def test_the_inner_gradient_is_clipped():
    network = make_network()
    by_hand = ByHand(network, inner_clip=0.02)
    module = make_module(network, inner_clip=0.02)
    _, trace = fit(module)
    for batch in trace.batches:
        by_hand.step(unstack(module.draw(batch)))
    assert_equal_weights(trace.weights[-1], by_hand.network.state_dict())
    unclipped, _ = fit(make_module())
    other = unclipped.lightning_module.network.state_dict()
    assert max((other[n] - t).abs().max() for n, t in trace.weights[-1].items()) > 1e-6


def test_adam_follows_torchs():
    module, network = make_module(optimizer="adam", lr=0.01), make_network().double()
    by_hand = ByHand(network)
    optimizer = torch.optim.Adam(by_hand.parameters.values(), lr=0.01)
    _, trace = fit(module)
    for batch in trace.batches:
        found = by_hand.gradients(unstack(module.draw(batch)))
        for parameter, gradient in zip(by_hand.parameters.values(), found, strict=True):
            parameter.grad = gradient
        optimizer.step()
    assert_equal_weights(trace.weights[-1], by_hand.network.state_dict(), 1e-9)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_the_schedule_counts_meta_steps(schedule):
    _, trace = fit(make_module(schedule=schedule), epochs=2)
    steps = [LR * (1 + math.cos(math.pi * n / 6)) / 2 for n in range(6)]
    assert trace.rates == pytest.approx(steps if schedule == "cosine" else [LR] * 6)


def test_first_order_is_another_step():
    (_, first), (_, second) = (fit(make_module(first_order=flag)) for flag in (True, False))
    gap = max((first.weights[1][n] - t).abs().max() for n, t in second.weights[1].items())
    assert 1e-6 < gap < 0.1
    module = make_module(first_order=True)
    theta = dict(module.embedder.named_parameters())
    loop = InnerLoop(lr=ALPHA, first_order=True)
    tasks = module.draw(first.batches[0])
    losses = [task_loss(module.embedder, theta, t, loop, GAMMA).total for t in unstack(tasks)]
    expected = torch.autograd.grad(sum(losses) / 3, list(theta.values()))
    ours, _ = module.meta_gradients(tasks)
    for name, gradient in zip(theta, expected, strict=True):
        torch.testing.assert_close(ours[name], gradient, rtol=0, atol=1e-14)


# What is drawn ------------------------------------------------------------------------------------


def test_draws_are_those_of_the_key_of_each_task():
    module, data = make_module(flips=False, crop=(10, 20), dtype=torch.float32), make_data()
    batch = next(iter(data.train_dataloader()))
    tasks, options = module.draw(batch), ViewOptions((10, 20), flips=False)
    assert tasks.views.shape == (3, 2, 4, 3, 32, 32)
    assert torch.equal(tasks.labels, batch.labels)
    for number, task in enumerate(unstack(tasks)):
        images = batch.images[number]
        draws = generator(*batch.keys[number].tolist())
        views = ssl_views(torch.cat([images, images]), draws, options)
        together = torch.cat([views, supervised_views(images, draws)])
        shifted = shift_together(together, draws, options)
        assert torch.equal(task.views.flatten(0, 1), shifted[:8])
        assert torch.equal(task.images, shifted[8:])
    assert len({tuple(key) for key in batch.keys.tolist()}) == 3
    assert torch.equal(module.draw(batch).views, tasks.views)
    alone = module.draw([part[1:2] for part in batch])  # whatever the other tasks
    assert torch.equal(alone.views[0], tasks.views[1])


def test_t17_the_views_of_a_task_are_of_its_images():
    """One image is black: all of its views show the brightness of its task alone."""
    images = torch.rand(2, 3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) / 2 + 0.5
    images[:, 1] = 0
    module = make_module(dtype=torch.float32)
    tasks = module.draw((images, torch.zeros(2, 3, dtype=torch.long), torch.arange(6).view(2, 3)))
    dark = [each.mean(dim=(-3, -2, -1)) for each in (tasks.views, tasks.images)]
    assert dark[0][:, :, 1].max() < dark[0][:, :, [0, 2]].min()
    assert dark[1][:, 1].max() < dark[1][:, [0, 2]].min()
    assert tasks.views.min() >= 0
    assert tasks.views.max() <= 1


def test_repeat_classifies_one_of_many_copies():
    module = make_module(task_mode="repeat", copies=5, dtype=torch.float32)
    data = make_data(images_per_task=1)
    batch = next(iter(data.train_dataloader()))
    tasks = module.draw(batch)
    assert tasks.views.shape == (3, 2, 5, 3, 32, 32)
    assert tasks.images.shape == (3, 1, 3, 32, 32)
    assert tasks.labels.shape == (3, 1)
    for number, task in enumerate(unstack(tasks)):
        draws, (image,) = generator(*batch.keys[number].tolist()), batch.images[number]
        views = ssl_views(image.expand(10, -1, -1, -1), draws, ViewOptions())
        together = torch.cat([views, supervised_views(image[None], draws)])
        shifted = shift_together(together, draws, ViewOptions())
        assert torch.equal(task.views.flatten(0, 1), shifted[:10])
        assert torch.equal(task.images, shifted[10:])
        assert len({view.numpy().tobytes() for view in shifted[:10]}) == 10


@pytest.mark.parametrize("backend", ["loop", "vmap"])
def test_repeat_trains(backend):
    network = make_network()
    by_hand = ByHand(network)
    module = make_module(network, task_mode="repeat", copies=4, backend=backend)
    _, trace = fit(module, make_data(10, images_per_task=1))
    for batch, weights in zip(trace.batches, trace.weights[1:], strict=True):
        by_hand.step(unstack(module.draw(batch)))
        assert_equal_weights(weights, by_hand.network.state_dict())


# What is logged -----------------------------------------------------------------------------------


def test_training_logs_the_losses_before_and_after_the_steps():
    network = make_network()
    by_hand = ByHand(network)
    module = make_module(network)
    _, trace = fit(module)
    for batch, logged in zip(trace.batches, trace.logged, strict=True):
        tasks = unstack(module.draw(batch))
        expected = {f"train/{n}": v for n, v in by_hand.figures(tasks).items()}
        assert logged == pytest.approx(expected, abs=1e-6)
        assert expected["train/ssl_before"] != pytest.approx(expected["train/ssl_after"], abs=1e-4)
        by_hand.step(tasks)


def test_only_every_so_many_meta_steps_are_logged():
    _, trace = fit(make_module(), log_every_n_steps=2)
    assert trace.logged[0] == {}
    assert trace.logged[1].keys() == trace.logged[2].keys()
    assert trace.logged[1]["train/loss_after"] == trace.logged[2]["train/loss_after"]


@pytest.mark.parametrize("backend", ["loop", "vmap"])
def test_validation_logs_the_losses_of_held_out_tasks(backend):
    module = make_module(backend=backend, steps=2)
    trainer, trace = fit(module, val=True)
    by_hand = ByHand(module.network, steps=2)
    assert len(trace.val) == 2
    each = [by_hand.figures(unstack(module.draw(batch))) for batch in trace.val]
    expected = {f"val/{n}": (each[0][n] + each[1][n]) / 2 for n in each[0]}
    ours = {n: v.item() for n, v in trainer.callback_metrics.items() if n.startswith("val/")}
    assert ours == pytest.approx(expected, abs=1e-6)
    train = {tuple(key) for batch in trace.batches for key in batch.keys.tolist()}
    assert not train & {tuple(key) for batch in trace.val for key in batch.keys.tolist()}


def test_validation_changes_nothing():
    (_, without), (_, validated) = fit(make_module()), fit(make_module(), val=True)
    last = without.weights[-1]
    assert all(torch.equal(last[n], t) for n, t in validated.weights[-1].items())


# Modes and precisions -----------------------------------------------------------------------------


def test_dropout_stays_off():
    (_, plain), (_, dropped) = (
        fit(make_module(), val=True),
        fit(make_module(make_network(dropout=0.5)).train(), val=True, epochs=1),
    )
    assert not any(dropped.modes)
    for one, other in zip(plain.weights, dropped.weights, strict=True):
        assert all(torch.equal(one[n], t) for n, t in other.items())


@pytest.mark.parametrize("backend", ["loop", "vmap"])
def test_bfloat16_trains_close_to_float32(backend):
    (_, wide), (_, mixed) = (
        fit(make_module(dtype=torch.float32, backend=backend), precision=precision, val=True)
        for precision in ("32-true", "bf16-mixed")
    )
    start = wide.weights[0]
    steps = [
        torch.cat([(trace.weights[-1][n] - start[n]).flatten() for n in start])
        for trace in (wide, mixed)
    ]
    assert all(t.dtype == torch.float32 for t in mixed.weights[-1].values())
    assert steps[1].isfinite().all()
    assert F.cosine_similarity(*steps, dim=0) > 0.9
    assert not torch.equal(*steps)


def test_the_views_are_not_rounded_under_autocast():
    module, batch = make_module(dtype=torch.float32), next(iter(make_data().train_dataloader()))
    with torch.autocast("cpu", torch.bfloat16):
        tasks = module.draw(batch)
    assert all(torch.equal(*parts) for parts in zip(tasks, module.draw(batch), strict=True))


def test_float16_is_refused():
    module = make_module(dtype=torch.float32)

    class Half:
        precision = "16-mixed"

    module._trainer = Half()
    with pytest.raises(InputError, match=r"does not support precision '16-mixed'.*bf16-mixed"):
        module.setup("fit")


# Attention ----------------------------------------------------------------------------------------


def make_vit():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=8,
        embed_dim=16,
        depth=1,
        num_heads=2,
        num_classes=10,
    )


ATTENTIVE = {"timm": make_vit, "torch": AttentionNet}


@pytest.mark.parametrize("backend", ["loop", "vmap"])
@pytest.mark.parametrize("backbone", ATTENTIVE.values(), ids=ATTENTIVE)
def test_attention_trains_to_second_order_and_is_told_of_once(backbone, backend):
    module = make_module(heads_on(backbone()), dtype=torch.float32, backend=backend)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, trace = fit(module, precision="32-true", epochs=2)
    told = [str(w.message) for w in caught if "attention" in str(w.message)]
    assert len(told) == 1
    assert "second derivative" in told[0]
    assert len(trace.batches) == 6
    first, last = trace.weights[0], trace.weights[-1]
    assert all(t.isfinite().all() for t in last.values())
    assert all(not torch.equal(first[n], t) for n, t in last.items() if n.endswith("weight"))


@pytest.mark.parametrize("backend", ["loop", "vmap"])
@pytest.mark.parametrize("backbone", ATTENTIVE.values(), ids=ATTENTIVE)
def test_attention_to_first_order_is_not_told_of(backbone, backend):
    module = make_module(
        heads_on(backbone()), dtype=torch.float32, first_order=True, backend=backend
    )
    fit(module, precision="32-true")  # a warning would be an error


@pytest.mark.parametrize("first_order", [False, True])
def test_attention_and_layer_norm_give_the_same_gradient_in_both_backends(first_order):
    """Where autograd differentiates vmap, torch's second derivatives of a layer norm are wrong."""
    batch, found = next(iter(make_data().train_dataloader())), []
    for backend in ("loop", "vmap"):
        torch.manual_seed(0)
        module = make_module(heads_on(AttentionNet()), backend=backend, first_order=first_order)
        tasks = module.draw((batch.images.double(), *batch[1:]))
        with sdpa_kernel(SDPBackend.MATH):
            found.append(module.meta_gradients(tasks)[0])
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=0, atol=1e-13, msg=name)


def test_networks_without_attention_hear_nothing_of_it():
    fit(make_module())  # a warning would be an error


# The first steps --------------------------------------------------------------------------------


def test_the_inner_learning_rate_rises_from_zero():
    """With inner_warmup = 0.5 of 12 meta-steps: a seventh of inner_lr, two sevenths, ..., all."""
    seen = []

    class Watched(MT3):
        def _rising(self):
            loop = super()._rising()
            seen.append(loop.lr)
            return loop

    module = Watched(make_network().double(), inner_lr=0.7, inner_warmup=0.5, flips=False)
    fit(module, epochs=4)
    by_step = seen[::3]  # three tasks each
    assert len(by_step) == 12
    expected = [0.1 * min(step + 1, 7) for step in range(12)]
    assert by_step == pytest.approx(expected)


# Trouble ------------------------------------------------------------------------------------------


class Poisoned(LightningDataModule):
    """Three meta-steps; the images of some are not finite."""

    def __init__(self, poisoned=(1,)):
        super().__init__()
        self.batches = list(make_data().train_dataloader())
        for number in poisoned:
            self.batches[number].images[1, 2, 0, 5:20, 5:20] = torch.nan

    def train_dataloader(self):
        return DataLoader(self.batches, batch_size=None)

    def val_dataloader(self):
        return []


@pytest.mark.parametrize("backend", ["loop", "vmap"])
def test_a_meta_step_that_is_not_finite_is_left_out(backend):
    module = make_module(backend=backend)
    with pytest.warns(UserWarning, match="not finite; nothing was learnt") as caught:
        _, trace = fit(module, Poisoned())
    assert len([w for w in caught if "not finite" in str(w.message)]) == 1
    start, one, two, three = trace.weights
    assert all(torch.equal(one[n], t) for n, t in two.items())
    assert not all(torch.equal(start[n], t) for n, t in one.items())
    assert not all(torch.equal(two[n], t) for n, t in three.items())
    assert all(t.isfinite().all() for t in three.values())


def test_a_training_that_learns_nothing_gives_up():
    """It would go on for ever: no step, no end of max_steps."""
    module = make_module(inner_lr=1e200, inner_clip=None)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*nothing was learnt")
        with pytest.raises(InputError, match=r"20 meta-steps.*1e\+200"):
            fit(module, epochs=-1, max_steps=5)


def test_a_training_that_recovers_goes_on(monkeypatch):
    """Only meta-steps in a row count."""
    monkeypatch.setattr("tta_lightning.meta.mt3.PATIENCE", 2)
    with pytest.warns(UserWarning, match="nothing was learnt"):
        fit(make_module(), Poisoned((0, 2)), epochs=1)


@pytest.mark.parametrize("backend", ["loop", "vmap"])
def test_what_is_frozen_is_not_trained_but_moves_in_the_steps(backend):
    network = make_network().double()
    frozen = network.projector[0].weight.requires_grad_(False)
    module = make_module(network, backend=backend)
    tasks = unstack(module.draw(as_double(next(iter(make_data().train_dataloader())))))
    theta = {n: p.detach().requires_grad_() for n, p in module.embedder.named_parameters()}
    total = sum(task_loss(module.embedder, theta, t, InnerLoop(), 0.1).total for t in tasks)
    expected = dict(zip(theta, torch.autograd.grad(total / 3, theta.values()), strict=True))
    found, _ = module.meta_gradients(
        Task(*(torch.stack(parts) for parts in zip(*tasks, strict=True)))
    )
    assert set(expected) - set(found) == {"network.projector.0.weight"}
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-12, msg=name)
    before = frozen.clone()
    fit(module)
    assert torch.equal(frozen, before)


def test_a_network_that_is_all_frozen_is_refused():
    with pytest.raises(InputError, match="nothing to train"):
        fit(make_module(make_network().double().requires_grad_(False)))


def test_another_number_of_classes_is_refused():
    backbone = SmallConvNet(norm="group", num_classes=3)
    with pytest.raises(InputError, match=r"gives 3 logits.*10 classes.*num_classes"):
        fit(make_module(heads_on(backbone)))


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_half_precision_parameters_are_refused(precision):
    with pytest.raises(InputError, match=r"not support precision.*32-true, 64-true"):
        fit(make_module(dtype=torch.float32), precision=precision)


def test_nothing_runs_without_a_graph_before_the_gradients(monkeypatch):
    """Autocast of torch 2.6 would go on with what it cast there: a logged step learnt nothing."""
    order, before, gradients = [], MT3._before, MT3.meta_gradients

    def noted(name, function):
        return lambda *given: order.append(name) or function(*given)

    monkeypatch.setattr(MT3, "_before", noted("before", before))
    monkeypatch.setattr(MT3, "meta_gradients", noted("gradients", gradients))
    fit(make_module(), log_every_n_steps=1)
    assert order == ["gradients", "before"] * 3


def test_logging_may_be_off():
    fit(make_module(), log_every_n_steps=0)


def as_double(batch):
    return (batch.images.double(), *batch[1:])


def test_other_batches_are_refused():
    data = LabelledImages(make_source(40), batch_size=4, image_size="keep")
    with pytest.raises(InputError, match="LabelledTasks"):
        fit(make_module(), data)


def test_repeat_refuses_tasks_of_several_images():
    with pytest.raises(InputError, match=r"these have 4\. Set images_per_task"):
        fit(make_module(task_mode="repeat"))


def test_images_smaller_than_the_crop_are_refused():
    with pytest.raises(InputError, match="crops of 40 to 50 px, but the images have 32 x 32"):
        fit(make_module(crop=(40, 50)))


def test_the_cosine_needs_an_end():
    with pytest.raises(InputError, match="max_epochs or max_steps"):
        fit(make_module(schedule="cosine"), epochs=-1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0}, "lr = 0 is out of range: expected a number above 0"),
        ({"lr": math.nan}, "lr = nan is out of range"),
        ({"clip": -1.0}, "clip = -1.0 is out of range: expected a number above 0"),
        ({"clip": math.inf}, "clip = inf is out of range"),
        ({"inner_clip": 0.0}, "inner_clip = 0.0 is out of range: expected a number above 0"),
        ({"copies": 0}, "copies = 0 is out of range: expected a number above 0"),
        ({"ssl_weight": -0.1}, "ssl_weight = -0.1 is out of range: expected 0 or more"),
        ({"steps": 1.5}, "steps = 1.5 is out of range: expected a whole number"),
        ({"warmup": 1.0}, "warmup = 1.0 is out of range: expected 0 <= warmup < 1"),
        ({"inner_warmup": -0.1}, "inner_warmup = -0.1 is out of range"),
        ({"crop": (31, 20)}, r"crop = \(31, 20\) is out of range"),
        ({"steps": -1}, "steps = -1 is out of range: expected 0 or more"),
        ({"inner_lr": -0.1}, "inner_lr = -0.1 is out of range: expected 0 or more"),
        ({"momentum": 1.0}, "momentum = 1.0 is out of range: expected 0 <= momentum < 1"),
        ({"momentum": -0.5}, "momentum = -0.5 is out of range"),
        ({"optimizer": "sdg"}, "Unknown optimizer 'sdg'. Did you mean 'sgd'"),
        ({"schedule": "linear"}, "Unknown schedule 'linear'.*constant, cosine"),
        ({"target": "Self"}, "Unknown target 'Self'. Did you mean 'self'"),
        ({"task_mode": "shared"}, "Unknown task_mode 'shared'.*repeat, shared_shift"),
        ({"backend": "map"}, "Unknown backend 'map'. Did you mean 'vmap'"),
    ],
)
def test_arguments_that_are_not_possible(options, message):
    with pytest.raises(InputError, match=message):
        make_module(**options)


def test_networks_that_do_not_suit():
    with pytest.raises(InputError, match="GroupNet has no BYOL heads"):
        MT3(GroupNet())
    with pytest.raises(InputError, match=r"batch normalisation layers.*batch_norm: group"):
        MT3({"spec": "tta_lightning.models.BYOLHeads", "backbone": SmallConvNet(width=4)})


# The checkpoint -----------------------------------------------------------------------------------

SPEC = {
    "spec": "tta_lightning.models.BYOLHeads",
    "backbone": {"spec": "tta_lightning.models.ResNet26GN", "width": 4, "groups": 2},
    "hidden": 8,
    "projection": 4,
}


def test_the_checkpoint_is_a_model(tmp_path):
    module = MT3(SPEC, lr=LR)
    trainer = make_trainer(limit_train_batches=1, limit_val_batches=0)
    trainer.fit(module, datamodule=make_data(30, tasks=2, images_per_task=2))
    path = tmp_path / "mt3.ckpt"
    trainer.save_checkpoint(path)
    network = load_model(str(path))
    assert network.info.class_names == CLASSES
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(network(images), module(images))
    again, before = Embedder(network)(images), module.embedder(images)
    assert all(torch.equal(one, other) for one, other in zip(again, before, strict=True))
    record = torch.load(path, weights_only=True)["tta_lightning"]
    assert record["kind"] == "mt3"


def test_the_test_images_are_classified_without_a_step():
    module = make_module(dtype=torch.float32)
    data = make_data(test=make_source(20, seed=3))
    (figures,) = make_trainer().test(module, datamodule=data, verbose=False)
    source = make_source(20, seed=3)
    images = torch.stack([torch.from_numpy(source.load(i)) for i in range(20)])
    logits = module(images.permute(0, 3, 1, 2) / 255)
    labels = torch.from_numpy(np.asarray(source.labels))
    assert figures["test/loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), abs=1e-5)
    accuracy = (logits.argmax(1) == labels).double().mean().item()
    assert figures["test/accuracy"] == pytest.approx(accuracy, abs=1e-6)
