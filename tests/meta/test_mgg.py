"""Pre-training of MGG against the published recipe."""

import math
from itertools import pairwise

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from tests.meta.mgg_reference import (
    Problem,
    assert_follows,
    generate,
    recipe,
)
from tests.meta.pretraining import (
    INNER_LR,
    LR,
    UNLABELLED,
    AtTheEnd,
    Gradients,
    fit,
    labelled,
    make_module,
)
from tta_lightning.adapter import Adapter
from tta_lightning.meta import MGGPretraining
from tta_lightning.rules import MGG


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
