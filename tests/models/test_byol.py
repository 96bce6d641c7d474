"""BYOL heads: the published network to the parameter, any backbone, and the way to a checkpoint."""

import copy
import math
import re
from collections import Counter

import pytest
import timm
import torch
import torchvision
from torch import nn

from tests.models.test_loading import write_checkpoint
from tests.networks import LayerNormNet, make_batches, make_network
from tta_lightning.errors import InputError
from tta_lightning.methods import Tent
from tta_lightning.models import (
    BYOLHeads,
    Embedder,
    ResNet26GN,
    SmallConvNet,
    checkpoint_record,
    describe,
    find_head,
    load_model,
    sources,
    weights_hash,
)
from tta_lightning.models.byol import find_byol_heads
from tta_lightning.models.norms import batch_norm_layers
from tta_lightning.rules import SGD

HEADS = "tta_lightning.models.BYOLHeads"
SMALL = {"spec": "tta_lightning.models.ResNet26GN", "width": 4, "groups": 2}
SIZES = {"hidden": 8, "projection": 6}
IMAGES = make_batches(1, 3)[0]


def with_heads(backbone, **options):
    torch.manual_seed(5)
    return BYOLHeads(backbone, **{**SIZES, **options})


def vit():
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "num_heads": 3, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", pretrained=False, depth=2, **sizes)


def convnext():
    block = torchvision.models.convnext.CNBlockConfig
    layers = [block(8, 16, 1), block(16, None, 1)]
    return torchvision.models.convnext.ConvNeXt(layers, num_classes=5)


def torchvision_vit():
    return torchvision.models.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=5)


def timm_network(name):
    return timm.create_model(name, pretrained=False, num_classes=5)


def saved(path, **options):
    """A small trained backbone on disk, with names of its classes."""
    torch.manual_seed(3)
    network = load_model({**SMALL, "num_classes": 4, **options})
    return network, write_checkpoint(path, network, class_names=["ant", "bee", "cat", "dog"])


class TestPublished:
    network = BYOLHeads(ResNet26GN())

    def test_tensors_and_parameters(self):
        backbone = self.network.backbone
        parts = [
            *(backbone.stem, backbone.blocks, backbone.norm, backbone.hidden, backbone.head),
            *(self.network.projector, self.network.predictor),
        ]
        counts = [sum(p.numel() for p in part.parameters()) for part in parts]
        assert counts == [864, 1_461_312, 256, 32_768, 2_570, 98_688, 65_920]
        assert len(list(self.network.parameters())) == 110
        assert sum(p.numel() for p in self.network.parameters()) == 1_662_378
        assert not list(self.network.buffers())

    def test_every_shape(self):
        expected = [(32, 3, 3, 3)]
        for stage, width in enumerate((32, 64, 128)):
            for unit in range(4):
                inputs = width // 2 if stage and not unit else width
                expected += [(inputs,)] * 2 + [(width, inputs, 3, 3), (width,)]
                expected += [(width,)] * 2 + [(width, width, 3, 3), (width,)]
        expected += [(128,)] * 2 + [(256, 128), (10, 256), (10,)]
        expected += [(256, 256), (256,), (128, 256), (128,)]  # projector
        expected += [(256, 128), (256,), (128, 256), (128,)]  # predictor
        assert Counter(tuple(p.shape) for p in self.network.parameters()) == Counter(expected)
        for part, shapes in (
            (self.network.projector, expected[-8:-4]),
            (self.network.predictor, expected[-4:]),
        ):
            assert [tuple(p.shape) for p in part.parameters()] == shapes
            assert [type(layer) for layer in part] == [nn.Linear, nn.ReLU, nn.Linear]

    @pytest.mark.parametrize("part", ["projector", "predictor"])
    def test_heads_start_as_in_tensorflow(self, part):
        for layer in getattr(self.network, part)[::2]:
            bound = math.sqrt(6 / sum(layer.weight.shape))
            assert 0.99 * bound < layer.weight.abs().max() <= bound
            assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
            assert not layer.bias.any()


@pytest.mark.parametrize(
    ("make", "head"),
    [
        (lambda: make_network("gn"), "8"),
        (LayerNormNet, "head"),
        (vit, "head"),
        (torchvision_vit, "heads.head"),
        (convnext, "classifier.2"),
        (lambda: timm.create_model("resnet50_gn", pretrained=False, num_classes=5), "fc"),
    ],
)
def test_heads_stand_on_any_backbone(make, head):
    torch.manual_seed(0)
    backbone = make().eval()
    expected = backbone(IMAGES)
    network = with_heads(backbone)
    assert torch.equal(network(IMAGES), expected)
    assert find_head(network).name == f"backbone.{head}"
    out = Embedder(network)(IMAGES)
    assert torch.equal(out.logits, expected)
    found = find_head(network)
    torch.testing.assert_close(out.features @ found.weight.T + found.bias, expected)
    first, _, last = network.projector
    by_hand = (out.features @ first.weight.T + first.bias).clamp(min=0) @ last.weight.T + last.bias
    torch.testing.assert_close(out.projections, by_hand)
    first, _, last = network.predictor
    by_hand = (by_hand @ first.weight.T + first.bias).clamp(min=0) @ last.weight.T + last.bias
    torch.testing.assert_close(out.predictions, by_hand)
    assert out.predictions.shape == (3, 6)


def test_what_self_supervision_moves():
    network = with_heads(make_network("gn"))
    embedder = Embedder(network)
    names = {name for name, _ in network.named_parameters()}
    head = {"backbone.8.weight", "backbone.8.bias"}
    assert {name.removeprefix("network.") for name in embedder.adapted()} == names - head
    assert [n for n, _ in embedder.named_parameters()] == [
        f"network.{n}" for n, _ in network.named_parameters()
    ]
    assert embedder.head.name == "backbone.8"


def test_an_embedder_finds_heads_inside_a_classifier():
    network = load_model(with_heads(make_network("gn")), mean=(0.5, 0.5, 0.5))
    out = Embedder(network)(IMAGES)
    assert torch.equal(out.logits, network(IMAGES))
    assert find_byol_heads(network) is network.network


@pytest.mark.parametrize("name", ["hidden", "projection"])
@pytest.mark.parametrize("width", [0, -3])
def test_widths_out_of_range(name, width):
    with pytest.raises(InputError, match=f"{name} = {width} is out of range: expected 1 or more"):
        BYOLHeads(make_network("gn"), **{name: width})


def test_options_that_are_misspelt():
    with pytest.raises(InputError, match=r"batch_norm.*'grup'.*group"):
        BYOLHeads(make_network("gn"), batch_norm="grup")


def test_a_backbone_without_linear_head():
    with pytest.raises(InputError, match="no single linear head"):
        BYOLHeads(
            timm.create_model("resnet10t", pretrained=False, num_classes=0), batch_norm="group"
        )


def test_heads_upon_heads():
    with pytest.raises(InputError, match=r"^BYOLHeads.*has BYOL heads already, which new ones"):
        BYOLHeads(BYOLHeads(make_network("gn")))


def test_a_network_without_heads():
    with pytest.raises(InputError, match=r"SmallConvNet has no BYOL heads.*wrap it") as caught:
        find_byol_heads(SmallConvNet(width=8))
    example = re.search(r"\{spec: .*\}\}", str(caught.value))[0]
    assert HEADS in example


class TestBatchNorm:
    def test_is_refused_with_the_reason(self):
        with pytest.raises(
            InputError,
            match=r"Sequential has 2 batch normalisation layers, the first of them '1'.*"
            r"views of one image.*ResNet26GN.*batch_norm: group",
        ):
            with_heads(make_network("bn"))

    @pytest.mark.parametrize("name", ["resnet10t", "test_efficientnet", "mobilenetv3_small_050"])
    def test_becomes_group_norm_that_trains(self, name):
        torch.manual_seed(0)
        backbone = timm_network(name)
        layers = batch_norm_layers(backbone)
        inside = {n: dict(m.named_children()).get("act") for n, m in layers.items()}
        affine = {n: (m.weight, m.bias) for n, m in layers.items()}
        network = with_heads(backbone, batch_norm="group")
        assert not batch_norm_layers(network)
        assert network.backbone is backbone
        for layer, act in inside.items():
            exchanged = backbone.get_submodule(layer)
            group = exchanged[0] if isinstance(exchanged, nn.Sequential) else exchanged
            assert isinstance(group, nn.GroupNorm)
            assert (group.weight, group.bias) == affine[layer]
            keeps = act is not None and not isinstance(act, nn.Identity)
            assert (isinstance(exchanged, nn.Sequential) and exchanged[-1] is act) == keeps
        network.eval()
        logits = network(IMAGES)
        assert logits.shape == (3, 5)
        alone = torch.cat([network(image[None]) for image in IMAGES])
        torch.testing.assert_close(logits, alone, rtol=1e-3, atol=1e-3)
        network.train()
        loss = nn.functional.cross_entropy(network(IMAGES), torch.tensor([0, 1, 2]))
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in backbone.parameters())
        assert describe(network).spec is None

    def test_all_batch_norm_of_torchvision_goes(self):
        network = with_heads(torchvision.models.resnet18(num_classes=5), batch_norm="group")
        assert network.eval()(IMAGES).shape == (3, 5)
        groups = [m.num_groups for m in network.modules() if isinstance(m, nn.GroupNorm)]
        assert groups == [16] * 5 + [32] * 15  # four channels each at least


class TestLoading:
    def test_a_mapping_inside_a_mapping(self, tmp_path):
        torch.manual_seed(1)
        network = load_model({"spec": HEADS, "backbone": {**SMALL, "num_classes": 7}, **SIZES})
        assert network.info.num_classes == 7
        assert find_head(network).name == "network.backbone.network.head"
        path = write_checkpoint(tmp_path / "c.ckpt", network, class_names=list("abcdefg"))
        again = load_model(path)
        assert torch.equal(again(IMAGES), network(IMAGES))
        assert torch.equal(Embedder(again)(IMAGES)[3], Embedder(network)(IMAGES)[3])
        assert weights_hash(again) == weights_hash(network)
        assert again.info.class_names == tuple("abcdefg")
        record = checkpoint_record(again)
        assert record == checkpoint_record(network, class_names=list("abcdefg"))
        arguments = record["network"]["init_args"]
        assert {k: arguments[k] for k in SIZES} == SIZES
        assert arguments["backbone"]["init_args"] == {"width": 4, "groups": 2}

    def test_heads_that_were_made_by_hand(self, tmp_path):
        network = with_heads({**SMALL, "num_classes": 7})
        assert describe(network).name == "BYOLHeads(tta_lightning.models.ResNet26GN)"
        again = load_model(write_checkpoint(tmp_path / "c.ckpt", network))
        assert torch.equal(again(IMAGES), network.eval()(IMAGES))

    def test_backbones_that_are_objects_cannot_be_rebuilt(self):
        network = with_heads(make_network("gn"))
        assert describe(network).spec is None
        assert checkpoint_record(network)["network"] is None
        wrapped = load_model(HEADS, backbone=make_network("gn"))
        assert checkpoint_record(wrapped)["network"] is None

    def test_a_pretrained_backbone_is_downloaded_once(self, tmp_path, monkeypatch):
        fetched = []

        def pretrained(name, options):
            fetched.append(name)
            return sources._new_timm(name, options)

        monkeypatch.setattr(sources, "_pretrained_timm", pretrained)
        spec = {"spec": "timm:resnet10t.c3_in1k", "num_classes": 5}
        network = load_model({"spec": HEADS, "backbone": spec, "batch_norm": "group", **SIZES})
        assert fetched == ["resnet10t.c3_in1k"]
        assert network.info.spec["init_args"]["backbone"]["pretrained"] is True
        backbone = checkpoint_record(network)["network"]["init_args"]["backbone"]
        assert backbone["pretrained"] is False
        again = load_model(write_checkpoint(tmp_path / "c.ckpt", network))
        assert len(fetched) == 1
        assert torch.equal(again(IMAGES), network(IMAGES))
        assert not batch_norm_layers(again)
        # the backbone normalises images, and nobody else does
        assert again.info.mean == (0.0, 0.0, 0.0)
        inner = again.network.backbone
        assert inner.info.mean == pytest.approx((0.485, 0.456, 0.406))
        assert torch.equal(again(IMAGES), inner(IMAGES))

    def test_a_backbone_that_is_a_checkpoint(self, tmp_path):
        trained, path = saved(tmp_path / "source.ckpt")
        network = load_model({"spec": HEADS, "backbone": path, **SIZES})
        assert torch.equal(network(IMAGES), trained(IMAGES))
        assert network.info.class_names == ("ant", "bee", "cat", "dog")
        assert network.info.num_classes == 4
        own = write_checkpoint(tmp_path / "heads.ckpt", network)
        (tmp_path / "source.ckpt").unlink()  # the new one does not need the old one
        again = load_model(own)
        assert torch.equal(again(IMAGES), trained(IMAGES))
        assert again.info.class_names == ("ant", "bee", "cat", "dog")

    def test_what_is_known_of_the_backbone_survives(self, tmp_path):
        sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "num_heads": 3, "depth": 2}
        backbone = {"spec": "timm:vit_tiny_patch16_224", "pretrained": False, **sizes}
        network = load_model({"spec": HEADS, "backbone": backbone, "num_classes": 5, **SIZES})
        again = load_model(write_checkpoint(tmp_path / "c.ckpt", network))
        for info in (network.info, again.info):
            known = (info.num_classes, info.input_size, info.interpolation, info.crop_pct)
            assert known == (5, 32, "bicubic", 0.9)
        assert torch.equal(again(IMAGES), network(IMAGES))

    def test_the_number_of_classes_reaches_the_backbone(self, tmp_path):
        network = load_model(HEADS, num_classes=7, backbone=SMALL)
        assert network(IMAGES).shape == (3, 7)
        _, path = saved(tmp_path / "source.ckpt")
        with pytest.raises(InputError, match=r"num_classes is 7.*4 logits"):
            load_model(HEADS, num_classes=7, backbone=path)


@pytest.mark.parametrize("norm", ["gn", "ln"])
def test_other_methods_run_on_it_as_on_the_backbone(norm):
    plain = Tent(make_network(norm), SGD(lr=0.1))
    headed = Tent(with_heads(make_network(norm)), SGD(lr=0.1))
    heads = copy.deepcopy(headed.network.predictor.state_dict())
    for images in make_batches(3):
        assert torch.equal(headed.adapt_step(images), plain.adapt_step(images))
    assert headed.report.updated
    assert all(torch.equal(t, heads[n]) for n, t in headed.network.predictor.state_dict().items())
    assert headed.describe()["name"] == "Tent"
