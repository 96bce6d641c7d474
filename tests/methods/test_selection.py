"""The backward pass over the kept samples alone: the same figures, and no more work than needed."""

import copy
import math

import pytest
import torch
from torch import nn

from tests.networks import coloured_squares, sharp_network, tensors_of
from tta_lightning.contract import Outputs
from tta_lightning.functional import entropy
from tta_lightning.methods import EATA, DeYO
from tta_lightning.methods.selection import logits_of_kept
from tta_lightning.rules import SGD


def margin_keeping(network, images, kept):
    """The entropy below which exactly `kept` of the images are."""
    ordered = entropy(copy.deepcopy(network).train()(images)).sort().values
    return ((ordered[kept - 1] + ordered[kept]) / 2).item()


def make_eta(network, images, kept):
    margin = margin_keeping(network, images, kept)
    return EATA(network, SGD(lr=0.1), e_margin=margin, d_margin=2.0, fisher_alpha=0.0)


def make_deyo(network, images, kept):
    margin = margin_keeping(network, images, kept)
    window = {"aug_type": "occ", "occlusion_size": 16, "row_start": 8, "column_start": 8}
    return DeYO(network, SGD(lr=0.1), margin, plpd_threshold=-1, **window)


def watch(network):
    """The sizes of the forward passes with a graph, and of those that were differentiated."""
    forward, backward = [], []

    def note(module, args, logits):
        if logits.requires_grad:
            forward.append(len(logits))
            logits.register_hook(lambda grad: backward.append(len(grad)))

    network.register_forward_hook(note)
    return forward, backward


@pytest.mark.parametrize("make", [make_eta, make_deyo])
@pytest.mark.parametrize("norm", ["gn", "ln"])
def test_few_kept_samples_are_differentiated_alone(make, norm):
    network, images = sharp_network(norm), coloured_squares(1)[0]
    adapter = make(network, images, kept=10)
    forward, backward = watch(network)
    adapter.adapt_step(images)
    assert (forward, backward) == ([16, 10], [10])  # 10 * 3 < 16 * 2


@pytest.mark.parametrize("make", [make_eta, make_deyo])
@pytest.mark.parametrize(("norm", "kept"), [("gn", 11), ("ln", 16 - 1), ("bn", 3)])
def test_many_kept_samples_and_batch_normalisation_keep_the_graph(make, norm, kept):
    network, images = sharp_network(norm), coloured_squares(1)[0]
    adapter = make(network, images, kept)
    forward, backward = watch(network)
    adapter.adapt_step(images)
    assert (forward, backward) == ([16], [16])


@pytest.mark.parametrize("make", [make_eta, make_deyo])
@pytest.mark.parametrize("norm", ["gn", "ln"])
@pytest.mark.parametrize("kept", [1, 5, 10])
def test_both_ways_move_the_weights_alike(make, norm, kept, monkeypatch):
    images = coloured_squares(1)[0]
    moved = []
    for whole_graph in (False, True):
        if whole_graph:
            module = "tta_lightning.methods." + ("eata" if make is make_eta else "deyo")
            monkeypatch.setattr(
                f"{module}.logits_of_kept", lambda _, out, x: out.logits[out.selected]
            )
        adapter = make(sharp_network(norm), images, kept)
        before = tensors_of(adapter)
        logits = adapter.adapt_step(images)
        after = tensors_of(adapter)
        moved.append((logits, {name: after[name] - before[name] for name in after}))
    (logits, alone), (expected, whole) = moved
    assert torch.equal(logits, expected)
    assert max(change.abs().max() for change in whole.values()) > 1e-4
    for name, change in whole.items():
        torch.testing.assert_close(alone[name], change, rtol=1e-9, atol=1e-13)


def selected_outputs(adapter, images, kept):
    out = adapter.outputs(images)
    out.selected = torch.arange(len(images)) < kept
    return out


def test_terms_see_the_whole_batch():
    network, images = sharp_network("gn"), coloured_squares(1)[0]
    adapter = make_eta(network, images, kept=4)
    seen = []

    def term(out: Outputs, head) -> torch.Tensor:
        seen.append((len(out.logits), int(out.selected.sum()), out.logits.requires_grad))
        return 0.0 * out.logits.sum()

    adapter.terms.append(term)
    forward, backward = watch(network)
    adapter.adapt_step(images)
    assert seen == [(16, 4, True)]
    assert (forward, backward) == ([16], [16])


def test_a_batch_with_a_nan_keeps_its_graph_however_few_are_kept():
    network, images = sharp_network("gn"), coloured_squares(1)[0]
    adapter = make_eta(network, images, kept=4)
    adapter.ready()
    images[9] = math.nan
    out = selected_outputs(adapter, images, kept=4)
    kept = logits_of_kept(adapter, out, images)
    assert torch.isfinite(kept).all()
    with pytest.warns(UserWarning, match="not finite"):
        adapter.adapt_step(images)
    assert not adapter.report.finite


def test_a_single_layer_of_batch_normalisation_keeps_the_graph_too():
    """Behind groups, after the head: its statistics are the batch's, wherever it stands."""
    network = nn.Sequential(sharp_network("gn"), nn.BatchNorm1d(10).double())
    images = coloured_squares(1)[0]
    adapter = EATA(network, SGD(lr=0.1), e_margin=5.0, d_margin=2.0, fisher_alpha=0.0)
    adapter.ready()
    out = selected_outputs(adapter, images, kept=2)
    forward, _ = watch(network)
    assert torch.equal(logits_of_kept(adapter, out, images), out.logits[:2])
    assert forward == []
