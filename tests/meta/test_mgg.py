"""Pre-training of MGG against the published recipe, written out here once more from its equations.

The reference differentiates the loss of the next batch end to end, with autograd inside the memory
too; the module under test does neither.
"""

import math
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector
from torch.utils.data import DataLoader, TensorDataset

from tests.meta.ddp_worker import Trace
from tests.networks import make_batches, make_network
from tests.streams import make_source
from tta_lightning.adapter import Adapter
from tta_lightning.data import ShiftedImages
from tta_lightning.errors import InputError
from tta_lightning.meta import MGGPretraining
from tta_lightning.meta.window import Window
from tta_lightning.methods import MGTTA, Tent
from tta_lightning.models import weights_hash
from tta_lightning.rules import MGG, SGD
from tta_lightning.trainer import Trainer

INNER_LR, LR = 0.05, 0.01
UNLABELLED = torch.full((4,), -1)


class Batches(LightningDataModule):
    """Batches as they are given, in the same order every epoch."""

    def __init__(self, train, val):
        super().__init__()
        self.train, self.val = train, val

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=None)

    def val_dataloader(self):
        return DataLoader(self.val, batch_size=None)


def labelled(sizes, seed=1, dtype=torch.float64):
    """One segment for each entry of `sizes`, with so many batches of 4 images."""
    images = iter(make_batches(sum(sizes), size=4, seed=seed))
    generator = torch.Generator().manual_seed(seed)
    return [
        (next(images).to(dtype), torch.randint(10, (4,), generator=generator), segment)
        for segment, size in enumerate(sizes)
        for _ in range(size)
    ]


def make_module(norm="ln", rule=None, **options):
    """Tent in float64 with a random MGG that moves every coordinate."""
    torch.manual_seed(3)
    rule = MGG(lr=0.02, mask_zero_gradients=False) if rule is None else rule
    method = Tent(make_network(norm), rule).double()
    return MGGPretraining(method, **{"lr": LR, "inner_lr": INNER_LR, **options})


def make_trainer(*callbacks, epochs=1, **options):
    given = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
    }
    return Trainer(run_dir=False, callbacks=[*callbacks], max_epochs=epochs, **{**given, **options})


class Gradients(Callback):
    """Keeps the gradient that the optimizer of the rule saw last, after every batch."""

    def __init__(self):
        self.batches = []

    def on_train_batch_end(self, trainer, module, *args):
        named = module.rule.memory.named_parameters()
        self.batches.append({n: None if p.grad is None else p.grad.clone() for n, p in named})


def fit(module, batches, *callbacks, val=None, **options):
    """Pre-train; return the trainer and what moved."""
    trace = Trace()
    limit = 0 if val is None else 1.0
    trainer = make_trainer(trace, *callbacks, limit_val_batches=limit, **options)
    trainer.fit(module, datamodule=Batches(batches, val))
    return trainer, trace


# The reference ------------------------------------------------------------------------------------


class Problem:
    """The loss as a function of one vector that holds all parameters of normalisation layers."""

    def __init__(self, norm="ln"):
        self.network = make_network(norm).double().requires_grad_(False)
        layers = [n for n, m in self.network.named_modules() if isinstance(m, nn.LayerNorm)]
        layers += [n for n, m in self.network.named_modules() if isinstance(m, nn.GroupNorm)]
        self.named = {
            name: p
            for name, p in self.network.named_parameters()
            if name.rpartition(".")[0] in layers
        }
        self.start = parameters_to_vector(self.named.values())

    def pieces(self, theta: Tensor) -> dict[str, Tensor]:
        parts = theta.split([p.numel() for p in self.named.values()])
        return {n: part.view_as(p) for part, (n, p) in zip(parts, self.named.items(), strict=True)}

    def logits(self, theta: Tensor, images: Tensor) -> Tensor:
        return functional_call(self.network, self.pieces(theta), (images,))

    def loss(self, theta: Tensor, images: Tensor) -> Tensor:
        probabilities = self.logits(theta, images).softmax(1)
        return -(probabilities * probabilities.log()).sum(1).mean()


@dataclass
class State:
    """Moments, step and memory of every coordinate; no memory stands for the learned first one."""

    m: Tensor | float = 0.0
    v: Tensor | float = 0.0
    step: int = 0
    memory: tuple[Tensor, Tensor] | None = None

    def cut(self) -> "State":
        memory = self.memory and tuple(t.detach().requires_grad_() for t in self.memory)
        return State(self.m, self.v, self.step, memory)


def layer_norm(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = z - z.mean(1, keepdim=True)
    return centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt() * weight + bias


def generate(phi: dict[str, Tensor], g: Tensor, state: State) -> tuple[Tensor, State]:
    """Equations 2.1 and 2.2 with the published constants: gradient ``[N]`` to u ``[N]``."""
    step = state.step + 1
    m, v = 0.9 * state.m + 0.1 * g, 0.99 * state.v + 0.01 * g**2
    size = (v / (1 - 0.99 ** (step + 1))).sqrt() + 1e-8
    x = torch.stack((m / (1 - 0.9 ** (step + 1)) / size, g / size), dim=1)
    first = (phi["W1"].expand(len(g), 8, 8), phi["b1"][0].expand(len(g), 8))
    w, b = first if state.memory is None else state.memory
    q, k, value = (x @ phi[f"{name}_proj.weight"].T for name in "qkv")
    gamma, beta = phi["ttt_norm_weight"], phi["ttt_norm_bias"]
    gate = x @ phi["learnable_ttt_lr_weight"][0].T + phi["learnable_ttt_lr_bias"]
    eta = (1 + phi["learnable_token_idx"]).clamp(min=0) * gate.sigmoid() / 8
    written = layer_norm((k[:, None] @ w)[:, 0] + b, gamma, beta)
    error = 0.5 * (written - (value - k)).square().sum()
    d_w, d_b = torch.autograd.grad(error, (w, b), create_graph=True)
    w, b = w - eta[:, :, None] * d_w, b - eta * d_b
    read = q + layer_norm((q[:, None] @ w)[:, 0] + b, gamma, beta)
    out = layer_norm(read, phi["post_norm.weight"], phi["post_norm.bias"])
    return torch.tanh(out @ phi["o_proj.weight"].T)[:, 0], State(m, v, step, (w, b))


def leaves(rule: MGG) -> dict[str, Tensor]:
    return {n: p.detach().clone().requires_grad_() for n, p in rule.memory.named_parameters()}


@dataclass
class Scored:
    """Everything that the loss after one update depends on, besides the rule."""

    theta: Tensor
    g: Tensor
    state: State
    images: Tensor

    def loss(self, problem: Problem, phi: dict[str, Tensor]) -> Tensor:
        u, _ = generate(phi, self.g, self.state)
        return problem.loss(self.theta - INNER_LR * u, self.images)


@dataclass
class Reference:
    """What the recipe gives: rule and network after every batch, and every update's circumstances.

    The rule is listed only where it changed.
    """

    phi: list[Tensor] = field(default_factory=list)
    theta: list[Tensor] = field(default_factory=list)
    scored: list[Scored] = field(default_factory=list)
    leaves: dict[str, Tensor] = field(default_factory=dict)


def recipe(problem, rule, batches, *, epochs=1, unroll=1, reset=False) -> Reference:
    """Let theta depend on phi over `unroll` updates, then take a step on the sum of the losses."""
    phi = leaves(rule)
    optimizer = torch.optim.Adam(phi.values(), lr=LR)
    found = Reference(phi=[parameters_to_vector(phi.values()).detach()], leaves=phi)
    theta = problem.start
    numbers = [segment for _, _, segment in batches]
    for _ in range(epochs):
        for number in dict.fromkeys(numbers):
            stretch = [images for images, _, segment in batches if segment == number]
            theta = problem.start if reset else theta
            state, g, losses = State(), None, []
            for position, images in enumerate(stretch):
                if g is not None:
                    found.scored.append(Scored(theta.detach(), g, state.cut(), images))
                    u, state = generate(phi, g, state)
                    theta = theta - INNER_LR * u
                found.theta.append(theta.detach())
                at = theta if theta.requires_grad else theta.detach().requires_grad_()
                loss = problem.loss(at, images)
                finite = bool(loss.isfinite())
                g = torch.autograd.grad(loss, at, retain_graph=True)[0] if finite else None
                if finite and theta.requires_grad:
                    losses.append(loss)
                if losses and (len(losses) == unroll or position + 1 == len(stretch)):
                    optimizer.zero_grad()
                    sum(losses).backward()
                    optimizer.step()
                    found.phi.append(parameters_to_vector(phi.values()).detach())
                    theta, state, losses = theta.detach(), state.cut(), []
    return found


def distinct(first: Tensor, trace: list[Tensor]) -> list[Tensor]:
    """Leave out what equals its predecessor."""
    kept = [first]
    for phi in trace:
        if not torch.equal(phi, kept[-1]):
            kept.append(phi)
    return kept


def assert_follows(trace, reference, tolerance=1e-10):
    ours = distinct(reference.phi[0], trace.rule)
    assert len(ours) == len(reference.phi) >= 3
    torch.testing.assert_close(
        torch.stack(ours), torch.stack(reference.phi), rtol=0, atol=tolerance
    )
    torch.testing.assert_close(
        torch.stack(trace.network), torch.stack(reference.theta), rtol=0, atol=tolerance
    )


# The recipe ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["ln", "gn"])
@pytest.mark.parametrize("sizes", [(8,), (4, 1, 5)], ids=["one segment", "three segments"])
@pytest.mark.parametrize("reset", [False, True])
def test_an_epoch_equals_the_published_recipe(norm, sizes, reset):
    module, batches = make_module(norm, reset_network=reset), labelled(sizes)
    reference = recipe(Problem(norm), module.rule, batches, epochs=2, reset=reset)
    _, trace = fit(module, batches, epochs=2)
    assert len(trace.rule) == 2 * len(batches)
    assert len(reference.phi) == 1 + 2 * sum(size - 1 for size in sizes)
    assert_follows(trace, reference)


@pytest.mark.parametrize("unroll", [2, 3, 7])
@pytest.mark.parametrize("sizes", [(9,), (5, 6)], ids=["one segment", "two segments"])
def test_unrolled_updates_keep_their_graph_over_the_window(unroll, sizes):
    module, batches = make_module("gn", unroll=unroll), labelled(sizes)
    reference = recipe(Problem("gn"), module.rule, batches, epochs=2, unroll=unroll)
    _, trace = fit(module, batches, epochs=2)
    steps = sum(math.ceil((size - 1) / unroll) for size in sizes)  # what is left is learnt from
    assert len(reference.phi) == 1 + 2 * steps
    assert_follows(trace, reference)


def test_windows_of_one_and_of_three_updates_differ():
    batches = labelled((8,))
    rules = [recipe(Problem(), make_module().rule, batches, unroll=k).phi[-1] for k in (1, 3)]
    assert (rules[0] - rules[1]).abs().max() > 1e-3


@pytest.fixture(scope="module")
def scored():
    """Gradients that reached the rule, and the circumstances of the updates that they judge."""
    module, batches, gradients = make_module(), labelled((5,)), Gradients()
    reference = recipe(Problem(), module.rule, batches)
    _, trace = fit(module, batches, gradients)
    return reference, gradients.batches, trace


def before(reference, number) -> dict[str, Tensor]:
    """The rule that made update `number`, counted from 0."""
    parts = reference.phi[number].split([p.numel() for p in reference.leaves.values()])
    pairs = zip(parts, reference.leaves.items(), strict=True)
    return {n: part.view_as(p).clone().requires_grad_() for part, (n, p) in pairs}


@pytest.mark.parametrize("number", range(4))
def test_the_gradient_of_the_rule_is_the_vjp_of_the_next_gradient(scored, number):
    reference, gradients, _ = scored
    problem, case, phi = Problem(), reference.scored[number], before(reference, number)
    u, _ = generate(phi, case.g, case.state)
    at = (case.theta - INNER_LR * u).detach().requires_grad_()
    (g,) = torch.autograd.grad(problem.loss(at, case.images), at)
    expected = torch.autograd.grad((-INNER_LR * g * u).sum(), list(phi.values()), allow_unused=True)
    for name, gradient in zip(phi, expected, strict=True):
        ours = gradients[number + 1][name]
        assert (ours is None) == (gradient is None)
        if gradient is not None:
            torch.testing.assert_close(ours, gradient, rtol=1e-9, atol=1e-14, msg=name)


@pytest.mark.parametrize("number", [0, 2])
def test_the_gradient_of_the_rule_equals_finite_differences(scored, number):
    reference, gradients, _ = scored
    problem, case, phi = Problem(), reference.scored[number], before(reference, number)
    for name, tensor in phi.items():
        differences, flat = [], tensor.data.view(-1)
        for index in range(len(flat)):
            value, losses = flat[index].item(), []
            for shift in (1e-4, -1e-4):
                flat[index] = value + shift
                losses.append(case.loss(problem, phi).item())
            flat[index] = value
            differences.append((losses[0] - losses[1]) / 2e-4)
        ours = gradients[number + 1][name]
        expected = torch.tensor(differences, dtype=torch.float64)
        ours = torch.zeros_like(expected) if ours is None else ours.flatten()
        largest = max(g.abs().max() for g in gradients[number + 1].values() if g is not None)
        if number == 0 or name not in ("W1", "b1"):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6 * largest, msg=name)


def test_one_product_equals_a_backward_call_for_each_tensor(scored):
    reference, gradients, _ = scored
    problem, case, phi = Problem(), reference.scored[1], before(reference, 1)
    u, _ = generate(phi, case.g, case.state)
    moved = {
        n: t.detach().requires_grad_() for n, t in problem.pieces(case.theta - INNER_LR * u).items()
    }
    problem.loss(parameters_to_vector(moved.values()), case.images).backward()
    for piece, parameter in zip(problem.pieces(u).values(), moved.values(), strict=True):
        piece.backward(-INNER_LR * parameter.grad, retain_graph=True)
    for name, tensor in phi.items():
        if tensor.grad is not None:
            torch.testing.assert_close(gradients[2][name], tensor.grad, rtol=1e-9, atol=1e-14)


def test_n_batches_give_n_minus_1_steps_an_epoch():
    module = make_module()
    before = parameters_to_vector(module.rule.parameters()).detach()
    trainer, trace = fit(module, labelled((6,)), epochs=3)
    assert trainer.optimizers[0].state[module.rule.memory.q_proj.weight]["step"] == 3 * 5
    states = [before, *trace.rule]
    same = [torch.equal(a, b) for a, b in pairwise(states)]
    assert same == ([True] + 5 * [False]) * 3


def test_the_first_memory_learns_at_the_second_batch_of_a_segment_alone():
    class Watch(Callback):
        def __init__(self):
            self.w, self.b, self.skipped = [], [], []

        def on_train_batch_end(self, trainer, module, *args):
            memory = module.rule.memory
            self.w.append(memory.W1.detach().clone())
            self.b.append(memory.b1.detach().clone())
            self.skipped.append((memory.W1.grad is None, memory.b1.grad is None))

    module, watch = make_module(), Watch()
    trainer, _ = fit(module, labelled((4, 3)), watch, epochs=2)
    for values in (watch.w, watch.b):
        moved = [not torch.equal(a, b) for a, b in pairwise(values)]
        #  batch  0   1      2      3      4      5     6
        assert [False, *moved] == 2 * [False, True, False, False, False, True, False]
    assert watch.skipped[2] == watch.skipped[3] == watch.skipped[6] == (True, True)
    state = trainer.optimizers[0].state
    memory = module.rule.memory
    assert state[memory.W1]["step"] == state[memory.b1]["step"] == 4
    assert state[memory.q_proj.weight]["step"] == 2 * (3 + 2)


def nodes(tensor: Tensor) -> int:
    seen, stack = set(), [tensor.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack += [following for following, _ in node.next_functions]
    return len(seen)


@pytest.mark.parametrize("unroll", [1, 3])
def test_the_graph_does_not_grow(unroll, monkeypatch):
    module, sizes = make_module(unroll=unroll), []
    backward = module.manual_backward

    def count(loss, *args, **kwargs):
        sizes.append(nodes(loss))
        backward(loss, *args, **kwargs)

    monkeypatch.setattr(module, "manual_backward", count)
    fit(module, labelled((1 + 10 * unroll,)))
    assert len(sizes) == 10
    assert sizes[0] > 20
    assert len(set(sizes[1:])) == 1


def test_the_network_drifts_over_epochs():
    _, trace = fit(make_module(), labelled((3, 3)), epochs=2)
    thetas = [Problem().start, *trace.network]
    for first in (0, 3, 6, 9):  # the first batch of a segment moves nothing
        assert torch.equal(thetas[first + 1], thetas[first])
        assert not torch.equal(thetas[first + 2], thetas[first])
    assert (thetas[10] - thetas[0]).abs().max() > 2 * INNER_LR * 0.5


def test_the_network_returns_at_every_segment_where_asked():
    _, trace = fit(make_module(reset_network=True), labelled((3, 3)), epochs=2)
    for first in (0, 3, 6, 9):
        assert torch.equal(trace.network[first], Problem().start)
        assert not torch.equal(trace.network[first + 2], Problem().start)


class AtTheEnd(Callback):
    """Keeps the network as the training leaves it."""

    def on_train_end(self, trainer, module):
        self.network = {n: p.detach().clone() for n, p in module.network.named_parameters()}


def test_nothing_else_of_the_network_moves():
    module, end = make_module("gn"), AtTheEnd()
    before = {n: p.clone() for n, p in module.network.named_parameters()}
    fit(module, labelled((4,)), end, val=labelled((3,), seed=5))
    moved = {name for name, p in end.network.items() if not torch.equal(p, before[name])}
    assert moved == {"1.weight", "1.bias", "4.weight", "4.bias"}


def test_the_source_network_is_left_behind():
    module, end = make_module("gn"), AtTheEnd()
    before = {n: p.clone() for n, p in module.network.named_parameters()}
    fit(module, labelled((4,)), end)
    assert not torch.equal(end.network["1.bias"], before["1.bias"])
    assert all(torch.equal(p, before[n]) for n, p in module.network.named_parameters())


def test_without_an_inner_learning_rate_the_rules_own_is_used():
    batches = labelled((4,))
    _, own = fit(make_module(inner_lr=None), batches)
    _, given = fit(make_module(inner_lr=0.02), batches)
    assert all(torch.equal(a, b) for a, b in zip(own.network, given.network, strict=True))
    assert not torch.equal(own.network[-1], Problem().start)


@pytest.mark.parametrize("clip", [1e-3, 1e6])
def test_gradients_are_clipped_by_their_norm(clip, scored):
    _, unclipped, _ = scored
    gradients = Gradients()
    fit(make_module(clip=clip), labelled((5,)), gradients)
    given = torch.cat([g.flatten() for g in unclipped[1].values()])
    ours = torch.cat([g.flatten() for g in gradients.batches[1].values()])
    expected = given * min(1.0, clip / (given.norm() + 1e-6))
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=0)
    assert (given.norm() > clip) == (clip == 1e-3)


def test_the_cosine_falls_to_zero():
    class Rates(Callback):
        def __init__(self):
            self.rates = []

        def on_train_epoch_start(self, trainer, module):
            self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    rates = Rates()
    trainer, _ = fit(make_module(schedule="cosine"), labelled((2,)), rates, epochs=4)
    by_hand = [LR * (1 + math.cos(math.pi * epoch / 4)) / 2 for epoch in range(4)]
    assert rates.rates == pytest.approx(by_hand, abs=1e-12)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)


def test_the_extended_form_learns_all_of_its_weights():
    module = make_module("gn", MGG(form="extended", lr=0.01), unroll=3)
    before = {n: p.detach().clone() for n, p in module.rule.named_parameters()}
    fit(module, labelled((8,)))
    still = {n for n, p in module.rule.named_parameters() if torch.equal(p, before[n])}
    assert not still
    assert {"skip", "log_scale"} <= before.keys()


# A quadratic with noise ---------------------------------------------------------------------------


class Offset(nn.Module):
    """Images minus a vector that is to become their mean."""

    def __init__(self):
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(48))

    def forward(self, images):
        return self.offset - images.flatten(1)


class Quadratic(Adapter):
    """``1/2 ||offset - mean of the batch||^2``: its gradient is right on average."""

    def configure(self):
        self.network.requires_grad_(True)

    def loss(self, out, images):
        return 0.5 * out.logits.mean(0).square().sum()


def noisy(segments, length, seed):
    """Each segment has a mean of its own; the noise of a batch is twice as large."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randn(segments, 48, generator=generator)
    return targets, [
        ((targets[s] + 2 * torch.randn(4, 48, generator=generator)).view(4, 3, 4, 4), UNLABELLED, s)
        for s in range(segments)
        for _ in range(length)
    ]


def distance(rule):
    """Mean squared distance from the means of new segments, after 25 steps on each."""
    targets, batches = noisy(4, 25, seed=9)
    adapter, left = Quadratic(Offset(), rule), []
    for number, (images, _, segment) in enumerate(batches):
        if number % 25 == 0:
            adapter.reset()
        adapter.adapt_step(images)
        if number % 25 == 24:
            left.append((adapter.network.offset.detach() - targets[segment]).square().mean().item())
    return sum(left) / len(left)


def test_a_trained_rule_beats_an_untrained_one_on_a_noisy_quadratic():
    torch.manual_seed(0)
    rule = MGG(lr=0.05)
    untrained = distance(rule)
    module = MGGPretraining(Quadratic(Offset(), rule), inner_lr=0.05, reset_network=True)
    fit(module, noisy(4, 25, seed=1)[1], epochs=3)
    trained = distance(rule)
    at_rest = distance(MGG(lr=0.0))
    assert trained < 0.5 * at_rest
    assert trained < 0.5 * untrained


# Validation ---------------------------------------------------------------------------------------


def held_out():
    """Two segments; the batches differ in size."""
    batches = labelled((3, 2), seed=8)
    return [(x[: 4 - i % 2], y[: 4 - i % 2], s) for i, (x, y, s) in enumerate(batches)]


def by_hand(phi, lr, batches):
    """Mean loss and accuracy before each update, from the source network in every segment."""
    problem = Problem()
    losses, right, count, current = 0.0, 0, 0, None
    for images, labels, segment in batches:
        if segment != current:
            theta, state, current = problem.start.clone().requires_grad_(), State(), segment
        loss = problem.loss(theta, images)
        losses += loss.item() * len(images)
        right += (problem.logits(theta, images).argmax(1) == labels).sum().item()
        count += len(images)
        (g,) = torch.autograd.grad(loss, theta)
        u, state = generate(phi, g, state)
        theta, state = (theta - lr * u).detach().requires_grad_(), state.cut()
    return losses / count, right / count


def test_validation_equals_a_loop_by_hand():
    module, val = make_module(), held_out()
    trainer, trace = fit(module, labelled((5,)), val=val)
    metrics = trainer.callback_metrics
    loss, accuracy = by_hand(leaves(module.rule), 0.02, val)
    assert metrics["val/loss"].item() == pytest.approx(loss, abs=1e-7)
    assert metrics["val/accuracy"].item() == pytest.approx(accuracy, abs=1e-6)
    assert metrics["val/selection"] == metrics["val/loss"]
    others = [
        by_hand(leaves(module.rule), INNER_LR, val),  # the learning rate of the training
        by_hand(leaves(make_module().rule), 0.02, val),  # the rule before it
        by_hand(leaves(module.rule), 0.02, [(x, y, 0) for x, y, _ in val]),  # no segments
    ]
    assert all(abs(other - loss) > 1e-5 for other, _ in others)
    assert not torch.equal(trace.network[-1], Problem().start)


def test_validation_without_training():
    module, val = make_module(), held_out()
    loss, accuracy = by_hand(leaves(module.rule), 0.02, val)
    (figures,) = make_trainer().validate(module, datamodule=Batches([], val), verbose=False)
    assert figures["val/loss"] == pytest.approx(loss, abs=1e-7)
    assert figures["val/accuracy"] == pytest.approx(accuracy, abs=1e-6)


def test_validation_without_training_looks_at_clean_images():
    module = mgtta()
    (figures,) = make_trainer().validate(module, datamodule=shifted(), verbose=False)
    assert module.method.source.known
    assert figures["val/loss"] > 0


@pytest.mark.parametrize("options", [{}, {"val_check_interval": 2}, {"num_sanity_val_steps": 2}])
@pytest.mark.parametrize("unroll", [1, 3])
def test_validation_leaves_the_training_as_it_was(options, unroll):
    batches = labelled((4, 4))
    _, without = fit(make_module("gn", unroll=unroll), batches, epochs=2)
    module, end = make_module("gn", unroll=unroll), AtTheEnd()
    _, given = fit(module, batches, end, val=held_out(), epochs=2, **options)
    for what in ("rule", "network"):
        pairs = zip(getattr(without, what), getattr(given, what), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    moved = [end.network[name] for name in module.method.adapted_parameters]
    assert torch.equal(parameters_to_vector(moved), given.network[-1])


def test_labels_do_not_matter():
    def shuffled(batches):
        return [(x, y.roll(1) + s, s) for x, y, s in batches]

    batches, val = labelled((4, 4)), held_out()
    first, one = fit(make_module(), batches, val=val, epochs=2)
    second, two = fit(make_module(), shuffled(batches), val=shuffled(val), epochs=2)
    assert all(torch.equal(a, b) for a, b in zip(one.rule, two.rule, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(one.network, two.network, strict=True))
    selections = [trainer.callback_metrics["val/selection"] for trainer in (first, second)]
    assert selections[0] == selections[1]


def test_accuracy_selects_where_asked_and_says_that_it_uses_labels():
    with pytest.warns(UserWarning, match="with the labels of the held-out images"):
        module = make_module(select_by="accuracy")
    val = held_out()
    trainer, _ = fit(module, labelled((4,)), val=val)
    _, accuracy = by_hand(leaves(module.rule), 0.02, val)
    assert 0 < accuracy < 1
    assert trainer.callback_metrics["val/selection"].item() == pytest.approx(-accuracy, abs=1e-6)


def test_accuracy_needs_labels():
    with pytest.warns(UserWarning, match="labels"):
        module = make_module(select_by="accuracy")
    val = [(x, torch.full_like(y, -1), s) for x, y, s in held_out()]
    with pytest.raises(InputError, match="select_by = accuracy needs labels"):
        fit(module, labelled((4,)), val=val)
    trainer, _ = fit(make_module(), labelled((4,)), val=val)
    assert "val/accuracy" not in trainer.callback_metrics
    assert "val/selection" in trainer.callback_metrics


# Checkpoints --------------------------------------------------------------------------------------


def shifted(**options):
    return ShiftedImages(
        make_source(24),
        **{
            "corruptions": ["contrast", "saturate"],
            "images": 20,
            "batch_size": 4,
            "order": "separate",
            "val_images": 8,
            "val_batch_size": 4,
            **options,
        },
    )


def stop_after(epochs, module, path=None, resume=None, data=None, trace=None):
    trainer = make_trainer(*([] if trace is None else [trace]), epochs=epochs)
    data = shifted() if data is None else data
    trainer.fit(module, datamodule=data, ckpt_path=resume)
    if path is not None:
        trainer.save_checkpoint(path)
    return trainer


def mgtta(form="published", norm="gn", method=MGTTA, **options):
    torch.manual_seed(3)
    rule = MGG(lr=0.02, form=form)
    return MGGPretraining(method(make_network(norm), rule), inner_lr=INNER_LR, **options)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The checkpoint of two epochs."""
    path = tmp_path_factory.mktemp("pretraining") / "rule.ckpt"
    stop_after(2, mgtta(), path)
    return path


def test_a_checkpoint_holds_the_rule_and_what_moved_but_not_the_network(checkpoint):
    content = torch.load(checkpoint, weights_only=True)
    tensors = {n for n, value in content["state_dict"].items() if isinstance(value, Tensor)}
    network = {n for n in tensors if n.startswith("method.network.")}
    assert network == {f"method.network.{n}" for n in ("1.weight", "1.bias", "4.weight", "4.bias")}
    others = {n for n in tensors - network if not n.startswith("method.rule.")}
    assert {n.rpartition(".")[2] for n in others} == {"std", "mean"}
    assert len(others) == 2
    assert content["state_dict"]["method._extra_state"]["rule_state"] == {}


class Interruption(Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx == 2:
            raise OSError("interrupted")


def test_a_training_after_an_interrupted_one_starts_from_the_source_network(tmp_path):
    module, expected = mgtta(), weights_hash(make_network("gn"))
    with pytest.raises(OSError, match="interrupted"):
        make_trainer(Interruption()).fit(module, datamodule=shifted())
    assert weights_hash(module.network) != expected
    stop_after(1, module, tmp_path / "rule.ckpt")
    record = torch.load(tmp_path / "rule.ckpt", weights_only=True)["tta_lightning"]
    assert record["backbone"]["weights_sha256"] == expected


def test_clean_images_get_the_precision_of_the_training():
    module = mgtta()
    make_trainer(precision="64-true").fit(module, datamodule=shifted())
    assert module.method.source.std.dtype == torch.float64


@pytest.mark.filterwarnings("ignore:.*AMP with fp16 is not supported on CPU")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "16-true"}, "does not support precision '16-true'.*Use 32-true"),
        ({"gradient_clip_val": 1.0}, "takes its optimizer steps itself: leave gradient_clip_val"),
        ({"accumulate_grad_batches": 2}, "leave gradient_clip_val and accumulate_grad_batches"),
    ],
)
def test_options_of_the_trainer_that_do_not_fit(options, message):
    with pytest.raises(InputError, match=message):
        make_trainer(**options).fit(mgtta(), datamodule=shifted())


def test_a_missing_checkpoint_cannot_be_resumed():
    with pytest.raises(InputError, match=r"There is no checkpoint 'nope.ckpt' to resume"):
        make_trainer().fit(mgtta(), datamodule=shifted(), ckpt_path="nope.ckpt")


def test_a_trained_network_cannot_be_resumed(tmp_path):
    torch.save({"state_dict": {}, "tta_lightning": {"kind": "source"}}, tmp_path / "a.ckpt")
    with pytest.raises(InputError, match="it is not one of MGGPretraining"):
        mgtta().on_load_checkpoint(torch.load(tmp_path / "a.ckpt"))


def test_batches_of_another_form():
    images = torch.rand(8, 3, 32, 32)
    loader = DataLoader(TensorDataset(images, torch.zeros(8).long()), batch_size=4)
    module = make_module()
    with pytest.raises(
        InputError, match=r"needs batches \(images, labels, number of the segment\)"
    ):
        make_trainer().fit(module, loader, loader)


def test_it_cannot_test():
    with pytest.raises(InputError, match="cannot test: use `tta validate`"):
        make_trainer().test(mgtta(), DataLoader(TensorDataset(torch.rand(2, 3, 32, 32))))


def test_a_window_counts_a_loss_only_where_an_update_decides_it():
    weight = torch.ones((), requires_grad=True)
    window = Window({"m": weight * 2})
    window.score({"a": torch.ones(2)})
    assert window.scored == 0
    window.add("a", weight * torch.tensor([1.0, 2.0]))
    window.add("a", weight * torch.tensor([3.0, 0.0]))
    window.score({"b": torch.ones(2)})
    assert window.scored == 0
    window.score({"a": torch.tensor([10.0, 1.0]), "b": torch.ones(2)})
    assert (window.scored, window.surrogate.item()) == (1, 42.0)
    after = window.cut()
    assert not after.state["m"].requires_grad
    assert (after.scored, after.travelled) == (0, {})
    assert set(after.pending) == {"a", "b"}


def test_the_same_module_can_go_on(tmp_path):
    module, path = mgtta(), tmp_path / "rule.ckpt"
    stop_after(1, module, path)
    stop_after(2, module, resume=path)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("monitor", [None, "val/selection"])
@pytest.mark.parametrize("options", [{}, {"unroll": 3}, {"schedule": "cosine"}])
@pytest.mark.parametrize("method", [MGTTA, Tent])
def test_a_resumed_training_ends_as_one_without_interruption(method, options, monitor, tmp_path):
    def run(folder, resume=None):
        every = ModelCheckpoint(tmp_path / folder, "{epoch}", monitor=monitor, save_top_k=-1)
        trace = Trace()
        trainer = make_trainer(trace, every, epochs=4, enable_checkpointing=True)
        trainer.fit(mgtta(method=method, **options), datamodule=shifted(), ckpt_path=resume)
        return trainer, trace

    uninterrupted, whole = run("first")
    resumed, rest = run("second", resume=tmp_path / "first" / "epoch=1.ckpt")
    half = len(whole.rule) // 2
    assert 4 <= half == len(rest.rule)
    for what in ("rule", "network"):
        pairs = zip(getattr(whole, what)[half:], getattr(rest, what), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    states = [trainer.optimizers[0].state_dict() for trainer in (uninterrupted, resumed)]
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
    for name in ("val/loss", "val/accuracy"):
        assert uninterrupted.callback_metrics[name] == resumed.callback_metrics[name]


def test_a_resumed_training_does_not_look_at_clean_images_again(checkpoint):
    class Blind(ShiftedImages):
        def clean_batches(self):
            raise AssertionError

    data = shifted()
    data.__class__ = Blind
    stop_after(3, mgtta(), resume=checkpoint, data=data)


def test_another_network_cannot_resume(checkpoint):
    torch.manual_seed(3)
    other = mgtta()
    with torch.no_grad():
        other.network[0].weight[0, 0, 0, 0] += 1
    with pytest.raises(InputError, match=r"cannot be resumed: its backbone is .* Resume with"):
        stop_after(3, other, resume=checkpoint)


def test_another_form_cannot_resume(checkpoint):
    with pytest.raises(InputError, match=r"its rule is .*published.*, not .*extended"):
        stop_after(3, mgtta("extended"), resume=checkpoint)


def test_the_checkpoint_is_what_mgtta_takes(checkpoint):
    trained = mgtta()
    stop_after(2, trained)
    rule = MGG.from_checkpoint(str(checkpoint))
    for name, parameter in trained.rule.named_parameters():
        assert torch.equal(rule.state_dict()[name], parameter)
    assert rule.lr == 0.02
    adapter = MGTTA(make_network("gn"), rule)
    adapter.prepare(batch for batch in ())  # statistics are known, so none are measured
    images = make_batches(1, size=8)[0]
    own = MGTTA(make_network("gn"), MGG(lr=0.02))
    own.prepare(shifted().clean_batches())
    adapter.adapt_step(images)
    own.adapt_step(images)
    assert adapter.report.loss == own.report.loss


def test_another_network_takes_the_rule_but_not_the_statistics(checkpoint):
    network = make_network("gn")
    nn.init.zeros_(network[-1].bias)
    adapter = MGTTA(network, MGG.from_checkpoint(str(checkpoint)))
    with pytest.warns(UserWarning, match="was trained on"):
        adapter.ready()
    with pytest.raises(InputError, match="clean images"):
        adapter.adapt_step(make_batches(1, size=8)[0])


# What people get wrong ----------------------------------------------------------------------------


@pytest.mark.parametrize("unroll", [1, 3])
@pytest.mark.parametrize("bad", [0, 2, 5])
def test_a_batch_that_is_not_finite_is_passed_over(unroll, bad):
    batches = labelled((6,))
    batches[bad][0][0, 0, 0, 0] = float("nan")
    module = make_module(unroll=unroll)
    reference = recipe(Problem(), module.rule, batches, unroll=unroll)
    with pytest.warns(UserWarning, match="not finite; nothing was learnt from it"):
        _, trace = fit(module, batches)
    assert torch.stack(trace.network).isfinite().all()
    if unroll == 1 and bad:
        assert torch.equal(trace.rule[bad], trace.rule[bad - 1])
    ours = distinct(reference.phi[0], trace.rule)
    assert len(ours) >= 2
    torch.testing.assert_close(ours[-1], reference.phi[-1], rtol=0, atol=1e-10)
    theirs = torch.stack(reference.theta)
    torch.testing.assert_close(torch.stack(trace.network), theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": SGD()}, "has the rule SGD, which has nothing to learn. Give it MGG()"),
        ({"unroll": 0}, "unroll = 0 is out of range: expected a whole number from 1 on"),
        ({"unroll": 1.5}, "unroll = 1.5 is out of range"),
        ({"schedule": "cosin"}, "Did you mean 'cosine'?"),
        ({"select_by": "acuracy"}, "Did you mean 'accuracy'?"),
        ({"lr": 0.0}, "lr = 0.0 is out of range: expected a number above 0"),
        ({"lr": float("nan")}, "lr = nan"),
        ({"inner_lr": 0.0}, "inner_lr = 0.0 is out of range"),
        ({"clip": -1.0}, "clip = -1.0 is out of range"),
    ],
)
def test_arguments_that_are_not_possible(options, message):
    with pytest.raises(InputError) as error:
        make_module(**options)
    assert message in str(error.value)


def test_the_cosine_needs_an_end():
    with pytest.raises(InputError, match="set the trainer's max_epochs"):
        fit(make_module(schedule="cosine"), labelled((2,)), epochs=-1)


def test_a_method_without_a_loss_is_refused():
    module = MGGPretraining(Adapter(make_network("gn"), MGG()))
    with pytest.raises(InputError, match="Adapter has no loss for a batch"):
        fit(module, labelled((2,), dtype=torch.float32))


def test_a_method_that_wants_clean_images_needs_a_source_of_them():
    module = MGGPretraining(MGTTA(make_network("gn"), MGG()))
    with pytest.raises(InputError, match="MGTTA looks at clean images first"):
        fit(module, labelled((2,), dtype=torch.float32))
