"""Tent against the published implementation and against a loop written by hand."""

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.networks import golden_network, make_batches, make_network
from tta_lightning.methods import Tent
from tta_lightning.rules import SGD, Adam

GOLDEN = Path(__file__).parents[1] / "golden" / "reference_methods.pt"


@pytest.mark.parametrize(
    ("key", "rule"),
    [
        ("tent_adam1e-3_bn", Adam(lr=1e-3)),
        ("tent_sgd2.5e-3_m0.9_bn", SGD(lr=2.5e-3, momentum=0.9)),
    ],
)
def test_equals_the_published_implementation(key, rule):
    golden = torch.load(GOLDEN, weights_only=True)
    network = golden_network()
    network.load_state_dict(golden[key]["init"])
    adapter = Tent(network, rule)
    # Logits reach 6, and processors round convolutions differently: the source model alone, before
    # any update, is up to 2e-6 away on another one. So 1e-6 is taken of the largest logit.
    tolerance = 1e-6 * golden[key]["logits"].abs().max().item()
    for images, logits in zip(golden["batches"], golden[key]["logits"], strict=True):
        torch.testing.assert_close(adapter.adapt_step(images), logits, rtol=0, atol=tolerance)
    final = network.state_dict()
    for name, tensor in golden[key]["final"].items():
        torch.testing.assert_close(final[name], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", ["bn", "gn", "ln"])
def test_equals_a_loop_written_by_hand(norm):
    network, reference = make_network(norm).double(), make_network(norm).double()
    kinds = (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)
    moving = [p for m in reference.modules() if isinstance(m, kinds) for p in m.parameters()]
    reference.train()  # no dropout in there: this only affects batch normalisation
    optimizer = torch.optim.SGD(moving, lr=0.01, momentum=0.9)
    adapter = Tent(network, SGD(lr=0.01, momentum=0.9))
    for images in make_batches():
        logits = reference(images.double())
        probabilities = logits.softmax(1)
        loss = -(probabilities * probabilities.log()).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ours = adapter.adapt_step(images.double())
        torch.testing.assert_close(ours, logits.detach(), rtol=0, atol=1e-12)
        assert adapter.report.loss.item() == pytest.approx(loss.item(), abs=1e-12)
    for (name, p), q in zip(network.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12, msg=name)


def test_dropout_is_off():
    network = nn.Sequential(make_network("gn"), nn.Dropout(0.9))
    network.train()
    adapter = Tent(network, SGD(lr=0.0))
    images = make_batches(1)[0]
    assert torch.equal(adapter.adapt_step(images), adapter.adapt_step(images))
