import pytest
import torch
from torch import nn

from tta_lightning.errors import InputError
from tta_lightning.models import SmallConvNet


def test_layers_and_widths():
    network = SmallConvNet(num_classes=7, width=8)
    convs = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    assert [conv.out_channels for conv in convs] == [8, 8, 16, 16, 32, 32]
    # 9 * (3*8 + 8*8 + 8*16 + 16*16 + 16*32 + 32*32) convolution weights,
    # 2 * (8+8+16+16+32+32) norm weights, 32*7 + 7 of the head
    assert sum(p.numel() for p in network.parameters()) == 18072 + 224 + 231


@pytest.mark.parametrize(
    ("norm", "kind"), [("batch", nn.BatchNorm2d), ("group", nn.GroupNorm)], ids=["batch", "group"]
)
def test_norm_is_chosen(norm, kind):
    network = SmallConvNet(norm=norm, width=8)
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d | nn.GroupNorm)]
    assert [type(module) for module in norms] == [kind] * 6
    assert all(module.num_groups == 8 for module in norms if norm == "group")


@pytest.mark.parametrize("side", [28, 32, 48])
def test_second_convolution_of_each_pair_halves_the_side(side):
    network = SmallConvNet(width=8, in_channels=1).eval()
    images = torch.zeros(2, 1, side, side)
    assert network.blocks[:1](images).shape == (2, 8, side, side)
    assert network.blocks(images).shape == (2, 32, -(-side // 8), -(-side // 8))
    assert network(images).shape == (2, 10)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_samples_do_not_influence_each_other_in_eval_mode(norm):
    torch.manual_seed(0)
    network = SmallConvNet(norm=norm, width=8).eval()
    images = torch.rand(3, 3, 16, 16)
    alone = torch.cat([network(image[None]) for image in images])
    torch.testing.assert_close(network(images), alone)


def test_wrong_arguments_are_refused():
    with pytest.raises(InputError, match=r"Unknown norm of SmallConvNet 'grup'\. Did you mean"):
        SmallConvNet(norm="grup")
    with pytest.raises(InputError, match="multiple of 8 with GroupNorm"):
        SmallConvNet(norm="group", width=12)
    with pytest.raises(InputError, match="width 0"):
        SmallConvNet(width=0)
