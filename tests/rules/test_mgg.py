"""MGG: what its memory layer reads, what becomes of its output, and both forms of it."""

import math
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from tta_lightning.errors import InputError
from tta_lightning.rules import MGG
from tta_lightning.rules.moments import one_minus_power

SHARED = os.environ.get("TTA_SHARED")
FORMS = ["published", "extended"]
needs_published_files = pytest.mark.skipif(
    SHARED is None, reason="TTA_SHARED names no folder with the published checkpoint"
)


def random_mgg(form="published", seed=0, **options):
    """A rule in float64 in which no weight has a special value, as after training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        rule = MGG(form=form, **options).double()
        with torch.no_grad():
            for parameter in rule.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return rule


def published_mgg(**options):
    path = Path(SHARED) / "weights" / "mgg_ckpt.pth"
    return MGG.from_checkpoint(str(path), **options).double()


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def run(rule, gradients, name="a"):
    """The updates [T, N] of one tensor for its gradients [T, N], and the last state."""
    params = {name: torch.zeros_like(gradients[0])}
    state, updates = rule.init(params), []
    with torch.no_grad():
        for gradient in gradients:
            update, state = rule.update({name: gradient}, state, params)
            updates.append(update[name])
    return torch.stack(updates), state


def read_by_memory(rule, gradients, name="a"):
    """What the memory layer reads [T, N, inputs], and the updates [T, N]."""
    read = []
    handle = rule.memory.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    updates, _ = run(rule, gradients, name)
    handle.remove()
    return torch.stack(read), updates


def by_hand(gradients, betas=(0.9, 0.99), shift=1):
    """Normalised momentum and gradient and the divisor, each [T, N], from running sums."""
    (b1, b2), m, v, found = betas, 0.0, 0.0, []
    for t, g in enumerate(gradients, start=1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        scale = (v / (1 - b2 ** (t + shift))).sqrt() + 1e-8
        found.append((m / (1 - b1 ** (t + shift)) / scale, g / scale, scale))
    return [torch.stack(series) for series in zip(*found, strict=True)]


# What the memory layer reads --------------------------------------------------------------------


def test_inputs_of_a_golden_series():
    gradients = torch.tensor([[0.5], [-1.0], [2.0], [0.25]], dtype=torch.float64)
    read, _ = read_by_memory(random_mgg(), gradients)
    expected = [
        [0.7424597675, 1.4106735582],
        [-0.3131544955, -1.5429976053],
        [0.3796776566, 1.7351647325],
        [0.3787366688, 0.2416585435],
    ]
    torch.testing.assert_close(
        read[:, 0], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-10
    )


def test_inputs_of_a_golden_series_survive_float32():
    read, _ = read_by_memory(random_mgg().float(), torch.tensor([[0.5], [-1.0], [2.0], [0.25]]))
    expected = torch.tensor([[0.7424597675, 1.4106735582], [0.3787366688, 0.2416585435]])
    torch.testing.assert_close(read[[0, 3], 0], expected, rtol=5e-7, atol=0)


def test_first_inputs_are_constants_with_the_sign_of_the_gradient():
    read, _ = read_by_memory(random_mgg(), torch.tensor([[3e-3, -20.0, 1.0]]).double())
    expected = torch.tensor([1.0, -1.0, 1.0]).double()
    torch.testing.assert_close(read[0, :, 0], 0.7424598 * expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(read[0, :, 1], 1.4106736 * expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_inputs_of_zero_gradients_are_zero(form):
    read, updates = read_by_memory(random_mgg(form), torch.zeros(3, 2, dtype=torch.float64))
    assert read.abs().max() == 0
    assert updates.isfinite().all()


@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.5, 0.8), (0.0, 0.5)])
def test_exact_bias_correction_gives_the_direction_of_adam(betas):
    gradients = draw(8, 5)
    rule = random_mgg(betas=betas, bias_correction="exact")
    read, _ = read_by_memory(rule, gradients)
    leaf = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([leaf], lr=1.0, betas=betas, eps=1e-8)
    for t, gradient in enumerate(gradients):
        before, leaf.grad = leaf.detach().clone(), gradient.clone()
        optimizer.step()
        torch.testing.assert_close(read[t, :, 0], before - leaf.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(read[..., 1], by_hand(gradients, betas, 0)[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.5, 0.8), (0.0, 0.5)])
def test_published_bias_correction_is_one_step_ahead(betas):
    gradients = draw(8, 5)
    read, _ = read_by_memory(random_mgg(betas=betas), gradients)
    momentum, gradient, _ = by_hand(gradients, betas)
    expected = torch.stack((momentum, gradient), dim=2)
    torch.testing.assert_close(read, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.999])
def test_bias_correction_keeps_its_digits_in_float32(beta):
    for step in (1, 2, 50, 5000):
        found = one_minus_power(beta, torch.tensor(float(step))).item()
        assert found == pytest.approx(1 - beta**step, rel=3e-7)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", [0.1, 1000.0])
def test_the_scale_of_the_gradients_does_not_matter(form, scale):
    gradients = draw(10, 6)
    read, updates = read_by_memory(random_mgg(form, lr=1.0), gradients)
    read_scaled, updates_scaled = read_by_memory(random_mgg(form, lr=1.0), scale * gradients)
    torch.testing.assert_close(read_scaled, read, rtol=0, atol=1e-6)
    torch.testing.assert_close(updates_scaled, updates, rtol=0, atol=1e-5)


# What becomes of the output ---------------------------------------------------------------------


def test_update_is_the_learning_rate_times_tanh_of_the_layer():
    rule, gradients = random_mgg(lr=0.03), draw(6, 4)
    w, b = rule.memory.initial_memory(4)
    updates, state = run(rule, gradients)
    for update, *x in zip(updates, *by_hand(gradients)[:2], strict=True):
        out, w, b = rule.memory(torch.stack(x, dim=1), w, b)
        torch.testing.assert_close(update, -0.03 * out[:, 0].tanh(), rtol=0, atol=1e-14)
    torch.testing.assert_close(state["W"], w, rtol=0, atol=1e-13)
    torch.testing.assert_close(state["b"], b, rtol=0, atol=1e-13)


@needs_published_files
def test_golden_trace_of_the_published_checkpoint():
    golden = torch.load(
        Path(SHARED) / "golden" / "mgg_checkpoint_trace.pt", map_location="cpu", weights_only=True
    )
    read, updates = read_by_memory(published_mgg(lr=1.0), golden["gradients"])
    _, state = run(published_mgg(lr=1.0), golden["gradients"])
    assert len(updates) == 40
    torch.testing.assert_close(read, golden["inputs"], rtol=0, atol=1e-10)
    torch.testing.assert_close(-updates, golden["updates"], rtol=0, atol=1e-10)
    torch.testing.assert_close(state["W"], golden["final_W"], rtol=0, atol=1e-10)
    torch.testing.assert_close(state["b"], golden["final_b"], rtol=0, atol=1e-10)
    assert torch.equal(state["step"], torch.tensor(40.0, dtype=torch.float64))


@needs_published_files
def test_golden_trace_is_the_same_in_tensors_of_any_shape():
    golden = torch.load(
        Path(SHARED) / "golden" / "mgg_checkpoint_trace.pt", map_location="cpu", weights_only=True
    )
    assert_any_shapes_equal_one_flat_tensor(lambda: published_mgg(lr=1.0), golden["gradients"])


def assert_any_shapes_equal_one_flat_tensor(make, gradients):
    shapes = {"x": (2, 3, 4), "y": (), "z": (5,), "last": (1, 2)}
    assert sum(math.prod(shape) for shape in shapes.values()) == 32 == gradients.shape[1]
    flat, flat_state = run(make(), gradients)
    rule, params = make(), {n: torch.zeros(s, dtype=torch.float64) for n, s in shapes.items()}
    state = rule.init(params)
    for gradient, expected in zip(gradients, flat, strict=True):
        pieces = gradient.split([param.numel() for param in params.values()])
        grads = {n: g.view(shapes[n]) for n, g in zip(params, pieces, strict=True)}
        with torch.no_grad():
            updates, state = rule.update(grads, state, params)
        assert {name: tuple(update.shape) for name, update in updates.items()} == shapes
        together = torch.cat([update.flatten() for update in updates.values()])
        torch.testing.assert_close(together, expected, rtol=0, atol=1e-14)
    for key, tensor in flat_state.items():
        torch.testing.assert_close(state[key], tensor, rtol=0, atol=1e-13)


@pytest.mark.parametrize("form", FORMS)
def test_tensors_of_any_shape_equal_one_flat_tensor(form):
    assert_any_shapes_equal_one_flat_tensor(lambda: random_mgg(form, lr=1.0), draw(5, 32))


def test_coordinates_do_not_meet():
    gradients, order = draw(5, 6), torch.tensor([3, 0, 5, 1, 4, 2])
    updates, state = run(random_mgg(), gradients)
    permuted, permuted_state = run(random_mgg(), gradients[:, order])
    single, single_state = run(random_mgg(), gradients[:, 4:5])
    torch.testing.assert_close(permuted, updates[:, order], rtol=0, atol=1e-15)
    torch.testing.assert_close(single, updates[:, 4:5], rtol=0, atol=1e-15)
    for key in ("m", "v", "W", "b"):
        torch.testing.assert_close(permuted_state[key], state[key][order], rtol=0, atol=1e-13)
        torch.testing.assert_close(single_state[key], state[key][4:5], rtol=0, atol=1e-13)


def test_no_step_is_larger_than_the_learning_rate():
    rule = random_mgg(lr=0.01)
    with torch.no_grad():
        rule.memory.o_proj.weight.mul_(30)
    sizes = torch.tensor([1e-30, 1e-9, 1.0, 1e12, 0.0], dtype=torch.float64)
    updates, _ = run(rule, draw(20, 5) * sizes)
    assert updates.abs().max() <= 0.01
    assert (updates.abs() > 0.0099).float().mean() > 0.3


def test_without_inner_learning_rate_the_memory_stays():
    rule = random_mgg()
    with torch.no_grad():
        rule.memory.learnable_token_idx.fill_(-1.0)
    start = rule.init({"a": torch.zeros(4, dtype=torch.float64)})
    updates, state = run(rule, draw(6, 4))
    assert updates.abs().min() > 0
    assert torch.equal(state["W"], start["W"])
    assert torch.equal(state["b"], start["b"])
    assert not torch.equal(state["m"], start["m"])


# State and weights ------------------------------------------------------------------------------


def test_state_is_74_numbers_for_each_scalar():
    params = {"x": torch.zeros(3, 4), "y": torch.zeros(5), "z": torch.zeros(())}
    rule = MGG()
    state = rule.init(params)
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    assert shapes == {"step": (), "m": (18,), "v": (18,), "W": (18, 8, 8), "b": (18, 8)}
    with torch.no_grad():
        _, after = rule.update({n: torch.ones_like(p) for n, p in params.items()}, state, params)
    assert {key: tuple(tensor.shape) for key, tensor in after.items()} == shapes
    for found in (state, after):
        held = [tensor for key, tensor in found.items() if key != "step"]
        assert sum(tensor.numel() for tensor in held) == 18 * (72 + 2)
        assert sum(tensor.nbytes for tensor in held) == 18 * 296


def test_state_carries_no_graph_where_none_is_recorded():
    params = {"a": torch.zeros(3)}
    rule = MGG()
    with torch.no_grad():
        state = rule.init(params)
        updates, after = rule.update({"a": torch.ones(3)}, state, params)
    assert not any(tensor.requires_grad for tensor in (*updates.values(), *after.values()))


@pytest.mark.parametrize("form", FORMS)
def test_updates_leave_the_weights_alone(form):
    rule = random_mgg(form)
    before = {name: tensor.clone() for name, tensor in rule.state_dict().items()}
    run(rule, draw(4, 3))
    for name, tensor in rule.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_coordinates_of_a_missing_gradient_are_passed_over():
    shapes = {"x": (2, 2), "y": (3,), "z": (2,)}
    params = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
    rule = random_mgg()
    with torch.no_grad():
        first = {name: draw(*shape, seed=1) for name, shape in shapes.items()}
        _, state = rule.update(first, rule.init(params), params)
        second = {name: draw(*shape, seed=2) for name, shape in shapes.items()}
        whole, whole_state = rule.update(second, state, params)
        part = {"z": second["z"], "x": second["x"]}  # in another order too
        updates, part_state = rule.update(part, state, params)
    assert set(updates) == {"x", "z"}
    present = torch.tensor([0, 1, 2, 3, 7, 8])
    for name, update in updates.items():
        torch.testing.assert_close(update, whole[name], rtol=0, atol=1e-15)
    for key in ("m", "v", "W", "b"):
        assert torch.equal(part_state[key][4:7], state[key][4:7])
        torch.testing.assert_close(
            part_state[key][present], whole_state[key][present], rtol=0, atol=1e-13
        )
        assert not torch.equal(part_state[key][present], state[key][present])


def test_no_gradient_at_all_is_no_update():
    params = {"a": torch.zeros(3)}
    rule = MGG()
    state = rule.init(params)
    updates, after = rule.update({}, state, params)
    assert updates == {}
    for key in ("m", "v", "W", "b"):
        assert torch.equal(after[key], state[key])


# Gradients that are exactly zero ----------------------------------------------------------------


def with_a_dead_coordinate(rule):
    gradients = draw(5, 3)
    gradients[:, 1] = 0
    return run(rule, gradients)


@pytest.mark.parametrize("form", FORMS)
def test_a_coordinate_with_zero_gradient_stays_but_its_memory_goes_on(form):
    masked, masked_state = with_a_dead_coordinate(random_mgg(form))
    drifting, state = with_a_dead_coordinate(random_mgg(form, mask_zero_gradients=False))
    assert (masked[:, 1] == 0).all()
    assert (drifting[:, 1].abs() > 1e-5).all()
    assert torch.equal(masked[:, [0, 2]], drifting[:, [0, 2]])
    moved = masked_state["b"][1] - random_mgg(form).memory.b1[0, 0]
    assert moved.abs().max() > 1e-2  # W stays, because the key of a zero input is zero
    for key, tensor in state.items():
        assert torch.equal(masked_state[key], tensor)


def test_a_zero_gradient_after_others_gives_no_update_and_decays_the_momentum():
    gradients = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    updates, state = run(random_mgg(), gradients)
    assert updates[0].abs() > 0
    assert updates[1] == 0
    assert state["m"].item() == pytest.approx(0.09, abs=1e-15)


@needs_published_files
def test_the_published_rule_drifts_where_the_gradient_is_zero():
    drifting, _ = with_a_dead_coordinate(published_mgg(mask_zero_gradients=False))
    assert drifting[0, 1].item() == pytest.approx(0.996e-3, abs=5e-7)  # -lr * u(0), lr = 1e-3
    masked, _ = with_a_dead_coordinate(published_mgg())
    assert (masked[:, 1] == 0).all()


# The extended form ------------------------------------------------------------------------------


@pytest.mark.parametrize("hidden", [3, 8])
def test_extended_form_has_two_more_inputs_two_scales_and_a_skip(hidden):
    count = sum(p.numel() for p in MGG(form="extended", hidden=hidden).parameters())
    assert count == {3: 75, 8: 220}[hidden]
    assert sum(p.numel() for p in MGG(hidden=hidden).parameters()) == {3: 49, 8: 164}[hidden]


def without_its_layer(**options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        rule = MGG(form="extended", **options).double()
    nn.init.zeros_(rule.memory.o_proj.weight)
    return rule


def test_extended_form_starts_as_half_adam_half_gradient():
    gradients = draw(10, 7)
    updates, _ = run(without_its_layer(lr=0.02), gradients)
    momentum, _, scale = by_hand(gradients)
    gradient = (gradients / (scale**2).mean(dim=1, keepdim=True).sqrt()).asinh()
    torch.testing.assert_close(updates, -0.01 * (momentum + gradient), rtol=0, atol=1e-14)


def test_extended_form_can_be_adam():
    rule = without_its_layer(lr=0.02, bias_correction="exact")
    with torch.no_grad():
        rule.skip.copy_(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    gradients = draw(10, 7)
    updates, _ = run(rule, gradients)
    leaf = torch.zeros(7, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([leaf], lr=0.02, betas=(0.9, 0.99), eps=1e-8)
    for t, gradient in enumerate(gradients, start=1):
        leaf.grad = gradient.clone()
        optimizer.step()
        torch.testing.assert_close(updates[:t].sum(0), leaf.detach(), rtol=0, atol=1e-13)


def test_extended_form_also_reads_how_large_a_gradient_is_among_all():
    gradients = draw(6, 4) * torch.tensor([0.01, 1.0, 10.0, 300.0])
    read, _ = read_by_memory(random_mgg("extended"), gradients)
    momentum, gradient, scale = by_hand(gradients)
    size = (scale**2).mean(dim=1, keepdim=True).sqrt()
    expected = (
        momentum,
        gradient,
        (momentum * scale / size).asinh(),
        (gradients / size).asinh(),
    )
    torch.testing.assert_close(read, torch.stack(expected, dim=2), rtol=0, atol=1e-12)


def test_extended_output_is_the_scaled_sum_of_layer_and_skip():
    rule, gradients = random_mgg("extended", lr=0.5), draw(4, 3)
    w, b = rule.memory.initial_memory(3)
    for name, kind in {"a.bias": 0, "bias": 0, "a.weight": 1, "bias.scale": 1}.items():
        read, updates = read_by_memory(rule, gradients, name)
        out, _, _ = rule.memory(read[0], w, b)
        u = rule.log_scale[kind].exp() * (out[:, 0] + (read[0] * rule.skip).sum(dim=1))
        torch.testing.assert_close(updates[0], -0.5 * u, rtol=0, atol=1e-14)


def test_biases_have_a_scale_of_their_own():
    plain, scaled = random_mgg("extended", lr=1.0), random_mgg("extended", lr=1.0)
    with torch.no_grad():
        scaled.log_scale.copy_(plain.log_scale + torch.tensor([2.0, 5.0]).double().log())
    grads = {"n.weight": draw(2, 2), "n.bias": draw(3, seed=1), "other": draw(2, seed=2)}
    params = {name: torch.zeros_like(grad) for name, grad in grads.items()}
    before, _ = plain.update(grads, plain.init(params), params)
    after, _ = scaled.update(grads, scaled.init(params), params)
    for name, factor in {"n.weight": 5, "n.bias": 2, "other": 5}.items():
        torch.testing.assert_close(after[name], factor * before[name], rtol=1e-12, atol=0)


def test_extended_steps_have_no_bound():
    rule = without_its_layer(lr=0.02, bias_correction="exact")
    with torch.no_grad():
        rule.log_scale.fill_(math.log(50))
    updates, _ = run(rule, torch.ones(1, 1, dtype=torch.float64))
    # the only coordinate, at its first step: all four inputs are 1 or asinh(1)
    assert updates.item() == pytest.approx(-50 * 0.02 * (0.5 + 0.5 * math.asinh(1)), abs=1e-7)


# Gradients with respect to the weights ----------------------------------------------------------


def three_chained_updates(rule):
    """A scalar after three steps on a quadratic loss: each gradient depends on the last update."""
    params = {"a.weight": draw(2, 2, seed=1), "a.bias": draw(3, seed=2)}
    target = {"a.weight": draw(2, 2, seed=3), "a.bias": draw(3, seed=4)}
    state, total = rule.init(params), 0.0
    for _ in range(3):
        grads = {name: 2 * (param - target[name]) for name, param in params.items()}
        updates, state = rule.update(grads, state, params)
        params = {name: param + updates[name] for name, param in params.items()}
        total = total + sum((param - target[name]).pow(2).sum() for name, param in params.items())
    return total + state["W"].pow(2).sum() + state["b"].pow(2).sum()


@pytest.mark.parametrize("form", FORMS)
def test_gradients_through_three_updates_equal_finite_differences(form):
    rule = random_mgg(form, hidden=4, lr=0.2)
    three_chained_updates(rule).backward()
    for name, parameter in rule.named_parameters():
        assert parameter.grad is not None, name
        for index in range(parameter.numel()):
            value = parameter.data.view(-1)[index].item()
            ends = []
            for change in (1e-5, -1e-5):
                parameter.data.view(-1)[index] = value + change
                with torch.no_grad():
                    ends.append(three_chained_updates(rule).item())
            parameter.data.view(-1)[index] = value
            slope = (ends[0] - ends[1]) / 2e-5
            found = parameter.grad.view(-1)[index].item()
            assert found == pytest.approx(slope, rel=1e-5, abs=1e-7), f"{name}[{index}]"


# Precision --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_autocast_changes_nothing(form):
    rule, gradients = random_mgg(form).float(), draw(5, 4, dtype=torch.float32)
    expected, expected_state = run(rule, gradients)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        updates, state = run(rule, gradients)
    assert updates.dtype == torch.float32
    assert torch.equal(updates, expected)
    for key, tensor in expected_state.items():
        assert state[key].dtype == torch.float32
        assert torch.equal(state[key], tensor)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_rule_keeps_its_precision_when_its_network_is_halved(form, dtype):
    rule = random_mgg(form).float()
    before = {name: tensor.clone() for name, tensor in rule.state_dict().items()}
    whole = nn.ModuleList([nn.Linear(2, 2), rule]).to(dtype)
    assert whole[0].weight.dtype == dtype
    assert len(before) == len(list(rule.parameters()))
    for name, tensor in rule.to(dtype).state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, before[name])
    assert all(p.dtype == torch.float64 for p in rule.to(torch.float64).parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_gradients_are_worked_on_in_float32(dtype):
    rule, gradients = random_mgg(lr=0.01).float(), draw(3, 4, dtype=dtype)
    updates, state = run(rule, gradients)
    expected, expected_state = run(rule, gradients.float())
    assert updates.dtype == dtype
    assert torch.equal(updates, expected.to(dtype))
    for key, tensor in expected_state.items():
        assert torch.equal(state[key], tensor)


def test_float32_is_close_to_float64():
    gradients = draw(30, 50)
    exact, _ = run(random_mgg(lr=1.0), gradients)
    single, _ = run(random_mgg(lr=1.0).float(), gradients.float())
    assert (single.double() - exact).abs().max() < 1e-3
    assert (single.double() - exact).abs().median() < 1e-5


# Options ----------------------------------------------------------------------------------------


def test_options_default_to_the_published_ones():
    assert MGG().options() == {
        "lr": 1e-3,
        "form": "published",
        "hidden": 8,
        "betas": [0.9, 0.99],
        "bias_correction": "published",
    }
    assert MGG().mask_zero_gradients


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr = -1.0 is out of range: expected 0 <= lr"),
        ({"lr": float("nan")}, "lr = nan is out of range"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\] = 1.0 is out of range: expected 0 <= betas\[1\] < 1"),
        ({"betas": (-0.1, 0.9)}, r"betas\[0\] = -0.1"),
        ({"hidden": 0}, "hidden = 0 is out of range: expected 1 or more"),
        (
            {"form": "extendet"},
            "Unknown form of MGG 'extendet'. Did you mean 'extended'. Known: extended, published",
        ),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(InputError, match=message):
        MGG(**options)


@pytest.mark.parametrize("form", ["published", "extended"])
def test_rule_and_parameters_may_differ_in_precision(form):
    torch.manual_seed(0)
    rule = MGG(form=form)
    params = {"a": torch.zeros(3, dtype=torch.float64)}
    grads = {"a": torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)}
    updates, state = rule.update(grads, rule.init(params), params)
    expected, _ = (double := MGG(form=form).double()).update(grads, double.init(params), params)
    assert updates["a"].dtype == state["W"].dtype == torch.float64
    assert not torch.equal(updates["a"], expected["a"])  # other weights
    double.load_state_dict(rule.state_dict())
    expected, _ = double.update(grads, double.init(params), params)
    torch.testing.assert_close(updates["a"], expected["a"], rtol=0, atol=1e-15)
