"""Rules against torch.optim, in float64, over products of hyper-parameters."""

from itertools import product

import pytest
import torch

from tta_lightning.errors import InputError
from tta_lightning.rules import MGG, SGD, Adam, Sign, UpdateRule

STEPS = 6


def gradients(seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    params = {"a": draw(3, 4), "b": draw(5), "c": draw()}
    return params, [{name: draw(*p.shape) for name, p in params.items()} for _ in range(STEPS)]


def run_rule(rule: UpdateRule, params, steps):
    params, state = dict(params), rule.init(params)
    for grads in steps:
        updates, state = rule.update(grads, state, params)
        params = {n: p + updates[n] if n in updates else p for n, p in params.items()}
    return params, state


def run_optim(make, params, steps):
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    optimizer = make(list(leaves.values()))
    for grads in steps:
        for name, leaf in leaves.items():
            leaf.grad = grads[name].clone()
        optimizer.step()
    return {name: leaf.detach() for name, leaf in leaves.items()}


def assert_same(ours, theirs):
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("lr", "momentum", "dampening", "weight_decay", "nesterov"),
    [
        case
        for case in product((0.1, 1e-3), (0.0, 0.9, 0.5), (0.0, 0.3), (0.0, 0.01), (False, True))
        if not (case[4] and (case[1] == 0 or case[2] != 0))
    ],
)
def test_sgd_equals_torch(lr, momentum, dampening, weight_decay, nesterov):
    options = {
        "lr": lr,
        "momentum": momentum,
        "dampening": dampening,
        "weight_decay": weight_decay,
        "nesterov": nesterov,
    }
    params, steps = gradients()
    ours, _ = run_rule(SGD(**options), params, steps)
    assert_same(ours, run_optim(lambda p: torch.optim.SGD(p, **options), params, steps))


@pytest.mark.parametrize(
    ("lr", "betas", "eps", "weight_decay"),
    list(
        product(
            (0.1, 1e-3),
            ((0.9, 0.999), (0.9, 0.99), (0.0, 0.5), (0.5, 0.0)),
            (1e-8, 1e-2),
            (0.0, 0.1),
        )
    ),
)
def test_adam_equals_torch(lr, betas, eps, weight_decay):
    options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    params, steps = gradients()
    ours, _ = run_rule(Adam(**options), params, steps)
    assert_same(ours, run_optim(lambda p: torch.optim.Adam(p, **options), params, steps))


def test_adam_bias_correction_survives_float32():
    # computed naively in float32, 1 - 0.999 loses four digits and the first step is off
    params = {"a": torch.zeros(1)}
    updates, _ = Adam(lr=1.0, eps=0.0).update(
        {"a": torch.full((1,), 0.25)}, Adam().init(params), params
    )
    assert updates["a"].item() == pytest.approx(-1.0, abs=5e-7)


def trained_mgg(**options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        rule = MGG(**options).double()
        with torch.no_grad():  # as after training: no weight has a special value
            for parameter in rule.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return rule


RULES = [
    SGD(0.1),
    SGD(0.1, momentum=0.9, dampening=0.1),
    SGD(0.1, 0.9, nesterov=True),
    Adam(0.1),
    Sign(0.1),
    Sign(0.1, bias_correction="exact"),
    trained_mgg(lr=0.1),
    trained_mgg(lr=0.1, form="extended"),
    trained_mgg(lr=0.1, mask_zero_gradients=False, bias_correction="exact", hidden=3),
]


def buffers_of(state, name, params):
    """The part of a rule's state that belongs to one parameter: of dicts, or of flat tensors."""
    names = list(params)
    start = sum(params[other].numel() for other in names[: names.index(name)])
    stop = start + params[name].numel()
    found = [value[name] for value in state.values() if isinstance(value, dict)]
    flat = [v for v in state.values() if isinstance(v, torch.Tensor) and v.dim() > 0]
    return found + [value[start:stop] for value in flat]


@pytest.mark.parametrize("rule", RULES)
def test_update_is_pure(rule):
    params, steps = gradients()
    _, state = run_rule(rule, params, steps[:2])
    before = torch.utils._pytree.tree_map(torch.clone, (params, steps[2], state))
    first = rule.update(steps[2], state, params)
    second = rule.update(steps[2], state, params)
    for a, b in zip(*map(torch.utils._pytree.tree_leaves, (first, second)), strict=True):
        assert torch.equal(a, b)
    after = (params, steps[2], state)
    for a, b in zip(*map(torch.utils._pytree.tree_leaves, (before, after)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rule", RULES)
def test_update_is_differentiable(rule):
    params, steps = gradients()
    _, state = run_rule(rule, params, steps[:2])

    def summed(grad):
        updates, _ = rule.update({**steps[2], "b": grad}, state, params)
        return updates["b"].sum()

    assert torch.autograd.gradcheck(summed, steps[2]["b"].clone().requires_grad_())


@pytest.mark.parametrize("rule", RULES)
def test_a_parameter_without_gradient_stays(rule):
    params, steps = gradients()
    _, state = run_rule(rule, params, steps[:2])
    for at in (rule.init(params), state):
        updates, after = rule.update({"a": steps[2]["a"]}, at, params)
        assert set(updates) == {"a"}
        for name in params:
            before, now = buffers_of(at, name, params), buffers_of(after, name, params)
            for earlier, later in zip(before, now, strict=True):
                assert torch.equal(earlier, later) == (name != "a")


@pytest.mark.parametrize("rule", [rule for rule in RULES if not isinstance(rule, MGG)])
def test_buffers_start_at_zero(rule):
    params, _ = gradients()
    for name in params:
        for buffer in buffers_of(rule.init(params), name, params):
            assert torch.equal(buffer, torch.zeros_like(params[name]))


@pytest.mark.parametrize("rule", RULES)
def test_updates_have_the_names_shapes_and_precision_of_the_parameters(rule):
    params, steps = gradients()
    updates, _ = rule.update(steps[0], rule.init(params), params)
    assert list(updates) == list(params)
    for name, update in updates.items():
        assert update.shape == params[name].shape
        assert update.dtype == params[name].dtype
        assert update.abs().min() > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SGD(lr=-1.0), "lr = -1.0 is out of range"),
        (lambda: SGD(momentum=1.0), "momentum = 1.0"),
        (lambda: SGD(nesterov=True), "nesterov"),
        (lambda: Adam(betas=(0.9, 1.5)), r"betas\[1\] = 1.5"),
        (lambda: Adam(lr=float("nan")), "lr = nan"),
    ],
)
def test_hyper_parameters_out_of_range(make, message):
    with pytest.raises(InputError, match=message):
        make()
