"""Batch statistics, blends and running averages against their formula."""

import pytest
import torch
from torch import nn

from tests.networks import make_batches, make_network
from tta_lightning.errors import InputError
from tta_lightning.methods import BNStats, Source


def by_hand(network: nn.Sequential, images, alpha, reference):
    """The forward pass with each layer's blended statistics written out."""
    used = []
    x = images
    for number, module in enumerate(network):
        if isinstance(module, nn.BatchNorm2d):
            mean = (1 - alpha) * reference[number][0] + alpha * x.mean(dim=(0, 2, 3))
            var = (1 - alpha) * reference[number][1] + alpha * x.var(dim=(0, 2, 3), correction=0)
            x = (x - mean[:, None, None]) / (var[:, None, None] + module.eps).sqrt()
            x = x * module.weight[:, None, None] + module.bias[:, None, None]
            used.append((number, (mean, var)))
        else:
            x = module(x)
    return x, dict(used)


def source_statistics(network):
    return {
        number: (module.running_mean.clone(), module.running_var.clone())
        for number, module in enumerate(network)
        if isinstance(module, nn.BatchNorm2d)
    }


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("running", [False, True])
def test_equals_the_formula(alpha, running):
    network = make_network("bn").double()
    reference = source_statistics(network)
    adapter = BNStats(network, alpha=alpha, running=running)
    for images in make_batches():
        with torch.no_grad():
            expected, used = by_hand(network, images.double(), alpha, reference)
        ours = adapter.adapt_step(images.double())
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-11)
        reference = used if running else reference
    stored = source_statistics(network)
    for number in reference:
        for ours, expected in zip(stored[number], reference[number], strict=True):
            torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


def test_alpha_zero_is_the_source_model():
    images = make_batches(1)[0]
    ours = BNStats(make_network("bn"), alpha=0.0).adapt_step(images)
    torch.testing.assert_close(ours, Source(make_network("bn")).adapt_step(images))


def test_reset_returns_the_running_average_bit_for_bit():
    network = make_network("bn")
    before = {k: v.clone() for k, v in network.state_dict().items()}
    adapter = BNStats(network, alpha=0.2, running=True)
    for images in make_batches():
        adapter.adapt_step(images)
    assert not torch.equal(network[1].running_mean, before["1.running_mean"])
    adapter.reset()
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def test_a_nan_batch_does_not_poison_the_running_average():
    network = make_network("bn")
    adapter = BNStats(network, alpha=0.2, running=True)
    adapter.adapt_step(make_batches(1)[0])
    kept = source_statistics(network)
    adapter.adapt_step(torch.full((4, 3, 32, 32), torch.nan))
    assert not adapter.report.updated
    for number, statistics in source_statistics(network).items():
        assert torch.equal(statistics[0], kept[number][0])
        assert torch.equal(statistics[1], kept[number][1])


def test_an_exception_does_not_leave_blended_statistics_behind():
    network = make_network("bn")
    kept = source_statistics(network)
    adapter = BNStats(network, alpha=0.5)
    with pytest.raises(RuntimeError):
        adapter.adapt_step(torch.rand(4, 3, 4, 4))  # too small for the second convolution
    assert all(
        torch.equal(a, b)
        for n, s in kept.items()
        for a, b in zip(s, source_statistics(network)[n], strict=True)
    )


def test_predicting_without_learning_blends_too():
    images = make_batches(1)[0]
    adapter = BNStats(make_network("bn"), alpha=0.5, running=True)
    expected = BNStats(make_network("bn"), alpha=0.5).adapt_step(images)
    assert torch.equal(adapter(images), expected)
    assert torch.equal(adapter(images), expected)  # and keeps nothing


def test_a_single_image_is_warned_of_once():
    adapter = BNStats(make_network("bn"), alpha=0.5)
    with pytest.warns(UserWarning, match="single image") as caught:
        _ = [adapter.adapt_step(image) for image in make_batches(3, size=1)]
    assert len(caught) == 1


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_alpha_out_of_range(alpha):
    with pytest.raises(InputError, match="alpha"):
        BNStats(make_network("bn"), alpha=alpha)


def test_a_network_without_batch_normalisation_is_refused():
    with pytest.raises(InputError, match="no such layer"):
        BNStats(make_network("gn")).adapt_step(make_batches(1)[0])
