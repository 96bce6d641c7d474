"""Structural anchors against autograd, golden figures, and decimals for saturated heads."""

from decimal import MIN_EMIN, Decimal, localcontext

import pytest
import torch
from torch import nn

from tta_lightning.errors import InputError
from tta_lightning.models import anchors as module
from tta_lightning.models import find_head
from tta_lightning.models.anchors import structural_anchors, unit_anchors

KINDS = ("self", "input", "total", "sum", "full")
HEADS = {  # seed of a random head, options; the last one has reversed classes
    "plain": (0, {}),
    "warm": (1, {"temperature": 2.5}),
    "normalised": (2, {"row_normalize": True, "temperature": 0.4}),
    "bias": (3, {"use_bias": True}),
    "all": (4, {"use_bias": True, "row_normalize": True, "temperature": 0.7}),
}
CASES = [pytest.param(kind, *HEADS[head], id=f"{kind}-{head}") for kind in KINDS for head in HEADS]


def random_head(seed=0, classes=7, width=5):
    """Weight [C, D] and bias [C] in float64."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(classes, width, generator=generator, dtype=torch.float64)
    return weight, torch.randn(classes, generator=generator, dtype=torch.float64)


# Oracles ------------------------------------------------------------------------------------------


def entropy(scores):
    p = scores.exp() / scores.exp().sum(-1, keepdim=True)
    return -(p * p.log()).sum(-1)


def anchors_by_autograd(
    weight, bias, kind, *, row_normalize=False, temperature=1.0, use_bias=False
):
    """[C, D], or [C, C, D] for ``full``: each role of w_c differentiated on its own."""
    source = weight / weight.norm(dim=1, keepdim=True) if row_normalize else weight
    added = bias if use_bias else torch.zeros_like(bias)
    found = []
    for c in range(len(source)):
        rows = source.clone().requires_grad_()
        fixed = source[c].clone().requires_grad_()
        if kind == "sum":
            loss = entropy((rows @ rows.T + added) / temperature).sum()
        elif kind == "input":
            loss = entropy((source @ fixed + added) / temperature)
        elif kind == "total":
            loss = entropy((rows @ rows[c] + added) / temperature)
        else:
            loss = entropy((rows @ source[c] + added) / temperature)
        (grad,) = torch.autograd.grad(loss, fixed if kind == "input" else rows)
        found.append(grad if kind in ("input", "full") else grad[c])
    return torch.stack(found)


def materialised(anchors, classes):
    """The outer products [C, C, D] of what ``full`` keeps as two factors."""
    gradient, rows = anchors.tensor_split([classes], dim=1)
    return gradient[:, :, None] * rows[:, None, :]


def units_by_decimals(weight, kind, chosen, bias=None):
    """Directions of some classes in 60 digits, whose exponents do not underflow."""
    with localcontext(prec=60, Emin=MIN_EMIN):
        rows = [[Decimal(x) for x in row] for row in weight.tolist()]
        added = [Decimal(x) for x in (torch.zeros(len(weight)) if bias is None else bias).tolist()]
        return torch.stack([_unit_by_decimals(rows, added, kind, c) for c in chosen])


def _unit_by_decimals(rows, added, kind, c):
    scores = [
        sum(x * y for x, y in zip(row, rows[c], strict=True)) + b
        for row, b in zip(rows, added, strict=True)
    ]
    scores = [score - max(scores) for score in scores]
    total = sum(score.exp() for score in scores)
    log_p = [score - total.ln() for score in scores]
    spread = -sum(each.exp() * each for each in log_p)
    a = [-each.exp() * (each + spread) for each in log_p]
    if kind == "full":
        return torch.cat([_as_unit(a), _as_unit(rows[c])])
    own = [a[c] * x for x in rows[c]]
    mixed = [sum(a_k * row[j] for a_k, row in zip(a, rows, strict=True)) for j in range(len(own))]
    parts = {"self": [own], "input": [mixed], "total": [own, mixed]}[kind]
    return _as_unit([sum(column) for column in zip(*parts, strict=True)])


def _as_unit(vector):
    length = sum(x * x for x in vector).sqrt()
    return torch.tensor([float(x / length) for x in vector], dtype=torch.float64)


# The derivative -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "seed", "options"), CASES)
def test_is_the_derivative_by_the_chosen_role(kind, seed, options):
    weight, bias = random_head(seed)
    found = structural_anchors(weight, bias, kind=kind, **options)
    expected = anchors_by_autograd(weight, bias, kind, **options)
    if kind == "full":
        found = materialised(found, 7)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("kind", "seed", "options"), CASES)
def test_unit_anchors_have_its_direction(kind, seed, options):
    weight, bias = random_head(seed)
    found = unit_anchors(weight, bias, kind=kind, **options).directions
    expected = anchors_by_autograd(weight, bias, kind, **options)
    if kind == "full":
        assert torch.allclose(found[:, :7].norm(dim=1), torch.ones(7).double())
        found = materialised(found, 7)
    length = expected.flatten(1).norm(dim=1).reshape(-1, *[1] * (expected.dim() - 1))
    torch.testing.assert_close(found, expected / length, rtol=0, atol=1e-11)


GOLDEN_WEIGHT = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
GOLDEN_A = [
    [-0.28258745, 0.14077036, 0.14181709],
    [0.14077036, -0.28258745, 0.14181709],
    [0.12353465, 0.12353465, -0.24706929],
]
GOLDEN = {
    "self": [[-0.28258745, 0], [0, -0.28258745], [0.24706929, 0.24706929]],
    "input": [[-0.42440454, -0.00104674], [-0.00104674, -0.42440454], [0.37060394, 0.37060394]],
    "total": [[-0.70699200, -0.00104674], [-0.00104674, -0.70699200], [0.61767323, 0.61767323]],
    "full": [[*a, *w] for a, w in zip(GOLDEN_A, GOLDEN_WEIGHT.tolist(), strict=True)],
}


@pytest.mark.parametrize("kind", GOLDEN)
def test_golden_anchors(kind):
    found = structural_anchors(GOLDEN_WEIGHT, kind=kind)
    expected = torch.tensor(GOLDEN[kind], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)


def test_golden_anchors_and_entropies_with_a_bias():
    bias = torch.tensor([0.5, -0.25, 0.0])
    found = structural_anchors(GOLDEN_WEIGHT, bias, kind="self", use_bias=True)
    diagonal = torch.tensor([-0.32292849, -0.13083234, -0.26364880], dtype=torch.float64)
    expected = diagonal[:, None] * GOLDEN_WEIGHT
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)
    found = [
        unit_anchors(GOLDEN_WEIGHT, bias, kind="self", use_bias=use).entropy
        for use in (False, True)
    ]
    golden = [[0.83239558, 0.83239558, 0.36659396], [0.63337239, 0.92460880, 0.40960872]]
    expected = list(torch.tensor(golden, dtype=torch.float64))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)


def test_a_bias_counts_only_where_it_is_asked_for():
    weight, bias = random_head()
    plain = structural_anchors(weight, kind="self")
    assert torch.equal(structural_anchors(weight, bias, kind="self"), plain)
    assert not torch.equal(structural_anchors(weight, bias, kind="self", use_bias=True), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_anchors_follow_a_permutation_of_the_classes(kind):
    weight, _ = random_head()
    order = torch.tensor([3, 0, 6, 2, 5, 1, 4])
    expected = structural_anchors(weight, kind=kind)[order]
    if kind == "full":
        expected = torch.cat([expected[:, :7][:, order], expected[:, 7:]], dim=1)
    found = structural_anchors(weight[order], kind=kind)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_anchors_follow_a_rotation_of_the_features(kind):
    weight, _ = random_head()
    rotation, _ = torch.linalg.qr(random_head(seed=9, classes=5)[0])
    expected = structural_anchors(weight, kind=kind)
    if kind == "full":
        expected = torch.cat([expected[:, :7], expected[:, 7:] @ rotation], dim=1)
    else:
        expected = expected @ rotation
    found = structural_anchors(weight @ rotation, kind=kind)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("seed", "use_bias"), [(0, True), (1, True), (3, False), (3, True), (4, False)]
)
def test_reversed_classes_are_those_with_a_positive_diagonal(seed, use_bias):
    weight, bias = random_head(seed)
    bias = 3 * bias
    scores = (weight @ weight.T + use_bias * bias).requires_grad_()
    (gradient,) = torch.autograd.grad(entropy(scores).sum(), scores)
    expected = [c for c in range(7) if gradient[c, c] > 0]
    found = unit_anchors(weight, bias, kind="self", use_bias=use_bias)
    assert found.reversed_classes.tolist() == expected
    assert len(expected) == {(0, True): 4, (1, True): 5, (3, False): 1, (3, True): 2}.get(
        (seed, use_bias), 0
    )
    torch.testing.assert_close(found.entropy, entropy(scores).detach(), rtol=0, atol=1e-12)


# Saturated heads ----------------------------------------------------------------------------------


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("factor", [1, 10, 100, 1000])
@pytest.mark.parametrize("kind", ["self", "input", "total", "full"])
@pytest.mark.parametrize("seed", [0, 3])  # 3: the row of class 0 loses to another one
def test_a_saturated_head_keeps_its_directions(kind, factor, use_bias, seed):
    weight, bias = random_head(seed)
    weight, bias = factor * weight, 30 * factor * bias
    found = unit_anchors(weight, bias, kind=kind, use_bias=use_bias).directions
    expected = units_by_decimals(weight, kind, range(7), bias if use_bias else None)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("kind", ["self", "input", "total"])
def test_a_saturated_head_of_a_thousand_classes_keeps_its_directions(kind):
    weight, bias = random_head(classes=1000, width=12)
    found = unit_anchors(100 * weight, bias, kind=kind, use_bias=True).directions
    assert found.shape == (1000, 12)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(1000).double())
    expected = units_by_decimals(100 * weight, kind, [0, 500, 999], bias)
    torch.testing.assert_close(found[[0, 500, 999]], expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("factor", [100, 1000])
def test_the_sum_over_classes_of_a_saturated_head_names_the_classes_it_loses(factor):
    weight, _ = random_head()
    with pytest.raises(InputError, match=r"5 of 7 .* length zero \(class 1, 2, 3, 4, 5\).*temper"):
        unit_anchors(factor * weight, kind="sum")
    found = unit_anchors(factor * weight, kind="sum", row_normalize=True).directions
    expected = unit_anchors(weight, kind="sum", row_normalize=True).directions
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_the_derivative_of_a_saturated_head_is_zero_and_not_nan():
    weight, _ = random_head()
    for kind in KINDS[:4]:
        assert torch.equal(structural_anchors(1e4 * weight, kind=kind), 0 * weight)


# What is computed from what -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_of_the_structure_equal_the_whole(kind, monkeypatch):
    weight, bias = random_head()
    whole = structural_anchors(weight, bias, kind=kind, use_bias=True)
    units = unit_anchors(weight, bias, kind=kind, use_bias=True)
    monkeypatch.setattr(module, "CHUNK", 3)
    pieces = structural_anchors(weight, bias, kind=kind, use_bias=True)
    torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-14)
    for found, expected in zip(
        unit_anchors(weight, bias, kind=kind, use_bias=True), units, strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_but_the_classifier_counts(kind):
    layer = nn.Linear(5, 7).double()
    first = unit_anchors(layer.weight, layer.bias, kind=kind).directions
    torch.manual_seed(5)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        again = unit_anchors(layer.weight, layer.bias, kind=kind).directions
    assert torch.equal(first, again)
    assert not first.requires_grad
    assert not structural_anchors(layer.weight, kind=kind).requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_narrow_weight_is_computed_in_float64(dtype):
    weight = random_head()[0].to(dtype)
    found = structural_anchors(weight, kind="total")
    assert found.dtype == torch.float64
    assert torch.equal(found, structural_anchors(weight.double(), kind="total"))


def test_the_layout_of_the_weight_does_not_matter():
    weight, _ = random_head()
    turned = weight.T.contiguous().T
    assert not turned.is_contiguous()
    expected = structural_anchors(weight, kind="sum")
    found = structural_anchors(turned, kind="sum")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


def test_the_effective_weight_of_a_weight_normed_head_counts():
    torch.manual_seed(0)
    layer = nn.Linear(5, 7, bias=False).double()
    head = find_head(nn.Sequential(nn.utils.parametrizations.weight_norm(layer)))
    length, direction = (p.detach() for p in layer.parametrizations.weight.parameters())
    length.mul_(3)
    expected = length * direction / direction.norm(dim=1, keepdim=True)
    found = structural_anchors(head.weight, kind="input")
    torch.testing.assert_close(found, structural_anchors(expected, kind="input"))


def test_the_effective_weight_of_a_spectral_normed_head_counts():
    torch.manual_seed(0)
    layer = nn.Linear(5, 7, bias=False).double()
    raw = 4 * layer.weight.detach()
    layer.weight.data.mul_(4)
    head = find_head(
        nn.Sequential(nn.utils.parametrizations.spectral_norm(layer, n_power_iterations=200))
    )
    expected = raw / torch.linalg.matrix_norm(raw, 2)
    found = structural_anchors(head.weight, kind="input")
    torch.testing.assert_close(found, structural_anchors(expected, kind="input"))


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_chunk_keeps_holds_on_to_nothing_else(kind, monkeypatch):
    kept, original = [], module._some_anchors

    def spy(*given):
        kept.extend(found := original(*given))
        return found

    monkeypatch.setattr(module, "_some_anchors", spy)
    monkeypatch.setattr(module, "CHUNK", 3)
    unit_anchors(random_head()[0], kind=kind)
    assert len(kept) == 3 * 4
    for tensor in kept:
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


@pytest.mark.parametrize("options", [{"temperature": 1e-300}, {"row_normalize": True}])
def test_anchors_of_any_size_have_length_one(options):
    weight = random_head()[0] if "temperature" in options else 1e60 * random_head()[0].double()
    found = unit_anchors(weight, kind="self", **options).directions
    torch.testing.assert_close(found.norm(dim=1), torch.ones(7, dtype=torch.float64))


# Heads without anchors ----------------------------------------------------------------------------

WEIGHT = random_head()[0]
ZERO_ROW = torch.cat([WEIGHT[:2], torch.zeros(1, 5), WEIGHT[2:]])


@pytest.mark.parametrize(
    ("weight", "options", "message"),
    [
        (WEIGHT[:1].expand(4, 5), {"kind": "self"}, r"4 of 4 classes .* \(class 0, 1, 2, 3\)"),
        *(
            (WEIGHT[:1].expand(7, 5), {"kind": kind}, "7 of 7 classes have a structural anchor")
            for kind in KINDS
        ),
        (torch.zeros(9, 5), {"kind": "total"}, r"9 of 9 .* \(class 0, 1, 2, 3, 4\).*all alike"),
        (ZERO_ROW, {"kind": "self"}, r"1 of 8 classes .* \(class 2\)"),
        (ZERO_ROW, {"kind": "full"}, r"1 of 8 classes .* \(class 2\)"),
        (ZERO_ROW, {"row_normalize": True}, "a row is zero"),
        (WEIGHT[:1], {}, r"two or more: .* got \[1, 5\]"),
        (WEIGHT[0], {}, r"weight \[C, D\], got \[5\]"),
        (WEIGHT.where(WEIGHT < 1, torch.nan), {}, "not finite everywhere"),
        (WEIGHT.where(WEIGHT < 1, torch.inf), {"kind": "input"}, "not finite everywhere"),
        (WEIGHT, {"use_bias": True}, r"needs a bias \[7\] .* got none"),
        (WEIGHT, {"use_bias": True, "bias": torch.zeros(3)}, r"needs a bias \[7\] .* got \[3\]"),
        (WEIGHT, {"use_bias": True, "bias": torch.full((7,), torch.nan)}, "NaN in its bias"),
        (WEIGHT.double() * 1e160, {}, "own rows is not finite"),
        (WEIGHT, {"temperature": 1e-310}, "own rows is not finite"),
        (WEIGHT, {"kind": "inputs"}, "Unknown kind of anchors 'inputs'. Did you mean 'input'"),
        (WEIGHT, {"temperature": 0.0}, r"temperature = 0.0: expected a positive number"),
        (WEIGHT, {"temperature": -1.0}, r"temperature = -1.0: expected a positive number"),
        (WEIGHT, {"temperature": float("nan")}, r"temperature = nan: expected"),
        (WEIGHT, {"temperature": float("inf")}, r"temperature = inf: expected"),
    ],
)
def test_heads_and_options_that_give_no_anchors(weight, options, message):
    with pytest.raises(InputError, match=message):
        unit_anchors(weight, **{"kind": "self", **options})
