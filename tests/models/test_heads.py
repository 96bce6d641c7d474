import copy
import warnings

import pytest
import timm
import torch
import torchvision
from torch import nn

from tta_lightning.errors import InputError
from tta_lightning.models import (
    Classifier,
    ModelInfo,
    SmallConvNet,
    capture_features,
    find_head,
)

TIMM = [  # model, side in px, where timm keeps the head
    ("resnet18", 32, "fc"),
    ("vit_tiny_patch16_224", 224, "head"),
    ("convnext_atto", 32, "head.fc"),
    ("efficientnet_lite0", 32, "classifier"),
    ("resnetv2_50", 32, "head.fc"),
]
TORCHVISION = [
    ("resnet18", 32, "fc"),
    ("efficientnet_b0", 32, "classifier.1"),
    ("mobilenet_v3_small", 32, "classifier.3"),
    ("densenet121", 32, "classifier"),
]


def check_head(network, name, images):
    """The head's map of the captured features must be the network's logits."""
    network.eval()
    head = find_head(network)
    assert head.name == name
    assert network.get_submodule(name) is head.module
    with torch.no_grad(), capture_features(head) as captured:
        logits = network(images)
    expected = captured.features @ head.weight.T
    if head.bias is not None:
        expected = expected + head.bias
    assert captured.features.dim() == 2
    torch.testing.assert_close(expected, logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("model", "side", "name"), TIMM, ids=[row[0] for row in TIMM])
def test_heads_of_timm_models(model, side, name):
    torch.manual_seed(0)
    network = timm.create_model(model, num_classes=7)
    check_head(network, name, torch.rand(2, 3, side, side))


def test_features_are_what_timm_calls_pre_logits():
    network = timm.create_model("convnext_atto", num_classes=7).eval()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad(), capture_features(find_head(network)) as captured:
        network(images)
        expected = network.forward_head(network.forward_features(images), pre_logits=True)
    torch.testing.assert_close(captured.features, expected)


@pytest.mark.parametrize(
    ("model", "side", "name"), TORCHVISION, ids=[row[0] for row in TORCHVISION]
)
def test_heads_of_torchvision_models(model, side, name):
    torch.manual_seed(0)
    network = torchvision.models.get_model(model, weights=None, num_classes=7)
    check_head(network, name, torch.rand(2, 3, side, side))


def test_head_of_a_torchvision_transformer():
    network = torchvision.models.VisionTransformer(32, 16, 1, 2, 8, 16, num_classes=7)
    nn.init.normal_(network.heads.head.weight)
    check_head(network, "heads.head", torch.rand(2, 3, 32, 32))


def mlp(*layers):
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), *layers)


@pytest.mark.parametrize(
    ("network", "name"),
    [
        (mlp(nn.Linear(5, 4)), "3"),
        (mlp(nn.Linear(5, 4, bias=False)), "3"),
        (mlp(nn.Linear(5, 4), nn.Dropout(), nn.Identity()), "3"),
        (nn.Sequential(nn.Identity(), mlp(nn.Linear(5, 4))), "1.3"),
        (Classifier(mlp(nn.Linear(5, 4)), ModelInfo("mlp", std=(0.5, 0.5, 0.5))), "network.3"),
        (mlp(nn.utils.parametrizations.weight_norm(nn.Linear(5, 4))), "3"),
        (mlp(nn.utils.parametrizations.spectral_norm(nn.Linear(5, 4))), "3"),
    ],
    ids=["plain", "no bias", "dropout", "nested", "classifier", "weight norm", "spectral norm"],
)
def test_heads_of_own_networks(network, name):
    check_head(network, name, torch.rand(2, 3, 2, 2))


def test_head_of_the_small_network():
    check_head(SmallConvNet(width=8), "head", torch.rand(2, 3, 16, 16))


def test_last_linear_layer_is_taken_where_nothing_is_named():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(12, 5)
            self.norm = nn.LayerNorm(5)
            self.linear = nn.Linear(5, 4)

        def forward(self, images):
            return self.linear(self.norm(self.first(images.flatten(1))))

    check_head(Net(), "linear", torch.rand(2, 3, 2, 2))


def test_named_head_wins_over_a_later_linear_layer():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(12, 4)
            self.projector = nn.Linear(12, 9)

        def forward(self, images):
            return self.fc(images.flatten(1))

    check_head(Net(), "fc", torch.rand(2, 3, 2, 2))


def test_convolution_as_a_head():
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 4, 1), nn.Flatten())
    head = find_head(network)
    assert head.weight.shape == (4, 3)
    check_head(network, "1", torch.rand(2, 3, 5, 5))


def quantised_mlp():
    network = mlp(nn.Linear(5, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces the end of this kind of layer
        network[3] = torch.ao.nn.quantized.dynamic.Linear(5, 4)
    return network


def integer_mlp():
    layer = nn.Linear(5, 4)
    layer.weight = nn.Parameter(torch.zeros(4, 5, dtype=torch.int8), requires_grad=False)
    return mlp(layer)


@pytest.mark.parametrize(
    ("build", "found"),
    [
        (lambda: timm.create_model("deit_tiny_distilled_patch16_224"), r"2 heads \(Linear, Linear"),
        (lambda: timm.create_model("resnet18", num_classes=0), "Identity"),
        (lambda: torchvision.models.squeezenet1_1(), "AdaptiveAvgPool2d"),
        (lambda: mlp(nn.Linear(5, 4), nn.BatchNorm1d(4)), "BatchNorm1d"),
        (lambda: mlp(nn.Conv2d(5, 4, 3)), r"Conv2d with kernel \(3, 3\)"),
        (lambda: mlp(nn.Conv2d(4, 4, 1, groups=2)), r"Conv2d with kernel \(1, 1\) and 2 groups"),
        (lambda: nn.Sequential(), "Sequential"),
        (quantised_mlp, "quantised Linear"),
        (integer_mlp, "quantised Linear"),
    ],
    ids=[
        "two heads",
        "none",
        "pooled",
        "norm behind",
        "3x3",
        "grouped",
        "empty",
        "quantised",
        "integers",
    ],
)
def test_networks_without_a_single_linear_head_are_refused(build, found):
    with pytest.raises(InputError, match=f"has no single linear head: found (a )?{found}"):
        find_head(build())


def test_refusal_names_the_model():
    network = Classifier(nn.ReLU(), ModelInfo(name="timm:odd"))
    with pytest.raises(InputError, match="The network timm:odd has no single linear head"):
        find_head(network)


def test_weight_is_detached_and_follows_the_layer():
    layer = nn.Linear(3, 2)
    head = find_head(nn.Sequential(layer))
    layer.weight.data.fill_(2.0)
    assert head.weight.tolist() == [[2.0] * 3] * 2
    assert not head.weight.requires_grad
    assert not head.bias.requires_grad


def test_reading_a_spectral_norm_weight_changes_nothing():
    network = mlp(nn.utils.parametrizations.spectral_norm(nn.Linear(5, 4)))
    head = find_head(network.train())
    before = copy.deepcopy(network.state_dict())
    first, second = head.weight, head.weight
    assert torch.equal(first, second)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(module.training for module in network.modules())


def test_features_keep_their_graph():
    network = mlp(nn.Linear(5, 4))
    with capture_features(find_head(network)) as captured:
        network(torch.rand(2, 3, 2, 2))
    captured.features.sum().backward()
    assert network[1].weight.grad is not None
    assert network[3].weight.grad is None


def test_last_forward_pass_counts():
    network = nn.Sequential(nn.Flatten(), nn.Linear(3, 2))
    with capture_features(find_head(network)) as captured:
        network(torch.zeros(1, 3, 1, 1))
        network(torch.full((1, 3, 1, 1), 5.0))
    assert captured.features.tolist() == [[5.0, 5.0, 5.0]]


def test_hook_is_gone_after_the_block_even_after_an_error():
    network = nn.Sequential(nn.Linear(3, 2))
    layer = network[0]

    def fail():
        with capture_features(layer):
            assert len(layer._forward_pre_hooks) == 1
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert len(layer._forward_pre_hooks) == 0


def test_copies_inside_the_block_do_not_disturb_the_capture():
    network = nn.Sequential(nn.Flatten(), nn.Linear(3, 2))
    with capture_features(find_head(network)) as captured:
        network(torch.ones(1, 3, 1, 1))
        copy.deepcopy(network)(torch.zeros(1, 3, 1, 1))
        assert captured.features.tolist() == [[1.0, 1.0, 1.0]]
    copy.deepcopy(network)(torch.zeros(1, 3, 1, 1))


def test_misuse_of_the_capture_is_explained():
    network = nn.Sequential(nn.Linear(3, 2))
    with (
        capture_features(network[0]) as captured,
        pytest.raises(InputError, match="No features were captured"),
    ):
        _ = captured.features
    with (
        capture_features(network[0]),
        pytest.raises(InputError, match=r"shape \[2, 5, 3\]; expected one feature vector"),
    ):
        network(torch.zeros(2, 5, 3))
