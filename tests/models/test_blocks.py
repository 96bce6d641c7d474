"""Features after each block, against loops over blocks written by hand."""

import copy

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn import functional

from tests.networks import make_batches, make_network
from tta_lightning.errors import InputError
from tta_lightning.models import Classifier, ModelInfo, ResNet26GN, SmallConvNet
from tta_lightning.models.blocks import BlockFeatures

STAGES = [64, 64, 128, 128, 256, 256, 512, 512]  # of a ResNet-18


def disturbed(network):
    """Weights and biases of norms that differ from layer to layer, as training leaves them."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.dim() == 1 or "token" in name or "class" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return network.eval()


def timm_vit(**options):
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "depth": 3, "embed_dim": 48, "num_heads": 3}
    given = {**sizes, "num_classes": 5, **options}
    return disturbed(timm.create_model("vit_tiny_patch16_224", **given))


def torchvision_vit():
    torch.manual_seed(0)
    return disturbed(torchvision.models.VisionTransformer(32, 8, 3, 2, 32, 64, num_classes=5))


def features_of(network, images):
    with BlockFeatures(network).capture() as found:
        network(images)
    return found


def assert_equal_lists(found, expected):
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def timm_tokens(network, images):
    """Tokens [B, T, D] after each block, and the norm that comes next."""
    patches = network.patch_embed.proj(images).flatten(2).transpose(1, 2)
    token = network.cls_token
    if token is not None:
        patches = torch.cat([token.expand(len(images), -1, -1), patches], dim=1)
    tokens = patches + network.pos_embed
    norms = [network.blocks[1].norm1, network.blocks[2].norm1, network.norm]
    for block, norm in zip(network.blocks, norms, strict=True):
        tokens = tokens + block.attn(block.norm1(tokens))
        tokens = tokens + block.mlp(block.norm2(tokens))
        yield tokens, norm


def norm_by_hand(values, norm):
    centred = values - values.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    return centred / (variance + norm.eps).sqrt() * norm.weight + norm.bias


def hooks_of(network):
    return [
        hook
        for module in network.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    ]


def test_the_class_token_of_a_timm_transformer_goes_through_the_norm_that_comes_next():
    network, images = timm_vit(), make_batches(1, 3)[0]
    expected = [norm_by_hand(t[:, 0], norm) for t, norm in timm_tokens(network, images)]
    assert_equal_lists(features_of(network, images), expected)


def test_the_class_token_of_a_torchvision_transformer_goes_through_the_norm_that_comes_next():
    network, images = torchvision_vit(), make_batches(1, 3)[0]
    layers, expected = network.encoder.layers, []
    patches = network.conv_proj(images).flatten(2).transpose(1, 2)
    tokens = torch.cat([network.class_token.expand(3, -1, -1), patches], dim=1)
    tokens = tokens + network.encoder.pos_embedding
    norms = [layers[1].ln_1, layers[2].ln_1, network.encoder.ln]
    for layer, norm in zip(layers, norms, strict=True):
        normed = norm_by_hand(tokens, layer.ln_1)
        tokens = tokens + layer.self_attention(normed, normed, normed, need_weights=False)[0]
        tokens = tokens + layer.mlp(norm_by_hand(tokens, layer.ln_2))
        expected.append(norm_by_hand(tokens[:, 0], norm))
    assert_equal_lists(features_of(network, images), expected)


@pytest.mark.parametrize(
    ("make", "head"),
    [(timm_vit, "head"), (torchvision_vit, "heads.head")],
    ids=["timm", "torchvision"],
)
def test_the_last_features_of_a_transformer_are_those_of_its_head(make, head):
    network, images = make(), make_batches(1, 3)[0]
    last = features_of(network, images)[-1]
    torch.testing.assert_close(network.get_submodule(head)(last), network(images))


def test_without_a_class_token_it_is_the_mean_over_all_tokens():
    network = timm_vit(class_token=False, global_pool="avg", fc_norm=False)
    images = make_batches(1, 3)[0]
    expected = [norm_by_hand(t, norm).mean(1) for t, norm in timm_tokens(network, images)]
    assert_equal_lists(features_of(network, images), expected)


def test_a_base_transformer_has_as_many_features_as_the_published_statistics():
    with torch.device("meta"):  # no memory for its 86 million weights
        network = timm.create_model("vit_base_patch16_224")
        features = features_of(network, torch.empty(2, 3, 224, 224))
    assert [tuple(each.shape) for each in features] == [(2, 768)] * 12
    assert sum(each.shape[1] for each in features) == 9216


@pytest.mark.parametrize(
    "make",
    [
        lambda: torchvision.models.resnet18(num_classes=4),
        lambda: timm.create_model("resnet18", num_classes=4),
    ],
    ids=["torchvision", "timm"],
)
def test_residual_blocks_of_a_resnet(make):
    torch.manual_seed(0)
    network, images = make().eval(), make_batches(1, 2)[0]
    stem = network.conv1, network.bn1, nn.ReLU(), network.maxpool
    maps, expected = nn.Sequential(*stem)(images), []
    for stage in (network.layer1, network.layer2, network.layer3, network.layer4):
        for block in stage:
            maps = block(maps)
            expected.append(maps.mean(dim=(2, 3)))
    assert [each.shape[1] for each in expected] == STAGES
    found = features_of(network, images)
    assert_equal_lists(found, expected)
    assert all((each >= 0).all() for each in found)  # a block ends in a ReLU


def test_units_of_a_resnet26():
    torch.manual_seed(0)
    network, images = ResNet26GN(width=8, groups=4), make_batches(1, 2)[0]
    maps, expected = network.stem(images), []
    for unit in network.blocks:
        maps = unit(maps)
        expected.append(maps.mean(dim=(2, 3)))
    assert [each.shape[1] for each in expected] == [8] * 4 + [16] * 4 + [32] * 4
    assert_equal_lists(features_of(network, images), expected)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_triples_of_a_small_network_are_read_after_their_relu(norm):
    torch.manual_seed(0)
    network, images = SmallConvNet(norm=norm, width=8).eval(), make_batches(1, 2)[0]
    maps, expected = images, []
    for conv, normalise, relu in network.blocks:
        maps = relu(normalise(conv(maps)))
        expected.append(maps.mean(dim=(2, 3)))
    assert [each.shape[1] for each in expected] == [8, 8, 16, 16, 32, 32]
    found = features_of(network, images)
    assert_equal_lists(found, expected)
    assert all((each >= 0).all() for each in found)


def test_blocks_made_of_triples_are_not_opened():
    torch.manual_seed(0)
    settings = [[1, 8, 1, 1], [6, 16, 2, 2]]  # expansion, channels, units, stride
    network = torchvision.models.MobileNetV2(4, inverted_residual_setting=settings).eval()
    maps = images = make_batches(1, 2)[0]
    expected = []
    for block in network.features:
        maps = block(maps)
        expected.append(maps.mean(dim=(2, 3)))
    assert [each.shape[1] for each in expected] == [32, 8, 16, 16, 1280]
    assert_equal_lists(features_of(network, images), expected)


def test_stages_made_of_triples_are_opened():
    torch.manual_seed(0)

    def triple(inputs, outputs):
        conv = nn.Conv2d(inputs, outputs, 3)
        return nn.Sequential(conv, nn.GroupNorm(2, outputs), nn.ReLU())

    stages = [nn.Sequential(triple(3, 4), triple(4, 6)), nn.Sequential(triple(6, 8), triple(8, 10))]
    network = nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 3))
    maps = images = make_batches(1, 2)[0]
    expected = []
    for layer in (*stages[0], *stages[1]):
        maps = layer(maps)
        expected.append(maps.mean(dim=(2, 3)))
    assert_equal_lists(features_of(network, images), expected)


def test_of_a_flat_network_what_enters_each_weighted_layer_but_the_first():
    network, images = make_network("bn").eval(), make_batches(1, 2)[0]
    expected = [network[:3](images).mean(dim=(2, 3)), network[:8](images)]
    assert [each.shape[1] for each in expected] == [8, 64]
    assert_equal_lists(features_of(network, images), expected)


def test_maps_with_the_channels_last():
    torch.manual_seed(0)
    sizes = {"embed_dim": 16, "depths": (1, 1, 2), "num_heads": (1, 2, 4)}
    network = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, num_classes=4, **sizes
    ).eval()
    images = make_batches(1, 2)[0]
    maps, expected = network.patch_embed(images), []
    for stage in network.layers:
        maps = stage.downsample(maps)
        for block in stage.blocks:
            maps = block(maps)
            expected.append(maps.mean(dim=(1, 2)))
    assert [each.shape[1] for each in expected] == [16, 32, 64, 64]
    assert_equal_lists(features_of(network, images), expected)


def test_maps_with_the_channels_last_that_are_as_high_as_wide_as_deep():
    torch.manual_seed(0)
    sizes = {"embed_dim": 16, "depths": (1,), "num_heads": (1,)}
    network = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=64, window_size=4, num_classes=4, **sizes
    ).eval()
    images = torch.rand(2, 3, 64, 64)
    maps = network.layers(network.patch_embed(images))
    assert maps.shape == (2, 16, 16, 16)
    assert_equal_lists(features_of(network, images), [maps.mean(dim=(1, 2))])


@pytest.mark.parametrize("name", ["xcit_nano_12_p16_224", "cait_xxs24_224"])
def test_a_class_token_that_joins_after_the_blocks_is_not_read_in_them(name):
    options = {"embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 4}
    network = timm.create_model(name, img_size=32, **options).eval()
    assert not BlockFeatures(network).reads_class_token
    found = features_of(network, make_batches(1, 2)[0])
    assert [each.shape[1] for each in found][-2:] == [16, 16]


def test_maps_of_convnext_have_the_channels_first():
    torch.manual_seed(0)
    network = timm.create_model("convnext_atto", depths=(1, 1, 2, 1), num_classes=4).eval()
    images = make_batches(1, 2)[0]
    maps, expected = network.stem(images), []
    for stage in network.stages:
        maps = stage.downsample(maps)
        for block in stage.blocks:
            maps = block(maps)
            expected.append(maps.mean(dim=(2, 3)))
    assert [each.shape[1] for each in expected] == [40, 80, 160, 160, 320]
    assert_equal_lists(features_of(network, images), expected)


def test_a_classifier_is_looked_into():
    inner, images = timm_vit(), make_batches(1, 3)[0]
    info = ModelInfo("vit", mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    expected = features_of(inner, (images - 0.5) / 0.25)
    assert_equal_lists(features_of(Classifier(inner, info), images), expected)


def test_each_forward_pass_adds_to_the_list_and_keeps_its_graph():
    network, images = make_network("gn"), make_batches(1, 2)[0]
    with BlockFeatures(network).capture() as found:
        network(images)
        network(images)
    assert [each.shape[1] for each in found] == [8, 64, 8, 64]
    (grad,) = torch.autograd.grad(found[0].sum(), network[1].bias)
    active = (network[:2](images) > 0).sum(dim=(0, 2, 3))  # by the slope of the ReLU
    torch.testing.assert_close(grad, active / 30**2)


@pytest.mark.parametrize("make", [timm_vit, lambda: make_network("bn")], ids=["blocks", "inputs"])
def test_no_hook_stays_also_after_an_exception(make):
    network = make()
    blocks = BlockFeatures(network)
    with blocks.capture():
        assert len(hooks_of(network)) == len(blocks.modules)
    assert hooks_of(network) == []
    with pytest.raises(RuntimeError, match="stop"), blocks.capture():
        raise RuntimeError("stop")
    assert hooks_of(network) == []


def test_a_copy_made_meanwhile_does_not_disturb():
    network, images = timm_vit(), make_batches(2, 3)
    expected = features_of(network, images[0])
    with BlockFeatures(network).capture() as found:
        twin = copy.deepcopy(network)
        twin(images[1])
        assert found == []
        network(images[0])
        twin(images[1])
    assert_equal_lists(found, expected)


def test_a_network_without_blocks():
    network = nn.Sequential(nn.GroupNorm(1, 3), nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    with pytest.raises(InputError, match=r"Sequential has no blocks .*Use a deeper network"):
        BlockFeatures(network)


def test_a_block_that_gives_no_tensor():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.GroupNorm(1, 3)

        def forward(self, images):
            return images, self.norm(images)

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Pair()])

        def forward(self, images):
            return functional.adaptive_avg_pool2d(self.blocks[0](images)[1], 1).flatten(1)

    with pytest.raises(InputError, match=r"block \(Pair\) of .*Network gives no tensor \[B"):
        features_of(Network(), make_batches(1, 2)[0])
