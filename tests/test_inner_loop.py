"""The functional core of MT3 against its equations, in float64 on a tiny network."""

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tta_lightning.inner_loop import (
    InnerLoop,
    Task,
    average,
    clip_by_norm,
    direction_loss,
    embed,
    inner_adapt,
    losses_at,
    meta_gradients,
    meta_loss,
    ssl_loss,
    symmetric_loss,
    task_loss,
    unstack,
)
from tta_lightning.models.byol import BYOLHeads, Embedder

TASKS, IMAGES, GAMMA, ALPHA = 3, 4, 0.1, 0.1
LOOP = InnerLoop(lr=ALPHA)
FUNC = replace(LOOP, engine="func")


class TinyNet(nn.Module):
    """Two group-normalised convolutions, a hidden layer, a head; smooth, for finite differences."""

    def __init__(self, smooth: bool = True) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4)
        self.conv2, self.norm2 = nn.Conv2d(4, 6, 3, stride=2), nn.GroupNorm(2, 6)
        self.hidden, self.head = nn.Linear(6, 5), nn.Linear(5, 5)
        self.act = nn.Softplus() if smooth else nn.ReLU()

    def forward(self, images):
        out = self.act(self.norm1(self.conv1(images)))
        out = self.act(self.norm2(self.conv2(out)))
        return self.head(self.act(self.hidden(out.mean(dim=(2, 3)))))


def make_embedder(smooth=True):
    torch.manual_seed(0)
    heads = BYOLHeads(TinyNet(smooth), hidden=6, projection=4).double()
    if smooth:
        heads.projector[1], heads.predictor[1] = nn.Softplus(), nn.Softplus()
    with torch.no_grad():
        for parameter in heads.parameters():  # no bias is 0, no scale is 1
            parameter.add_(0.3 * torch.randn_like(parameter))
    return Embedder(heads)


def make_tasks(count=TASKS, images=IMAGES, seed=1):
    draws = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(*shape, generator=draws, dtype=torch.float64)

    labels = torch.randint(5, (count, images), generator=draws)
    return Task(rand(count, 2, images, 3, 8, 8), rand(count, images, 3, 8, 8), labels)


def theta_of(embedder):
    return dict(embedder.named_parameters())


def gradients_of(loss, theta):
    found = torch.autograd.grad(loss, list(theta.values()), allow_unused=True)
    pairs = zip(theta.items(), found, strict=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in pairs}


def looped_gradients(embedder, tasks, loop=LOOP, gamma=GAMMA):
    theta, each = theta_of(embedder), unstack(tasks)
    total = sum(task_loss(embedder, theta, task, loop, gamma).total for task in each)
    return gradients_of(total / len(each), theta)


def assert_same(ours, expected, atol=1e-13):
    assert ours.keys() == expected.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=atol, msg=name)


def distance(first, second):
    return max((first[name] - second[name]).abs().max().item() for name in first)


# The equations, written out -----------------------------------------------------------------------


def forward(theta, images, act=F.softplus):
    """TinyNet and its BYOL heads as formulas: logits, projections, predictions."""
    w = {name.removeprefix("network."): tensor for name, tensor in theta.items()}

    def norm(x, name):
        rows = x.reshape(len(x) * 2, -1)
        mean = rows.mean(1, keepdim=True)
        variance = ((rows - mean) ** 2).mean(1, keepdim=True)
        x = ((rows - mean) / (variance + 1e-5) ** 0.5).view_as(x)
        scale, shift = w[f"backbone.{name}.weight"], w[f"backbone.{name}.bias"]
        return x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    x = F.conv2d(images, w["backbone.conv1.weight"], w["backbone.conv1.bias"], padding=1)
    x = act(norm(x, "norm1"))
    x = F.conv2d(x, w["backbone.conv2.weight"], w["backbone.conv2.bias"], stride=2)
    x = act(norm(x, "norm2")).flatten(2).mean(2)
    h = act(linear(x, "backbone.hidden"))
    z = linear(act(linear(h, "projector.0")), "projector.2")
    p = linear(act(linear(z, "predictor.0")), "predictor.2")
    return linear(h, "backbone.head"), z, p


def d(p, t):
    return 2 - 2 * (p * t).sum(1) / (p.square().sum(1).sqrt() * t.square().sum(1).sqrt())


def ssl_by_hand(phi, views, targets=None, stop=True):
    """Four forward passes: a prediction and a projection of either view."""
    a, b = views
    if targets is None:
        targets = [forward(phi, a)[1], forward(phi, b)[1]]
        targets = [t.detach() for t in targets] if stop else targets
    each = d(forward(phi, a)[2], targets[1]) + d(forward(phi, b)[2], targets[0])
    return each.sum() / len(a)


def step_by_hand(phi, views, alpha=ALPHA, clip=10.0, targets=None, stop=True):
    loss = ssl_by_hand(phi, views, targets, stop)
    moved = {}
    found = torch.autograd.grad(loss, list(phi.values()), create_graph=True, allow_unused=True)
    for (name, tensor), g in zip(phi.items(), found, strict=True):
        if g is None:
            moved[name] = tensor
            continue
        norm = g.square().sum().sqrt()
        moved[name] = tensor - alpha * (g * clip / norm if norm > clip else g)
    return moved


def task_by_hand(theta, task, alpha=ALPHA, clip=10.0, steps=1, gamma=GAMMA, targets=(None, None)):
    """The total loss of a task; ``targets``: fixed ones of the step, and of the loss after it."""
    phi = theta
    for _ in range(steps):
        phi = step_by_hand(phi, task.views, alpha, clip, targets[0])
    log_p = forward(phi, task.images)[0].log_softmax(1)
    ce = -log_p[torch.arange(len(task.labels)), task.labels].mean()
    return ce + gamma * ssl_by_hand(phi, task.views, targets[1])


@pytest.mark.parametrize("clip", [10.0, 0.05], ids=["no clip", "clipped"])
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("engine", ["autograd", "func"])
def test_a_meta_gradient_equals_the_equations_with_four_passes(engine, steps, clip):
    embedder, tasks = make_embedder(), make_tasks()
    theta = theta_of(embedder)
    by_hand = sum(task_by_hand(theta, t, clip=clip, steps=steps) for t in unstack(tasks)) / TASKS
    expected = gradients_of(by_hand, theta)
    ours = looped_gradients(embedder, tasks, InnerLoop(steps, ALPHA, clip, engine=engine))
    assert_same(ours, expected, 1e-12)
    assert max(g.abs().max() for g in expected.values()) > 0.01
    unclipped = looped_gradients(embedder, tasks, InnerLoop(steps, ALPHA, None))
    assert (distance(ours, unclipped) < 1e-12) == (clip == 10.0)


def test_a_whole_meta_step_equals_the_equations():
    embedder, tasks, beta, clip = make_embedder(), make_tasks(), 0.5, 0.2
    theta = theta_of(embedder)
    total = sum(task_by_hand(theta, task) for task in unstack(tasks)) / TASKS
    expected, clipped = {}, 0
    for name, g in gradients_of(total, theta).items():
        clipped += g.norm() > clip
        expected[name] = theta[name] - beta * g * min(1.0, clip / g.norm())
    assert 0 < clipped < len(expected)
    optimizer = torch.optim.SGD(embedder.parameters(), beta)
    for name, gradient in looped_gradients(embedder, tasks).items():
        theta[name].grad = clip_by_norm(gradient, clip)
    optimizer.step()
    assert_same(theta_of(embedder), expected, 1e-12)


def test_the_losses_of_a_task_are_those_of_the_equations():
    embedder, tasks = make_embedder(), make_tasks()
    theta, (task, *_) = theta_of(embedder), unstack(tasks)
    phi = step_by_hand(theta, task.views)
    logits = forward(phi, task.images)[0]
    wrong = (logits.argmax(1) + torch.tensor([0, 1, 1, 0])) % 5
    task = task._replace(labels=wrong)
    losses = task_loss(embedder, theta, task, LOOP, GAMMA)
    ssl = ssl_by_hand(phi, task.views)
    torch.testing.assert_close(losses.ssl, ssl)
    torch.testing.assert_close(losses.cross_entropy, F.cross_entropy(logits, task.labels))
    torch.testing.assert_close(losses.total, losses.cross_entropy + GAMMA * ssl)
    assert losses.correct == 0.5
    torch.testing.assert_close(
        ssl_loss(embedder, theta, task.views), ssl_by_hand(theta, task.views)
    )
    means = average([losses, *(task_loss(embedder, theta, t, LOOP, GAMMA) for t in [task] * 2)])
    torch.testing.assert_close(means.total, losses.total.detach())
    assert not means.total.requires_grad


def test_two_forward_passes_give_the_gradient_of_four():
    embedder, tasks = make_embedder(), make_tasks()
    theta, task = theta_of(embedder), unstack(tasks)[0]
    two = gradients_of(ssl_loss(embedder, theta, task.views), theta)
    a, b = task.views
    with torch.no_grad():
        targets = [embed(embedder, theta, view).projections for view in (a, b)]
    predictions = [embed(embedder, theta, view).predictions for view in (a, b)]
    four = direction_loss(predictions[0], targets[1]) + direction_loss(predictions[1], targets[0])
    assert_same(two, gradients_of(four.mean(), theta))


# T1 - T5: what the meta-gradient is ---------------------------------------------------------------


@pytest.mark.parametrize("engine", ["autograd", "func"])
def test_t1_without_a_learning_rate_it_is_joint_training(engine):
    embedder, tasks = make_embedder(), make_tasks()
    theta = theta_of(embedder)
    joint = 0
    for task in unstack(tasks):
        ce = F.cross_entropy(forward(theta, task.images)[0], task.labels)
        joint = joint + (ce + GAMMA * ssl_by_hand(theta, task.views)) / TASKS
    ours = looped_gradients(embedder, tasks, InnerLoop(lr=0.0, engine=engine))
    assert_same(ours, gradients_of(joint, theta))


def test_t2_without_steps_and_ssl_it_is_plain_supervision():
    embedder, tasks = make_embedder(), make_tasks()
    theta = theta_of(embedder)
    plain = F.cross_entropy(forward(theta, tasks.images.flatten(0, 1))[0], tasks.labels.flatten())
    ours = looped_gradients(embedder, tasks, InnerLoop(steps=0), gamma=0.0)
    assert_same(ours, gradients_of(plain, theta))


def test_t3_finite_differences_agree_where_the_targets_are_frozen_and_only_there():
    embedder, tasks = make_embedder(), make_tasks(count=1)
    theta, (task,) = theta_of(embedder), unstack(tasks)
    gamma, alpha, eps = 1.0, 0.5, 1e-5
    gradient = looped_gradients(embedder, tasks, InnerLoop(lr=alpha), gamma)
    t0 = [forward(theta, view)[1].detach() for view in task.views]
    phi = step_by_hand(theta, task.views, alpha)
    t1 = [forward(phi, view)[1].detach() for view in task.views]
    torch.manual_seed(2)
    for _ in range(3):
        direction = {name: torch.randn_like(tensor) for name, tensor in theta.items()}
        norm = sum(v.square().sum() for v in direction.values()).sqrt()
        analytic = sum((gradient[n] * v).sum() for n, v in direction.items()) / norm

        def difference(targets, direction=direction, norm=norm):
            losses = []
            for sign in (1, -1):
                moved = {n: t + sign * eps * direction[n] / norm for n, t in theta.items()}
                losses.append(task_by_hand(moved, task, alpha, gamma=gamma, targets=targets))
            return (losses[0] - losses[1]) / (2 * eps)

        frozen, naive = difference((t0, t1)), difference((None, None))
        assert frozen.item() == pytest.approx(analytic.item(), abs=1e-8)
        assert abs(naive.item() - analytic.item()) > 1e-3
        half = difference((t0, None))  # those of the loss after the step alone
        assert abs(half.item() - analytic.item()) > 1e-4


def test_t4_first_order_differs_by_what_is_linear_in_alpha():
    embedder, tasks = make_embedder(), make_tasks()
    gaps = []
    for alpha in (0.0, 1e-3, 2e-3, 4e-3):
        second, first = (
            looped_gradients(embedder, tasks, InnerLoop(lr=alpha, first_order=is_first))
            for is_first in (False, True)
        )
        gaps.append(torch.cat([(second[n] - first[n]).flatten() for n in second]).norm().item())
    assert gaps[0] == 0
    assert gaps[1] > 1e-5
    assert gaps[2] / gaps[1] == pytest.approx(2, rel=0.05)
    assert gaps[3] / gaps[2] == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize("engine", ["autograd", "func"])
def test_t4_first_order_is_the_gradient_at_phi(engine):
    embedder, tasks = make_embedder(), make_tasks()
    theta, sums = theta_of(embedder), None
    for task in unstack(tasks):
        phi = step_by_hand(theta, task.views)
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in phi.items()}
        there = gradients_of(losses_at(embedder, leaves, task, GAMMA).total / TASKS, leaves)
        sums = there if sums is None else {n: sums[n] + g for n, g in there.items()}
    ours = looped_gradients(embedder, tasks, replace(LOOP, first_order=True, engine=engine))
    assert_same(ours, sums)


def test_t5_targets_are_constants():
    embedder, tasks = make_embedder(), make_tasks(count=1)
    theta, (task,) = theta_of(embedder), unstack(tasks)
    targets = torch.stack([forward(theta, view)[1] for view in task.views])
    given = targets.detach().requires_grad_()
    loss = ssl_loss(embedder, theta, task.views, given)
    fixed = gradients_of(loss, theta)
    own = gradients_of(ssl_loss(embedder, theta, task.views), theta)
    assert_same(own, fixed)
    loss = ssl_loss(embedder, theta, task.views, given)
    assert torch.autograd.grad(loss, given, allow_unused=True) == (None,)
    flowing = gradients_of(ssl_by_hand(theta, task.views, stop=False), theta)
    assert distance(own, flowing) > 1e-2
    other = ssl_loss(embedder, theta, task.views, targets.flip(2).detach())
    assert abs(other - loss) > 1e-2  # what is given is used


# T6, T7: two back-ends ----------------------------------------------------------------------------


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize(("steps", "target"), [(0, "self"), (1, "self"), (2, "self"), (2, "meta")])
def test_t6_vmap_equals_a_loop_and_falls_back_nowhere(steps, target, first_order):
    embedder, tasks = make_embedder(), make_tasks()
    theta = theta_of(embedder)
    loop = InnerLoop(steps, ALPHA, 0.1, first_order, target, "func")
    torch._C._debug_only_display_vmap_fallback_warnings(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ours, losses = meta_gradients(embedder, theta, {}, tasks, loop, GAMMA)
    finally:
        torch._C._debug_only_display_vmap_fallback_warnings(False)
    expected = looped_gradients(embedder, tasks, replace(loop, engine="autograd"))
    assert_same(ours, expected)
    each = [task_loss(embedder, theta, task, loop, GAMMA) for task in unstack(tasks)]
    for mean, one in zip(losses, average(each), strict=True):
        torch.testing.assert_close(mean, one)


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("smooth", [True, False])
def test_t7_func_equals_autograd(steps, smooth):
    embedder, tasks = make_embedder(smooth), make_tasks()
    ours, expected = (
        looped_gradients(embedder, tasks, InnerLoop(steps, ALPHA, 0.1, engine=engine))
        for engine in ("func", "autograd")
    )
    assert_same(ours, expected)


# T8, T10, T12, T18: steps -------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["autograd", "func"])
def test_t8_the_head_stays_and_all_else_moves_in_a_copy(engine):
    embedder, tasks = make_embedder(), make_tasks()
    theta, before = theta_of(embedder), copy.deepcopy(embedder.state_dict())
    phi = inner_adapt(embedder, theta, tasks.views[0], replace(LOOP, engine=engine)).parameters
    head = {"network.backbone.head.weight", "network.backbone.head.bias"}
    assert phi.keys() == theta.keys()
    assert {name for name in phi if torch.equal(phi[name], theta[name])} == head
    assert all(phi[name] is theta[name] for name in head)
    assert all(torch.equal(t, before[n]) for n, t in embedder.state_dict().items())
    assert all(parameter.grad is None for parameter in embedder.parameters())


@pytest.mark.parametrize("engine", ["autograd", "func"])
@pytest.mark.parametrize("steps", [1, 3])
def test_t10_steps_are_those_of_sgd(steps, engine):
    embedder, tasks = make_embedder(), make_tasks()
    views, theta = tasks.views[0], theta_of(embedder)
    loop = InnerLoop(steps, ALPHA, None, True, engine=engine)
    phi, loss = inner_adapt(embedder, theta, views, loop)
    twin = copy.deepcopy(embedder)
    optimizer, losses = torch.optim.SGD(twin.parameters(), ALPHA), []
    for _ in range(steps):
        optimizer.zero_grad()
        losses.append(ssl_by_hand(theta_of(twin), views))
        losses[-1].backward()
        optimizer.step()
    assert_same(phi, theta_of(twin))
    assert loss.item() == pytest.approx(losses[0].item(), abs=1e-13)
    assert not loss.requires_grad


def test_no_steps_are_theta():
    embedder, tasks = make_embedder(), make_tasks()
    theta = theta_of(embedder)
    phi, loss = inner_adapt(embedder, theta, tasks.views[0], InnerLoop(steps=0))
    assert loss is None
    assert all(phi[name] is theta[name] for name in theta)


def test_an_extra_term_is_part_of_every_step():
    embedder, tasks = make_embedder(), make_tasks()
    views, theta = tasks.views[0], theta_of(embedder)

    def extra(parameters):
        return sum(0.1 * p.square().sum() for p in parameters.values())

    phi, loss = inner_adapt(embedder, theta, views, InnerLoop(2, ALPHA, None), extra)
    expected = theta
    for number in range(2):
        total = ssl_by_hand(expected, views) + extra(expected)
        if number == 0:
            torch.testing.assert_close(loss, total.detach())
        gradients = gradients_of(total, expected)
        moved = {n: t - ALPHA * gradients[n] for n, t in expected.items() if "head" not in n}
        expected = {n: moved.get(n, t).detach().requires_grad_() for n, t in expected.items()}
    assert_same(phi, expected)


@pytest.mark.parametrize("engine", ["autograd", "func"])
def test_t12_the_target_matters_from_the_second_step_on(engine):
    embedder, tasks = make_embedder(), make_tasks()
    theta, views = theta_of(embedder), tasks.views[0]

    def adapted(steps, target):
        loop = InnerLoop(steps, ALPHA, None, True, target, engine)
        return inner_adapt(embedder, theta, views, loop).parameters

    once = [adapted(1, target) for target in ("self", "meta")]
    assert all(torch.equal(once[0][name], once[1][name]) for name in theta)
    assert distance(adapted(3, "self"), adapted(3, "meta")) > 1e-4
    fixed = [forward(theta, view)[1].detach() for view in views]
    expected = theta
    for _ in range(3):
        expected = step_by_hand(expected, views, targets=fixed, clip=float("inf"))
    assert_same(adapted(3, "meta"), expected)


def test_t18_small_steps_lower_the_loss_on_their_views():
    embedder, tasks = make_embedder(), make_tasks()
    theta = theta_of(embedder)
    for task in unstack(tasks):
        targets = torch.stack([forward(theta, view)[1].detach() for view in task.views])
        losses = []
        for steps in (0, 1, 2, 3):
            loop = InnerLoop(steps, 0.01, target="meta")
            phi = inner_adapt(embedder, theta, task.views, loop).parameters
            losses.append(ssl_loss(embedder, phi, task.views, targets).item())
        assert losses == sorted(losses, reverse=True)
        squares = sum(
            g.square().sum()
            for g in gradients_of(ssl_loss(embedder, theta, task.views, targets), theta).values()
        )
        assert losses[0] - losses[1] == pytest.approx(0.01 * squares.item(), rel=0.2)


# T13, T14: the parts ------------------------------------------------------------------------------


def test_t13_the_algebra_of_the_loss():
    draws = torch.Generator().manual_seed(0)
    z, t = (torch.randn(6, 4, generator=draws, dtype=torch.float64) for _ in range(2))
    zeros, close = torch.zeros(6, dtype=torch.float64), torch.testing.assert_close
    close(direction_loss(z, 3 * z), zeros)
    close(direction_loss(z, -0.2 * z), zeros + 4)
    close(direction_loss(z, t), d(z, t))
    close(direction_loss(7 * z, 0.1 * t), direction_loss(z, t))
    right = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 5.0]])
    assert direction_loss(*right).tolist() == [2]
    assert symmetric_loss(torch.cat([z, -z]), torch.cat([-z, z])).item() == pytest.approx(0)
    assert symmetric_loss(torch.cat([z, z]), torch.cat([-z, -z])).item() == pytest.approx(8)
    both = symmetric_loss(torch.cat([z, t]), torch.cat([t, z.flip(1)]))
    close(both, (d(z, z.flip(1)) + d(t, t)).mean())
    close(both, symmetric_loss(torch.cat([t, z]), torch.cat([z.flip(1), t])))  # views exchanged
    close(both, symmetric_loss(torch.cat([z, t]), torch.stack([t, z.flip(1)])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_t13_a_zero_vector_gives_2_and_finite_derivatives(dtype):
    zero = torch.zeros(1, 3, dtype=dtype, requires_grad=True)
    some = torch.tensor([[1.0, 2.0, 3.0]], dtype=dtype, requires_grad=True)
    for pair in ((zero, some), (some, zero), (zero, zero)):
        loss = direction_loss(*pair)
        assert loss.tolist() == [2]
        assert loss.dtype == torch.promote_types(dtype, torch.float32)
        gradients = torch.autograd.grad(
            loss.sum(), (zero, some), create_graph=True, allow_unused=True
        )
        gradients = [g for g in gradients if g is not None]
        assert all(g.isfinite().all() for g in gradients)
        twice = torch.autograd.grad(
            sum(g.float().sum() for g in gradients), (zero, some), allow_unused=True
        )
        assert all(g.isfinite().all() for g in twice if g is not None)


def test_t14_clipping():
    gradient = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert torch.equal(clip_by_norm(gradient, None), gradient)
    assert torch.equal(clip_by_norm(gradient, 5.0), gradient)
    assert torch.equal(clip_by_norm(gradient, 7.0), gradient)
    torch.testing.assert_close(clip_by_norm(gradient, 2.5), gradient / 2)
    matrix = torch.full((2, 8), 1.0, dtype=torch.float64)  # of norm 4, as a whole
    torch.testing.assert_close(clip_by_norm(matrix, 1.0), matrix / 4)


@pytest.mark.parametrize("values", [[3.0, 4.0], [0.3, 0.4]], ids=["clipped", "not clipped"])
def test_t14_clipping_is_differentiable_twice(values):
    at = torch.tensor(values, dtype=torch.float64, requires_grad=True)

    def clipped(x):
        return clip_by_norm(x.square() * x.sign(), 2.0)

    assert torch.autograd.gradcheck(clipped, at)
    assert torch.autograd.gradgradcheck(clipped, at)


def test_t14_a_zero_gradient_stays_zero_with_finite_second_derivatives():
    x = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    loss = (x**4).sum() + 0 * x.sum()
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    clipped = clip_by_norm(gradient, 10.0)
    assert not clipped.any()
    (twice,) = torch.autograd.grad(clipped.sum(), x)  # through the clipping once more
    assert torch.equal(twice, torch.zeros_like(x))
    linear = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    (through,) = torch.autograd.grad(clip_by_norm(2 * linear, 10.0).sum(), linear)
    assert through.tolist() == [2, 2, 2]


def test_t14_each_tensor_is_clipped_by_itself():
    embedder, tasks = make_embedder(), make_tasks()
    theta, views, clip = theta_of(embedder), tasks.views[0], 0.1
    gradients = gradients_of(ssl_by_hand(theta, views), theta)
    phi = inner_adapt(embedder, theta, views, InnerLoop(lr=1.0, clip=clip)).parameters
    lengths = {n: (theta[n] - phi[n]).norm().item() for n in theta}
    for name, gradient in gradients.items():
        assert lengths[name] == pytest.approx(min(gradient.norm().item(), clip), abs=1e-12)
    norms = [g.norm() for g in gradients.values()]
    assert max(norms) > clip
    assert 0 < min(norm for norm in norms if norm > 0) < clip


# T15 ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["loop", "vmap"])
def test_t15_tasks_are_averaged_whatever_their_order(backend):
    embedder, tasks = make_embedder(), make_tasks()
    theta = theta_of(embedder)

    def gradients(tasks):
        if backend == "loop":
            return looped_gradients(embedder, tasks)
        return meta_gradients(embedder, theta, {}, tasks, FUNC, GAMMA)[0]

    together = gradients(tasks)
    alone = [gradients(Task(*(part[i : i + 1] for part in tasks))) for i in range(TASKS)]
    mean = {n: sum(each[n] for each in alone) / TASKS for n in theta}
    assert_same(together, mean)
    assert_same(gradients(Task(*(part[[2, 0, 1]] for part in tasks))), together)
    assert distance(alone[0], alone[1]) > 1e-3


# T20 ----------------------------------------------------------------------------------------------


class Flat(nn.Module):
    """Two hidden layers on pixels."""

    def __init__(self) -> None:
        super().__init__()
        layers = (nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
        self.body, self.head = nn.Sequential(nn.Flatten(), *layers), nn.Linear(32, 4)

    def forward(self, images):
        return self.head(self.body(images))


def displaced(count, draws):
    """Tasks of 8 noisy images of four classes; those of a task are displaced by the same vector."""
    classes = torch.randn(4, 12, generator=torch.Generator().manual_seed(5))
    labels = torch.randint(4, (count, 8), generator=draws)
    nuisance = 1.5 * torch.randn(count, 1, 12, generator=draws)
    images = (classes[labels] + nuisance).view(count, 8, 3, 2, 2)
    a, b, classified = images + 0.3 * torch.randn(3, *images.shape, generator=draws)
    return Task(torch.stack([a, b], dim=1), classified, labels)


def test_t20_a_step_learns_to_take_out_what_the_images_of_a_task_share():
    torch.manual_seed(0)
    embedder = Embedder(BYOLHeads(Flat(), hidden=32, projection=16))
    theta, held_out = theta_of(embedder), displaced(200, torch.Generator().manual_seed(9))
    optimizer = torch.optim.Adam(embedder.parameters(), 3e-3)

    def figures(steps):
        with torch.no_grad():
            return meta_loss(embedder, theta, held_out, replace(FUNC, steps=steps), GAMMA)

    untrained = figures(0).cross_entropy - figures(1).cross_entropy
    draws = torch.Generator().manual_seed(0)
    for _ in range(150):
        optimizer.zero_grad()
        meta_loss(embedder, theta, displaced(16, draws), FUNC, GAMMA).total.backward()
        optimizer.step()
    before, after = figures(0), figures(1)
    assert untrained.abs() < 0.02
    assert after.cross_entropy < 0.75 * before.cross_entropy
    assert after.correct > before.correct + 0.03
    assert before.correct > 0.6  # the classifier has learnt something without the step too
