"""The loss of STAG against autograd, a naive transcription, golden figures and identities."""

import pytest
import torch
from torch.nn import functional as F

from tta_lightning.errors import InputError
from tta_lightning.methods.stag import (
    counted_samples,
    entropy_logit_gradient,
    stag_alignment,
    stag_loss,
    structural_anchors,
)
from tta_lightning.models.anchors import unit_anchors

PAIRS = [(s, k) for s in ("row", "feature") for k in ("self", "input", "total", "sum")]
PAIRS.append(("full", "full"))
every_pair = pytest.mark.parametrize(("space", "kind"), PAIRS, ids=["-".join(p) for p in PAIRS])


def random_case(seed=0, batch=6, classes=7, width=5):
    """Features [B, D], weight [C, D] and bias [C] in float64."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, width), (classes, width), (classes,))
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]


# Oracles ------------------------------------------------------------------------------------------


def naive_entropy(logits):
    return -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)


def naive_a(logits):
    return -logits.softmax(-1) * (logits.log_softmax(-1) + naive_entropy(logits)[..., None])


def naive_anchor(weight, kind):
    """[C, D], or [C, C * D] for ``full``."""
    a = naive_a(weight @ weight.T)
    own = a.diagonal()[:, None] * weight
    return {
        "self": own,
        "input": a @ weight,
        "total": a @ weight + own,
        "sum": a @ weight + a.T @ weight,
        "full": (a[:, :, None] * weight[:, None, :]).flatten(1),
    }[kind]


def naive_cosines(features, logits, weight, anchor, space):
    """Cosines [B], one sample after the other."""
    cosines = []
    for h, z in zip(features, logits, strict=True):
        a, y = naive_a(z), int(z.argmax())
        g = {"row": a[y] * h, "feature": weight.T @ a, "full": torch.outer(a, h).flatten()}[space]
        cosines.append(F.cosine_similarity(g, anchor[y], dim=0, eps=0))
    return torch.stack(cosines)


# The gradient of the entropy ----------------------------------------------------------------------


@pytest.mark.parametrize("with_bias", [False, True])
def test_entropy_gradients_equal_autograd(with_bias):
    features, weight, bias = random_case()
    bias = bias if with_bias else 0 * bias
    for h in features:
        leaves = [t.clone().requires_grad_() for t in (h, weight, bias)]
        logits = leaves[1] @ leaves[0] + leaves[2]
        by_z, by_h, by_w, by_b = torch.autograd.grad(naive_entropy(logits), [logits, *leaves])
        a = entropy_logit_gradient(logits.detach()[None])[0]
        for found, expected in (
            (a, by_z),
            (a, by_b),
            (torch.outer(a, h), by_w),
            (a @ weight, by_h),
        ):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_golden_entropy_gradients():
    logits = torch.tensor([[2.0, 1.0, -3.0], [2.5, 0.75, -3.0]])
    expected = [[-0.21251848, 0.18944197, 0.02307651], [-0.23539861, 0.21727752, 0.01812109]]
    found = entropy_logit_gradient(logits.double())
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)


def test_the_second_derivative_equals_autograd():
    logits = random_case()[0].requires_grad_()
    probe = torch.linspace(-1, 2, 30, dtype=torch.float64).reshape(6, 5)
    ours, naive = ((a * probe).sum() for a in (entropy_logit_gradient(logits), naive_a(logits)))
    (found,), (expected,) = (torch.autograd.grad(each, logits) for each in (ours, naive))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_the_gradient_sums_to_zero_and_is_not_positive_at_the_arg_max():
    for scale in (1e-3, 1, 30, 300):
        logits = scale * torch.randn(200, 11, generator=torch.Generator().manual_seed(1))
        a = entropy_logit_gradient(logits)
        assert a.sum(dim=1).abs().max() <= 1e-6
        assert (a.gather(1, logits.argmax(dim=1, keepdim=True)) <= 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_uniform_and_saturated_logits_have_no_gradient_and_no_nan(dtype):
    logits = torch.full((3, 8), 2.0, dtype=dtype)
    logits[1, 3] = 1e4
    logits[2] = torch.linspace(0, 1e4, 8).to(dtype)
    logits.requires_grad_()
    a = entropy_logit_gradient(logits)
    assert a.dtype == torch.promote_types(dtype, torch.float32)
    assert a.abs().max() < 1e-6
    (slope,) = torch.autograd.grad(a.square().sum(), logits)
    assert slope.isfinite().all()


# The loss -----------------------------------------------------------------------------------------


@every_pair
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_a_naive_transcription(space, kind, with_bias):
    features, weight, bias = random_case(1)
    expected, found = [], []
    for results, by_hand in ((expected, True), (found, False)):
        h, b = features.clone().requires_grad_(), bias.clone().requires_grad_()
        z = h @ weight.T + (b if with_bias else 0 * b)
        if by_hand:
            cosines = naive_cosines(h, z, weight, naive_anchor(weight, kind), space)
            loss = (1 - cosines).mean()
        else:
            anchors = structural_anchors(weight, kind=kind)
            cosines = stag_alignment(h, z, weight, anchors, space=space)
            loss = stag_loss(h, z, weight, 5 * anchors, space=space)  # of any length
        results += [cosines, loss, *torch.autograd.grad(loss, [h, b], materialize_grads=True)]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


GOLDEN = {
    ("row", "self"): 0.89442719,
    ("row", "total"): 0.89508833,
    ("feature", "input"): 0.81543959,
    ("full", "full"): 0.81425698,
}


@pytest.mark.parametrize("pair", GOLDEN)
def test_golden_losses(pair):
    space, kind = pair
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]]).double()
    h = torch.tensor([[2.0, 1.0]]).double().requires_grad_()
    loss = stag_loss(h, h @ weight.T, weight, structural_anchors(weight, kind=kind), space=space)
    assert loss.item() == pytest.approx(1 - GOLDEN[pair], abs=1e-8)
    if pair == ("row", "self"):
        (slope,) = torch.autograd.grad(loss, h)
        assert slope[0].tolist() == pytest.approx([-0.08944272, 0.17888544], abs=1e-8)


def test_row_and_self_is_the_cosine_with_the_predicted_row():
    features, weight, bias = random_case(2)
    h = features.clone().requires_grad_()
    logits = h @ weight.T + bias
    assert unit_anchors(weight, kind="self").reversed_classes.tolist() == []
    anchors = structural_anchors(weight, kind="self")
    y = logits.argmax(dim=1)
    loss = stag_loss(h, logits, weight, anchors, space="row")
    expected = 1 - F.cosine_similarity(h, weight[y], dim=1).mean()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    (slope,) = torch.autograd.grad(loss, h, retain_graph=True)
    assert (slope * features).sum(dim=1).abs().max() < 1e-12
    a = naive_a(logits).gather(1, y[:, None])
    for coefficient in (a, a.detach()):
        cosine = F.cosine_similarity(coefficient * h, anchors[y], dim=1).mean()
        (expected,) = torch.autograd.grad(1 - cosine, h, retain_graph=True)
        torch.testing.assert_close(slope, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("factor", [0.01, 7.0, 400.0])
def test_row_and_self_does_not_change_with_the_length_of_the_features(factor):
    features, weight, bias = random_case(2)
    anchors = structural_anchors(weight, kind="self")
    logits = features @ weight.T + bias  # fixes the predicted class
    expected = stag_loss(features, logits, weight, anchors, space="row")
    found = stag_loss(factor * features, logits, weight, anchors, space="row")
    assert found.item() == pytest.approx(expected.item(), abs=1e-12)


@every_pair
def test_a_rotation_of_the_features_changes_nothing(space, kind):
    features, weight, bias = random_case(3)
    logits = features @ weight.T + bias
    rotation, _ = torch.linalg.qr(random_case(9, batch=5)[0])
    losses = [
        stag_loss(h, logits, w, structural_anchors(w, kind=kind), space=space).item()
        for h, w in ((features, weight), (features @ rotation, weight @ rotation))
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-12)


@every_pair
def test_confident_samples_keep_their_direction_in_float32(space, kind):
    features, weight, _ = random_case(4)
    logits = features @ weight.T
    factor = 250 / (logits.topk(2).values @ torch.tensor([1.0, -1.0]).double())
    features, logits = factor[:, None] * features, factor[:, None] * logits
    assert (naive_a(logits).float() == 0).all()  # gone in float32, but not in float64
    expected = naive_cosines(features, logits, weight, naive_anchor(weight, kind), space)
    given = [tensor.float() for tensor in (features, logits, weight)]
    anchors = structural_anchors(weight, kind=kind)
    found = stag_alignment(*given, anchors, space=space)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5)


@every_pair
def test_classifier_and_anchors_are_constants(space, kind):
    features, weight, bias = random_case(3)
    anchors = structural_anchors(weight, kind=kind).requires_grad_()
    logits = features @ weight.T + bias
    for tensor in (features, logits, weight):
        tensor.requires_grad_()
    loss = stag_loss(features, logits, weight, anchors, space=space)
    assert torch.autograd.grad(loss, [weight, anchors], allow_unused=True) == (None, None)


# Which samples count ------------------------------------------------------------------------------


@every_pair
def test_masked_samples_do_not_count_and_get_no_gradient(space, kind):
    features, weight, bias = random_case(5)
    anchors = structural_anchors(weight, kind=kind)
    mask = torch.tensor([True, False, True, True, False, False])
    h = features.clone().requires_grad_()
    loss = stag_loss(h, h @ weight.T + bias, weight, anchors, space=space, mask=mask)
    kept = features[mask]
    cosines = naive_cosines(kept, kept @ weight.T + bias, weight, naive_anchor(weight, kind), space)
    assert loss.item() == pytest.approx(1 - cosines.mean().item(), abs=1e-12)
    (slope,) = torch.autograd.grad(loss, h)
    assert (slope != 0).any(dim=1).tolist() == mask.tolist()


@every_pair
def test_samples_without_a_direction_do_not_count_and_give_no_nan(space, kind):
    features, weight, bias = random_case(6)
    anchors = structural_anchors(weight, kind=kind)
    rest = stag_loss(features[:3], features[:3] @ weight.T + bias, weight, anchors, space=space)
    features[3] = 0
    features.requires_grad_()
    logits = (features @ weight.T + bias).index_fill(0, torch.tensor([4]), 2.5)
    features.data[5, 2] = torch.inf
    assert counted_samples(features, logits).tolist() == [0, 1, 2]
    loss = stag_loss(features, logits, weight, anchors, space=space)
    assert loss.item() == pytest.approx(rest.item(), abs=1e-14)
    (slope,) = torch.autograd.grad(loss, features)
    assert slope.isfinite().all()
    assert (slope != 0).any(dim=1).tolist() == [True] * 3 + [False] * 3


def test_without_a_sample_the_loss_is_zero_and_has_no_graph():
    features, weight, _ = random_case()
    h, anchors = features.requires_grad_(), structural_anchors(weight, kind="self")
    nobody = torch.zeros(6, dtype=torch.bool)
    for logits, mask in ((h @ weight.T, nobody), (torch.full((6, 7), -3.0), None)):
        loss = stag_loss(h, logits, weight, anchors, space="row", mask=mask)
        assert (loss.item(), loss.shape, loss.requires_grad) == (0, (), False)


@every_pair
@pytest.mark.parametrize("masked", [False, True])
def test_feature_maps_equal_their_locations(space, kind, masked):
    flat, weight, bias = random_case(7, batch=24)
    anchors = structural_anchors(weight, kind=kind)
    mask = torch.arange(24) % 3 > 0 if masked else None
    logits = flat @ weight.T + bias
    expected = stag_loss(flat, logits, weight, anchors, space=space, mask=mask)
    maps = [tensor.reshape(2, 3, 4, -1).permute(0, 3, 1, 2) for tensor in (flat, logits)]
    shaped = None if mask is None else mask.reshape(2, 3, 4)
    found = stag_loss(*maps, weight, anchors, space=space, mask=shaped)
    assert found.item() == pytest.approx(expected.item(), abs=1e-14)


@every_pair
def test_half_precision_and_autocast_give_what_float32_gives(space, kind):
    features, weight, bias = random_case(8)
    given = [t.bfloat16() for t in (features, features @ weight.T + bias, weight)]
    anchors = structural_anchors(weight, kind=kind)
    expected = stag_loss(*(t.float() for t in given), anchors, space=space)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = stag_loss(*given, anchors, space=space)
        from_float = stag_loss(*(t.float() for t in given), anchors, space=space)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    assert torch.equal(from_float, expected)


@pytest.mark.parametrize(
    ("narrowed", "kind", "space"),
    [(part, "self", "row") for part in ("features", "logits", "weight", "anchors")]
    + [(None, "full", "row"), (None, "full", "feature"), (None, "self", "full")],
)
def test_tensors_that_do_not_fit_are_refused(narrowed, kind, space):
    features, weight, _ = random_case()
    given = {"features": features, "logits": features @ weight.T, "weight": weight}
    given["anchors"] = structural_anchors(weight, kind=kind)
    if narrowed is not None:
        given[narrowed] = given[narrowed][:, :-1]
    message = rf"have the shapes \[6, .*expected \[B, D\], \[B, C\].* in the space '{space}'"
    with pytest.raises(InputError, match=message):
        stag_alignment(**given, space=space)
    with pytest.raises(InputError, match=message):
        stag_loss(**given, space=space)


def test_arguments_that_cannot_be_meant_are_refused():
    features, weight, _ = random_case()
    given = (features, features @ weight.T, weight, structural_anchors(weight, kind="self"))
    with pytest.raises(InputError, match=r"Unknown space 'rwo'\. Did you mean 'row'"):
        stag_loss(*given, space="rwo")
    with pytest.raises(InputError, match=r"mask is torch.bool with 5 entries, .* one a sample: 6"):
        stag_loss(*given, space="row", mask=torch.ones(5, dtype=torch.bool))
    with pytest.raises(InputError, match=r"torch.int64 with 6 entries, expected bool"):
        stag_loss(*given, space="row", mask=torch.ones(6, dtype=torch.int64))
    with pytest.raises(
        InputError, match=r"\[4, 5\] and logits \[6, 7\] are not of the same samples"
    ):
        stag_loss(features[:4], *given[1:], space="row")
    maps, turned = torch.rand(2, 5, 4, 6), torch.rand(2, 7, 6, 4)
    with pytest.raises(InputError, match="are not of the same samples"):
        stag_loss(maps, turned, *given[2:], space="row")


@every_pair
def test_the_weight_of_a_convolution_will_do(space, kind):
    features, weight, _ = random_case()
    given = (features, features @ weight.T)
    anchors = structural_anchors(weight, kind=kind)
    found = stag_loss(*given, weight[:, :, None, None], anchors, space=space)
    assert torch.equal(found, stag_loss(*given, weight, anchors, space=space))


@every_pair
@pytest.mark.parametrize(("of_features", "of_weight"), [(1e20, 1.0), (1e-24, 1.0), (1.0, 1e20)])
def test_lengths_do_not_leave_the_range_of_float32(space, kind, of_features, of_weight):
    features, weight, _ = random_case()
    anchors, logits = structural_anchors(weight, kind=kind), features @ weight.T
    expected = stag_alignment(features, logits, weight, anchors, space=space).float()
    given = [t.float() for t in (of_features * features, logits, of_weight * weight)]
    given[0].requires_grad_()
    found = stag_alignment(*given, anchors.float(), space=space)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    if space != "feature":
        (slope,) = torch.autograd.grad(found.sum(), given[0])
        assert slope.isfinite().all()
        assert slope.any()


def test_a_small_difference_of_large_logits_counts_in_half_precision_too():
    features = torch.ones(2, 5)
    logits = torch.tensor([[10.0, 11.0], [10.0, 10.0]])
    assert counted_samples(features, logits).tolist() == [0]
    assert counted_samples(features.bfloat16(), logits.bfloat16()).tolist() == [0]
