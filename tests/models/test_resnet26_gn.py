"""ResNet-26 with group normalisation against the figures of its paper."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.networks import make_batches
from tta_lightning.errors import InputError
from tta_lightning.models import ResNet26GN


def small(seed=0, **options):
    torch.manual_seed(seed)
    return ResNet26GN(**{"width": 8, "groups": 4, **options})


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_parameter_counts_are_the_published_ones():
    network = ResNet26GN()
    parts = [network.stem, network.blocks, network.norm, network.hidden, network.head]
    assert [count(part) for part in parts] == [864, 1_461_312, 256, 32_768, 2_570]
    assert count(network) == 864 + 1_461_312 + 256 + 32_768 + 2_570


def test_twenty_six_layers_and_sixteen_groups():
    network = ResNet26GN()
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) + 1 == 26  # and the head; the hidden layer came later
    norms = [m for m in network.modules() if isinstance(m, nn.GroupNorm)]
    assert len(norms) == 25
    assert {(norm.num_groups, norm.eps) for norm in norms} == {(16, 1e-3)}


def test_shapes():
    network, images = small(num_classes=7), make_batches(1, 2)[0]
    assert network(images).shape == (2, 7)
    maps, shapes = network.stem(images), []
    for unit in network.blocks:
        maps = unit(maps)
        shapes.append(tuple(maps.shape[1:]))
    assert shapes == [(8, 32, 32)] * 4 + [(16, 16, 16)] * 4 + [(32, 8, 8)] * 4
    assert small(in_channels=1)(images[:, :1]).shape == (2, 10)


def test_weights_start_as_in_tensorflow():
    torch.manual_seed(0)
    network = ResNet26GN()
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            assert module.bias is None or not module.bias.any()
            weight, area = module.weight, math.prod(module.weight.shape[2:])
            bound = math.sqrt(6 / (area * (weight.shape[0] + weight.shape[1])))
            assert 0.95 * bound < weight.abs().max() <= bound
            # uniform: standard deviation bound / sqrt(3), within 5 of its own deviations
            slack = 5 / math.sqrt(weight.numel())
            assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=slack)
        if isinstance(module, nn.GroupNorm):
            assert torch.equal(module.weight, torch.ones_like(module.weight))
            assert not module.bias.any()
    assert network.stem.bias is None
    assert network.hidden.bias is None
    assert network.head.bias is not None


@pytest.mark.parametrize("unit", range(12))
def test_shortcuts(unit):
    network = small()
    block = network.blocks[unit]
    nn.init.zeros_(block.conv2.weight)  # the shortcut alone is left
    with torch.no_grad():
        block.norm1.bias.uniform_(-1, 1)
    inputs = torch.randn(2, block.norm1.num_channels, 8, 8)
    expected = inputs
    if unit == 0:
        expected = block.norm1(inputs).clamp(min=0)
    if unit in (4, 8):
        pooled = inputs.unflatten(3, (4, 2)).unflatten(2, (4, 2)).mean(dim=(3, 5))
        nothing = torch.zeros(2, inputs.shape[1] // 2, 4, 4)
        expected = torch.cat([nothing, pooled, nothing], dim=1)
    torch.testing.assert_close(block(inputs), expected)


@pytest.mark.parametrize("unit", [1, 4])
def test_the_residual_is_norm_relu_convolution_twice(unit):
    block = small().blocks[unit]
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    inputs = torch.randn(2, 8, 8, 8)

    def half(maps, norm, conv, stride):
        grouped = maps.reshape(2, 4, -1)
        std = (grouped.var(2, correction=0, keepdim=True) + 1e-3).sqrt()
        normal = ((grouped - grouped.mean(2, keepdim=True)) / std).view_as(maps)
        active = (normal * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)).clamp(min=0)
        return functional.conv2d(active, conv.weight, conv.bias, stride=stride, padding=1)

    residual = half(inputs, block.norm1, block.conv1, 1 if unit == 1 else 2)
    residual = half(residual, block.norm2, block.conv2, 1)
    found = block(inputs)
    if unit == 4:
        shortcut = functional.avg_pool2d(inputs, 2)
        residual[:, 4:12] += shortcut
    else:
        residual = residual + inputs
    torch.testing.assert_close(found, residual)


def test_the_end_is_norm_relu_mean_hidden_relu_head():
    network, images = small(), make_batches(1, 2)[0]
    nn.init.uniform_(network.norm.bias, -1, 1)
    nn.init.uniform_(network.head.bias, -1, 1)
    maps = network.norm(network.blocks(network.stem(images))).clamp(min=0)
    hidden = (maps.mean(dim=(2, 3)) @ network.hidden.weight.T).clamp(min=0)
    expected = hidden @ network.head.weight.T + network.head.bias
    torch.testing.assert_close(network(images), expected)


def test_images_of_a_batch_do_not_influence_each_other_in_any_mode():
    network, images = small(), make_batches(1, 3)[0]
    together = network.train()(images)
    alone = torch.cat([network(image[None]) for image in images])
    torch.testing.assert_close(together, alone)
    assert torch.equal(network.eval()(images), together)
    assert not list(network.buffers())


@pytest.mark.parametrize(("width", "groups"), [(16, 3), (8, 16), (0, 1), (16, 0), (-16, 8)])
def test_groups_that_do_not_divide_the_width(width, groups):
    with pytest.raises(InputError, match=f"width {width} with {groups} groups.*dividing"):
        ResNet26GN(width=width, groups=groups)


@pytest.mark.parametrize("sides", [(30, 32), (32, 30), (0, 32)])
def test_sides_that_cannot_be_halved_twice(sides):
    with pytest.raises(InputError, match=f"{sides[0]} x {sides[1]} px. Give sides that are mult"):
        ResNet26GN(width=16)(torch.zeros(1, 3, *sides))


def test_the_head_of_the_supervised_baseline_has_no_bias():
    network = ResNet26GN(head_bias=False)
    assert network.head.bias is None
    assert count(network) == 1_497_770 - 10
    assert len(list(network.parameters())) == 101
    assert len(list(ResNet26GN().parameters())) == 102
    features = torch.zeros(1, 256)
    assert not network.head(features).any()
    assert small(head_bias=False)(make_batches(1, 2)[0]).shape == (2, 10)
