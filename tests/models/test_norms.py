"""Which normalisation layers lie in the last quarter of a network, and when one is warned."""

import copy
import warnings
from itertools import pairwise

import pytest
import timm
import torch
import torchvision
from torch import nn

from tests.networks import LayerNormNet, golden_network
from tta_lightning.models import Classifier, ModelInfo, ResNet26GN, SmallConvNet
from tta_lightning.models.norms import (
    batch_norm_layers,
    fix_upper_norms,
    norm_layers,
    upper_norm_layers,
    use_batch_statistics,
    use_group_norm,
    without_advice,
)


def timm_vit(**options):
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "num_heads": 3, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", pretrained=False, **{**sizes, **options})


def timm_network(name):
    return timm.create_model(name, pretrained=False, num_classes=5)


def stages(*widths):
    """A stage of one block for each width; the network has one norm more before them."""
    blocks = [
        nn.Sequential(nn.Sequential(nn.Conv2d(before, after, 3), nn.BatchNorm2d(after)))
        for before, after in pairwise((8, *widths))
    ]
    return nn.Sequential(nn.BatchNorm2d(8), *blocks)


def torchvision_network(name):
    return torchvision.models.get_model(name, weights=None)


# What SAR's published code leaves fixed: layer4, blocks 9 to 11 and the final norm.
RESNET50 = {f"layer4.{block}.bn{i}" for block in range(3) for i in (1, 2, 3)}
VIT = {f"blocks.{block}.norm{i}" for block in (9, 10, 11) for i in (1, 2)} | {"norm"}


@pytest.mark.parametrize("name", ["resnet50", "resnet50_gn"])
def test_resnet50_of_timm(name):
    assert upper_norm_layers(timm_network(name)) == RESNET50 | {"layer4.0.downsample.1"}


def test_resnet18_of_torchvision():
    blocks = {f"layer4.{block}.bn{i}" for block in range(2) for i in (1, 2)}
    upper = upper_norm_layers(torchvision_network("resnet18"))
    assert upper == blocks | {"layer4.0.downsample.1"}


def test_vision_transformer_of_timm():
    assert upper_norm_layers(timm_vit()) == VIT


def test_vision_transformer_of_torchvision():
    network = torchvision.models.VisionTransformer(32, 8, 12, 2, 32, 64, num_classes=5)
    layers = [f"encoder.layers.encoder_layer_{block}" for block in (9, 10, 11)]
    expected = {f"{layer}.ln_{i}" for layer in layers for i in (1, 2)} | {"encoder.ln"}
    assert upper_norm_layers(network) == expected


@pytest.mark.parametrize(
    ("depth", "fixed"), [(3, []), (4, [3]), (8, [6, 7]), (14, [11, 12, 13]), (24, range(18, 24))]
)
def test_a_quarter_of_the_blocks(depth, fixed):
    upper = upper_norm_layers(timm_vit(depth=depth))
    assert upper == {f"blocks.{block}.norm{i}" for block in fixed for i in (1, 2)} | {"norm"}


def test_norms_inside_attention_count_as_their_block():
    upper = upper_norm_layers(timm_vit(depth=4, qk_norm=True))
    inside = {"blocks.3.attn.q_norm", "blocks.3.attn.k_norm"}
    assert upper == {"blocks.3.norm1", "blocks.3.norm2", "norm"} | inside


def test_a_transformer_of_torch():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    network = nn.Sequential(nn.TransformerEncoder(layer, 4), nn.LayerNorm(16), nn.Linear(16, 5))
    assert upper_norm_layers(network) == {"0.layers.3.norm1", "0.layers.3.norm2", "1"}


def test_blocks_are_of_one_class_and_their_norms_over_tokens():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    embedding = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16))
    network = nn.Sequential(embedding, nn.TransformerEncoder(layer, 4))
    assert upper_norm_layers(network) == {"1.layers.3.norm1", "1.layers.3.norm2"}
    chain = [nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)) for _ in range(8)]
    assert upper_norm_layers(nn.Sequential(*chain)) == set()


@pytest.mark.parametrize(
    ("make", "name", "first", "count"),
    [
        (timm_network, "convnext_atto", "stages.3.downsample.0", 4),
        (timm_network, "regnety_002", "s4.b1.conv1.bn", 22),
        (timm_network, "swin_tiny_patch4_window7_224", "layers.3.downsample.norm", 6),
        (torchvision_network, "convnext_tiny", "features.6.0", 5),
        (torchvision_network, "regnet_y_400mf", "trunk_output.block4.block4-0.proj.1", 19),
        (torchvision_network, "densenet121", "features.transition3.norm", 34),
    ],
)
def test_other_networks_of_four_stages(make, name, first, count):
    network = make(name)
    in_order = list(norm_layers(network))
    upper = upper_norm_layers(network)
    assert upper == set(in_order[-count:])
    assert in_order[-count] == first


def test_names_carry_the_wrapper_of_the_network():
    network = Classifier(timm_vit(), ModelInfo("vit"))
    assert upper_norm_layers(network) == {f"network.{name}" for name in VIT}


def test_four_stages_are_four_that_grow_and_make_up_the_network():
    assert upper_norm_layers(stages(8, 16, 32, 64)) == {"4.0.1"}
    assert upper_norm_layers(stages(8, 16, 16, 32)) == {"4.0.1"}
    for widths in ((8, 8, 8, 8), (8, 32, 16, 64), (8, 16, 32), (8, 16, 32, 64, 128)):
        assert upper_norm_layers(stages(*widths)) == set()
    larger = nn.Sequential(SmallConvNet(), stages(8, 16, 32, 64))
    assert upper_norm_layers(larger) == set()


@pytest.mark.parametrize(
    "make",
    [
        SmallConvNet,
        ResNet26GN,
        LayerNormNet,
        golden_network,
        lambda: timm_network("mobilenetv3_small_050"),
        lambda: nn.Linear(3, 2),
    ],
)
def test_none_where_the_network_is_neither(make):
    assert upper_norm_layers(make()) == set()


def test_the_upper_norms_no_longer_move():
    network = stages(8, 16, 32, 64)
    fix_upper_norms(network)
    fixed = {name for name, p in network.named_parameters() if not p.requires_grad}
    assert fixed == {"4.0.1.weight", "4.0.1.bias"}


class TestWithoutAdvice:
    def warns(self, network):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            network(torch.rand(1, 3, 32, 32))
        return [str(each.message).partition(":")[0] for each in caught]

    def network(self):
        network = golden_network()
        use_batch_statistics(batch_norm_layers(network).values())
        return network

    @pytest.mark.parametrize("copied", [False, True])
    def test_a_single_image_is_warned_of_once_and_outside(self, copied):
        network = copy.deepcopy(self.network()) if copied else self.network()
        layers = batch_norm_layers(network).values()
        with without_advice(layers):
            assert self.warns(network) == []
        assert self.warns(network) == ["Batch statistics of a single image"]
        assert self.warns(network) == []
        with without_advice(layers):
            assert self.warns(network) == []
        assert self.warns(network) == []

    def test_an_error_inside_does_not_silence_later_warnings(self):
        network = self.network()
        with (
            pytest.raises(RuntimeError, match="of the user's"),
            without_advice(batch_norm_layers(network).values()),
        ):
            raise RuntimeError("of the user's")
        assert self.warns(network) == ["Batch statistics of a single image"]


class TestUseGroupNorm:
    @pytest.mark.parametrize(
        ("channels", "groups"),
        [(64, 16), (48, 4), (24, 2), (7, 1), (32, 8), (96, 8), (128, 32), (256, 32)],
    )
    def test_equals_the_formula(self, channels, groups):
        torch.manual_seed(0)
        layer = nn.BatchNorm2d(channels, eps=1e-2)
        nn.init.uniform_(layer.weight, 0.5, 2)
        nn.init.uniform_(layer.bias, -1, 1)
        weight, bias = layer.weight, layer.bias
        network = nn.Sequential(nn.Identity(), layer)
        use_group_norm(network)
        inputs = torch.randn(3, channels, 4, 5)
        parts = inputs.reshape(3, groups, -1)
        mean, var = parts.mean(2, keepdim=True), parts.var(2, keepdim=True, correction=0)
        normal = ((parts - mean) / (var + 1e-2).sqrt()).view_as(inputs)
        expected = normal * weight.view(-1, 1, 1) + bias.view(-1, 1, 1)
        torch.testing.assert_close(network(inputs), expected)
        assert (network[1].weight, network[1].bias) == (weight, bias)

    def test_vectors_keep_what_they_say(self):
        network = nn.Sequential(nn.Linear(4, 32), nn.BatchNorm1d(32))
        use_group_norm(network)
        vectors = torch.randn(5, 32)
        normal = (vectors - vectors.mean(1, keepdim=True)) / vectors.std(
            1, keepdim=True, correction=0
        )
        torch.testing.assert_close(network[1](vectors), normal, rtol=1e-3, atol=1e-3)
        assert network[1](torch.randn(5, 32, 6)).shape == (5, 32, 6)

    def test_dropout_and_activation_still_follow(self):
        layer = timm.layers.BatchNormAct2d(8, act_layer=nn.SiLU, drop_layer=nn.Dropout)
        plain = timm.layers.BatchNormAct2d(8, apply_act=False)
        network = nn.Sequential(layer, plain).eval()
        drop, act = layer.drop, layer.act
        use_group_norm(network)
        group, *followers = network[0]
        assert isinstance(group, nn.GroupNorm)
        assert followers == [drop, act]
        assert isinstance(network[1], nn.GroupNorm)
        inputs = torch.randn(2, 8, 4, 4)
        torch.testing.assert_close(network[0](inputs), nn.functional.silu(group(inputs)))
        assert not any(module.training for module in network[0])

    def test_a_layer_in_two_places_stays_one(self):
        shared = nn.BatchNorm2d(8)
        network = nn.Sequential(shared, nn.Sequential(nn.Conv2d(8, 8, 1), shared))
        use_group_norm(network)
        assert isinstance(network[0], nn.GroupNorm)
        assert network[1][1] is network[0]

    def test_without_affine_and_without_batch_norm(self):
        network = nn.Sequential(nn.BatchNorm2d(8, affine=False), nn.LayerNorm(4))
        norm = network[1]
        use_group_norm(network)
        assert network[0].weight is None
        assert network[1] is norm
        assert batch_norm_layers(network) == {}
