"""The gradient memory layer against its equations, written out for one coordinate at a time."""

import math

import pytest
import torch

from tta_lightning.rules import GradientMemoryLayer

COORDINATES = 6
# The order in which the parameters of the golden vector are filled, and how: base, amplitude.
GOLDEN_FILL = {
    "q_proj.weight": (0, 0.5),
    "k_proj.weight": (0, 0.5),
    "v_proj.weight": (0, 0.5),
    "o_proj.weight": (0, 0.5),
    "W1": (0, 0.1),
    "b1": (0, 0.1),
    "ttt_norm_weight": (1, 0.1),
    "ttt_norm_bias": (0, 0.1),
    "post_norm.weight": (1, 0.1),
    "post_norm.bias": (0, 0.1),
    "learnable_ttt_lr_weight": (0, 0.5),
    "learnable_ttt_lr_bias": (0, 0.1),
    "learnable_token_idx": (0, 0.1),
}
GOLDEN = [  # u of three scalars, norm of all W, norm of all b
    ((-0.8643773322, -0.9625818612, -0.0712044890), 5.2986034112, 8.4894871097),
    ((-0.8978586646, -0.7135590012, 0.1867189490), 5.3013030794, 8.4890929339),
    ((-0.4403913819, -0.7005000528, 0.1604620347), 5.3380745793, 8.4763391320),
]


def make_layer(inputs=2, hidden=8, outputs=1):
    """A layer in which no parameter has a special value, and the inputs of three calls."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = GradientMemoryLayer(inputs, hidden, outputs).double()
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        calls = list(torch.randn(3, COORDINATES, inputs, dtype=torch.float64))
    return layer, calls


def norm(z, weight, bias):
    variance = z.var(unbiased=False)
    return weight * (z - z.mean()) / (variance + 1e-6).sqrt() + bias


def one_coordinate(layer, x, w, b):
    """Memorise and read, all vectors [d], the gradient of the inner loss by autograd."""
    p = {name: tensor.detach() for name, tensor in layer.named_parameters()}
    gamma, beta = p["ttt_norm_weight"][0], p["ttt_norm_bias"][0]
    q, k, v = (p[f"{name}_proj.weight"] @ x for name in "qkv")
    gate = p["learnable_ttt_lr_weight"][0, 0] @ x + p["learnable_ttt_lr_bias"][0, 0]
    eta = max(0.0, 1 + p["learnable_token_idx"].item()) / (1 + math.exp(-gate)) / layer.hidden
    w, b = w.detach().requires_grad_(), b.detach().requires_grad_()
    inner_loss = 0.5 * (norm(k @ w + b, gamma, beta) - (v - k)).pow(2).sum()
    gradient_w, gradient_b = torch.autograd.grad(inner_loss, (w, b))
    w, b = (w - eta * gradient_w).detach(), (b - eta * gradient_b).detach()
    z = q + norm(q @ w + b, gamma, beta)
    out = p["o_proj.weight"] @ norm(z, p["post_norm.weight"], p["post_norm.bias"])
    return out, w, b


@pytest.mark.parametrize("hidden", [1, 3, 8, 16])
def test_number_of_parameters(hidden):
    count = sum(p.numel() for p in GradientMemoryLayer(hidden=hidden).parameters())
    assert count == {1: 17, 3: 49, 8: 164, 16: 452}[hidden] == hidden**2 + 12 * hidden + 4


def test_names_and_shapes_are_the_published_ones():
    shapes = {name: tuple(p.shape) for name, p in GradientMemoryLayer().state_dict().items()}
    assert shapes == {
        "q_proj.weight": (8, 2),
        "k_proj.weight": (8, 2),
        "v_proj.weight": (8, 2),
        "o_proj.weight": (1, 8),
        "W1": (1, 8, 8),
        "b1": (1, 1, 8),
        "ttt_norm_weight": (1, 8),
        "ttt_norm_bias": (1, 8),
        "learnable_ttt_lr_weight": (1, 1, 2),
        "learnable_ttt_lr_bias": (1, 1),
        "learnable_token_idx": (1,),
        "post_norm.weight": (8,),
        "post_norm.bias": (8,),
    }


def test_projections_start_uniform_in_the_inverse_root_of_their_inputs():
    torch.manual_seed(0)
    layer = GradientMemoryLayer(inputs=2, hidden=512, outputs=4)
    for name, bound in {"q": 0.5**0.5, "k": 0.5**0.5, "v": 0.5**0.5, "o": 512**-0.5}.items():
        weight = getattr(layer, f"{name}_proj").weight
        assert 0.99 * bound < weight.abs().max().item() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)  # of uniform numbers


def test_memory_and_gate_start_near_zero():
    torch.manual_seed(0)
    layer = GradientMemoryLayer(inputs=2000, hidden=64)
    for small in (layer.W1, layer.learnable_ttt_lr_weight):
        assert small.std().item() == pytest.approx(0.02, rel=0.05)
        assert small.mean().item() == pytest.approx(0.0, abs=0.002)
    for zero in ("b1", "ttt_norm_bias", "learnable_ttt_lr_bias", "learnable_token_idx"):
        assert getattr(layer, zero).abs().max() == 0
    assert layer.post_norm.bias.abs().max() == 0
    assert (layer.ttt_norm_weight == 1).all()
    assert (layer.post_norm.weight == 1).all()
    assert layer.post_norm.eps == 1e-6


def test_inner_learning_rate_starts_at_half_over_the_width():
    torch.manual_seed(0)
    rate = GradientMemoryLayer(hidden=8).rate(torch.zeros(1, 2))
    assert rate.item() == 0.0625


def test_initial_memory_is_a_copy_of_the_learned_one_for_each_coordinate():
    layer, _ = make_layer()
    w, b = layer.initial_memory(3)
    assert w.shape == (3, 8, 8)
    assert b.shape == (3, 8)
    for n in range(3):
        assert torch.equal(w[n], layer.W1[0])
        assert torch.equal(b[n], layer.b1[0, 0])
    w.sum().backward()
    assert torch.equal(layer.W1.grad, torch.full((1, 8, 8), 3.0, dtype=torch.float64))


@pytest.mark.parametrize(
    ("inputs", "hidden", "outputs"), [(2, 8, 1), (4, 8, 1), (2, 3, 1), (3, 5, 2)]
)
def test_equals_the_equations_with_the_inner_gradient_by_autograd(inputs, hidden, outputs):
    layer, calls = make_layer(inputs, hidden, outputs)
    w, b = layer.initial_memory(COORDINATES)
    expected = [(None, w[n], b[n]) for n in range(COORDINATES)]
    for x in calls:
        out, w, b = layer(x, w, b)
        expected = [one_coordinate(layer, x[n], *expected[n][1:]) for n in range(COORDINATES)]
        for got, wanted in zip((out, w, b), zip(*expected, strict=True), strict=True):
            torch.testing.assert_close(got, torch.stack(wanted), rtol=0, atol=1e-12)


def test_golden_vector():
    layer = GradientMemoryLayer().double()
    parameters, index = dict(layer.named_parameters()), 1
    with torch.no_grad():
        for name, (base, amplitude) in GOLDEN_FILL.items():
            parameter = parameters.pop(name)
            running = torch.arange(index, index + parameter.numel(), dtype=torch.float64)
            parameter.copy_((base + amplitude * running.sin()).view_as(parameter))
            index += parameter.numel()
    assert not parameters
    assert index == 165
    w, b = layer.initial_memory(3)
    for t, (u, norm_w, norm_b) in enumerate(GOLDEN, start=1):
        x = [[math.sin(t + n), math.cos(2 * t + n)] for n in range(3)]
        out, w, b = layer(torch.tensor(x, dtype=torch.float64), w, b)
        assert out[:, 0].tanh().tolist() == pytest.approx(u, abs=1e-10)
        assert w.norm().item() == pytest.approx(norm_w, abs=1e-9)
        assert b.norm().item() == pytest.approx(norm_b, abs=1e-9)


def test_closed_form_of_the_inner_gradient_equals_autograd():
    layer, _ = make_layer()
    z, target = torch.randn(
        2, 20, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    gamma, beta = layer.ttt_norm_weight[0], layer.ttt_norm_bias[0]
    z = z.requires_grad_()
    loss = sum(
        0.5 * (norm(row, gamma, beta) - wanted).pow(2).sum()
        for row, wanted in zip(z, target, strict=True)
    )
    (expected,) = torch.autograd.grad(loss, z)
    torch.testing.assert_close(layer.inner_gradient(z, target), expected, rtol=0, atol=1e-13)


def test_inner_steps_conserve_the_row_sums_of_the_memory():
    layer, calls = make_layer()
    start_w, start_b = layer.initial_memory(COORDINATES)
    w, b = start_w, start_b
    for x in calls * 7:
        _, w, b = layer(x, w, b)
    assert (w - start_w).abs().max() > 0.1
    assert (b - start_b).abs().max() > 0.1
    torch.testing.assert_close(w.sum(2), start_w.sum(2), rtol=0, atol=1e-13)
    torch.testing.assert_close(b.sum(1), start_b.sum(1), rtol=0, atol=1e-13)


def test_coordinates_do_not_meet():
    layer, calls = make_layer()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    whole, permuted = layer.initial_memory(COORDINATES), layer.initial_memory(COORDINATES)
    single = layer.initial_memory(1)
    for x in calls:
        out, *whole = layer(x, *whole)
        out_permuted, *permuted = layer(x[order], *permuted)
        out_single, *single = layer(x[4:5], *single)
        for all_of_them, ordered, one in zip(
            (out, *whole), (out_permuted, *permuted), (out_single, *single), strict=True
        ):
            torch.testing.assert_close(ordered, all_of_them[order], rtol=0, atol=1e-14)
            torch.testing.assert_close(one, all_of_them[4:5], rtol=0, atol=1e-14)


@pytest.mark.parametrize("token", [-1.0, -2.5])
def test_without_inner_learning_rate_there_is_no_memory(token):
    layer, (x, other, _) = make_layer()
    start = layer.initial_memory(COORDINATES)
    with torch.no_grad():
        layer.learnable_token_idx.fill_(token)
    first, *memory = layer(x, *start)
    _, *memory = layer(other, *memory)
    again, *memory = layer(x, *memory)
    assert torch.equal(first, again)
    for now, before in zip(memory, start, strict=True):
        assert torch.equal(now, before)


def test_with_an_inner_learning_rate_the_past_matters():
    layer, (x, other, _) = make_layer()
    first, *memory = layer(x, *layer.initial_memory(COORDINATES))
    _, *memory = layer(other, *memory)
    again, *_ = layer(x, *memory)
    assert (first - again).abs().min() > 1e-4


def test_the_learned_token_multiplies_the_inner_learning_rate():
    layer, (x, *_) = make_layer()
    with torch.no_grad():
        layer.learnable_token_idx.zero_()
        plain = layer.rate(x)
        layer.learnable_token_idx.fill_(1.5)
    torch.testing.assert_close(layer.rate(x), 2.5 * plain, rtol=1e-15, atol=0)
    assert plain.shape == (COORDINATES, 1)


def test_autograd_goes_through_inputs_and_memory():
    layer, (x, *_) = make_layer(hidden=3)
    layer.requires_grad_(False)
    inputs = [x, *layer.initial_memory(COORDINATES)]
    assert torch.autograd.gradcheck(layer, [tensor.clone().requires_grad_() for tensor in inputs])
