"""The term of STAG: weight, scope, unit, subsets of classes, and heads that do not fit."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.methods.test_stag import every_pair, naive_anchor, naive_cosines, random_case
from tests.networks import make_batches, make_network
from tta_lightning.contract import Outputs
from tta_lightning.errors import InputError
from tta_lightning.methods import Tent
from tta_lightning.methods.stag import StagOptions, StagTerm
from tta_lightning.models.anchors import unit_anchors
from tta_lightning.models.heads import Head
from tta_lightning.rules import SGD


def random_head(seed=0):
    """A linear layer of 7 classes and 5 features in float64."""
    _, weight, bias = random_case(seed)
    layer = nn.Linear(5, 7).double()
    layer.load_state_dict({"weight": weight, "bias": bias})
    return Head("head", layer)


def random_outputs(head, seed=0, classes=None, selected=None):
    """A forward pass of 6 samples whose features and logits have a graph."""
    h = random_case(seed)[0].requires_grad_()
    logits = head.module(h)
    return Outputs(logits if classes is None else logits[:, classes], h, selected)


def options(pair=("feature", "input"), weight=1.0, scope="host", unit="cosine", **others):
    return StagOptions(weight, *pair, scope, unit, **others)


@pytest.mark.parametrize("unit", ["logit", "cosine"])
@every_pair
def test_the_term_equals_a_naive_transcription(space, kind, unit):
    head = random_head()
    out = random_outputs(head)
    term = StagTerm(head, options((space, kind), weight=2.5, unit=unit))
    w = head.weight
    cosines = naive_cosines(out.features, out.logits, w, naive_anchor(w, kind), space)
    scale = torch.ones(6, dtype=torch.float64)
    if unit == "logit":
        scale = (out.features.norm(dim=1) * w[out.logits.argmax(dim=1)].norm(dim=1)).detach()
    expected = 2.5 * ((1 - cosines) * scale).mean()
    found = term(out, head)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert term.alignment.item() == pytest.approx(cosines.mean().item(), abs=1e-12)
    assert not term.alignment.requires_grad
    (slope,) = torch.autograd.grad(found, out.features, retain_graph=True)
    (expected,) = torch.autograd.grad(expected, out.features)
    torch.testing.assert_close(slope, expected, rtol=0, atol=1e-12)


def test_options_of_the_anchors_reach_them():
    head, chosen = random_head(), {"row_normalize": True, "temperature": 0.5, "use_bias": True}
    expected = unit_anchors(head.weight, head.bias, kind="input", **chosen)
    term = StagTerm(head, options(**chosen))
    assert torch.equal(term.anchors, expected.directions)
    assert torch.equal(term.entropy, expected.entropy)
    assert torch.equal(term.reversed_classes, expected.reversed_classes)


def test_a_weight_of_zero_looks_at_nothing():
    head = random_head()
    term = StagTerm(head, options(weight=0.0))
    loss = term(Outputs(torch.full((2, 7), torch.nan), None), head)
    assert (loss.item(), loss.requires_grad, term.alignment) == (0, False, None)


@pytest.mark.parametrize("scope", ["host", "all"])
def test_the_scope_says_whose_loss_counts(scope):
    head = random_head()
    chosen = torch.tensor([False, True, True, False, False, True])
    out = random_outputs(head, selected=chosen)
    loss = StagTerm(head, options(scope=scope))(out, head)
    (slope,) = torch.autograd.grad(loss, out.features)
    counted = chosen if scope == "host" else torch.ones(6, dtype=torch.bool)
    assert (slope != 0).any(dim=1).tolist() == counted.tolist()
    anchor = naive_anchor(head.weight, "input")
    cosines = naive_cosines(out.features, out.logits, head.weight, anchor, "feature")
    assert loss.item() == pytest.approx(1 - cosines[counted].mean().item(), abs=1e-12)


def test_without_a_selected_sample_there_is_no_loss_and_no_alignment():
    head = random_head()
    term = StagTerm(head, options())
    term(random_outputs(head), head)
    assert term.alignment is not None
    loss = term(random_outputs(head, selected=torch.zeros(6, dtype=torch.bool)), head)
    assert (loss.item(), loss.requires_grad, term.alignment) == (0, False, None)


@every_pair
def test_of_a_subset_of_the_classes_only_their_rows_count(space, kind):
    head, classes = random_head(), torch.tensor([4, 1, 6])
    out = random_outputs(head, classes=classes)
    term = StagTerm(head, options((space, kind)), classes)
    w = head.weight[classes]
    assert torch.equal(term.anchors, unit_anchors(w, kind=kind).directions)
    cosines = naive_cosines(out.features, out.logits, w, naive_anchor(w, kind), space)
    assert term(out, head).item() == pytest.approx(1 - cosines.mean().item(), abs=1e-12)


def test_anchors_stay_and_the_gradient_moves_where_the_head_moves():
    head = random_head()
    source, term = head.weight.clone(), StagTerm(head, options())
    kept = term.anchors.clone()
    head.module.weight.data.add_(torch.linspace(-1, 1, 35).reshape(7, 5))
    out = random_outputs(head)
    anchor = naive_anchor(source, "input")
    cosines = naive_cosines(out.features, out.logits, head.weight, anchor, "feature")
    assert term(out, head).item() == pytest.approx(1 - cosines.mean().item(), abs=1e-12)
    assert torch.equal(term.anchors, kept)


HIDDEN = {  # what a network does behind its head, and what is said of it
    "scaled": (lambda z, h, w: 3 * z, "logits are up to"),
    "normalised": (lambda z, h, w: F.normalize(h) @ F.normalize(w).T, "logits are up to"),
    "rectified": (lambda z, h, w: z.relu(), "logits are up to"),
    "elsewhere": (lambda z, h, w: z, "it did not run once"),
}


@pytest.mark.parametrize("how", HIDDEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_that_is_not_what_makes_the_logits_is_refused(how, dtype):
    head = random_head()
    out, (change, message) = random_outputs(head), HIDDEN[how]
    logits = change(out.logits, out.features, head.weight).to(dtype)
    features = None if how == "elsewhere" else out.features.to(dtype)
    with pytest.raises(InputError, match=f"'head' looks like the final linear map .*{message}"):
        StagTerm(head, options())(Outputs(logits, features), head)


def test_rounding_to_bfloat16_is_no_reason_to_refuse_a_head():
    torch.manual_seed(0)
    head = Head("head", nn.Linear(64, 7).requires_grad_(False))
    head.module.weight.data.sub_(head.weight.mean(dim=1, keepdim=True))
    features = 10 + torch.rand(6, 64)  # the logits are small differences of large sums
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = head.module(features)
        loss = StagTerm(head, options())(Outputs(logits, features), head)
    exact = features @ head.weight.T + head.bias
    off = (logits.float() - exact).abs().max() / (1 + exact.abs().max())
    assert 0.006 < off < 0.04
    assert loss.dtype == torch.float32
    given = [tensor.detach().double() for tensor in (features, logits, head.weight)]
    cosines = naive_cosines(*given, naive_anchor(given[2], "input"), "feature")
    assert loss.item() == pytest.approx(1 - cosines.mean().item(), abs=1e-5)


def test_a_sample_alone_is_aligned():
    adapter = Tent(make_network("gn").double(), SGD(lr=0.1))
    adapter.ready()
    adapter.terms.append(StagTerm(adapter.head, options(unit="logit")))
    for images in make_batches(3, size=1):
        out, w = adapter.outputs(images.double()), adapter.head.weight
        cosine = naive_cosines(out.features, out.logits, w, naive_anchor(w, "input"), "feature")
        adapter.adapt_step(images.double())
        assert adapter.terms[0].alignment.item() == pytest.approx(cosine.item(), abs=1e-12)
        assert adapter.report.updated


def test_a_copy_of_an_adapter_with_a_term_goes_its_own_way():
    adapter = Tent(make_network("gn"), SGD(lr=0.1))
    adapter.ready()
    adapter.terms.append(StagTerm(adapter.head, options(("row", "self"))))
    adapter.adapt_step(make_batches(1)[0])
    twin, bare = copy.deepcopy(adapter), copy.deepcopy(adapter)
    bare.terms.clear()
    runs = [[each.adapt_step(b) for b in make_batches(2)] for each in (adapter, twin, bare)]
    assert torch.equal(runs[0][1], runs[1][1])
    assert not torch.equal(runs[0][1], runs[2][1])
    assert twin.terms[0].anchors is not adapter.terms[0].anchors


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weight": -0.1}, r"weight = -0.1 is out of range: expected 0 <= weight"),
        ({"weight": float("nan")}, r"weight = nan is out of range"),
        ({"weight": float("inf")}, r"weight = inf is out of range"),
        ({"temperature": 0.0}, r"temperature = 0.0: expected a positive number"),
        ({"space": "features"}, "Unknown space 'features'. Did you mean 'feature'"),
        ({"anchors": "totals"}, "Unknown kind of anchors 'totals'. Did you mean 'total'"),
        ({"scope": "hosts"}, "Unknown scope 'hosts'. Did you mean 'host'"),
        ({"unit": "logits"}, "Unknown unit 'logits'. Did you mean 'logit'"),
        ({"anchors": "full"}, "space 'row' and anchors 'full' do not fit"),
        ({"space": "full"}, "space 'full' and anchors 'self' do not fit"),
    ],
)
def test_options_that_are_not_possible(given, message):
    with pytest.raises(InputError, match=message):
        StagOptions(**{"space": "row", "anchors": "self", **given})


def test_a_first_batch_with_nan_does_not_pass_for_a_check_of_the_head():
    head = random_head()
    head.module.requires_grad_(False)
    out, term = random_outputs(head), StagTerm(head, options())
    spoilt = out.logits.detach().clone()
    spoilt[0, 0] = torch.nan
    term(Outputs(spoilt, out.features), head)
    with pytest.raises(InputError, match="looks like the final linear map"):
        term(Outputs(3 * out.logits, out.features), head)


@pytest.mark.parametrize(
    ("space", "kind"), [("row", "self"), ("feature", "input"), ("full", "full")]
)
def test_anchors_are_the_derivative_of_the_space_where_nothing_else_is_said(space, kind):
    assert StagOptions(space=space).anchors == kind
    assert torch.equal(
        StagTerm(random_head(), StagOptions(space=space)).anchors,
        unit_anchors(random_head().weight, kind=kind).directions,
    )


def test_a_term_of_other_classes_is_refused():
    head = random_head()
    term = StagTerm(head, options())
    term(random_outputs(head), head)  # that these classes fitted says nothing of others
    out = random_outputs(head, classes=torch.tensor([1, 2, 3]))
    with pytest.raises(
        InputError, match=r"for 7 classes, but .* those of 3\. Make .* after restrict"
    ):
        term(out, head)


@every_pair
def test_the_classifier_is_a_constant_also_where_a_method_moves_it(space, kind):
    head = random_head()
    head.module.requires_grad_(False)
    fixed = random_outputs(head)
    (expected,) = torch.autograd.grad(
        StagTerm(head, options((space, kind)))(fixed, head), fixed.features
    )
    head.module.requires_grad_(True)
    out = random_outputs(head)
    logits = head.module(out.features)
    loss = StagTerm(head, options((space, kind)))(Outputs(logits, out.features), head)
    moving = list(head.module.parameters())
    slope, *others = torch.autograd.grad(loss, [out.features, *moving], allow_unused=True)
    assert others == [None] * len(moving)
    torch.testing.assert_close(slope, expected, rtol=0, atol=1e-12)
