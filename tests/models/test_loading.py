"""What `load_model` accepts, and the way through a checkpoint."""

import re
import sys
import types
import warnings

import pytest
import torch
from torch import nn

from tta_lightning.errors import InputError
from tta_lightning.models import (
    Classifier,
    SmallConvNet,
    checkpoint_record,
    describe,
    load_model,
    weights_hash,
)

SMALL = "tta_lightning.models.SmallConvNet"
IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def small(**arguments):
    torch.manual_seed(0)
    return load_model({"class_path": SMALL, "init_args": {"width": 8}, **arguments})


def write_checkpoint(path, network, **record):
    """Write what a LightningModule that keeps its network as `self.network` writes."""
    module = nn.Module()
    module.network = network
    module.extra = nn.Linear(1, 1)
    entry = checkpoint_record(network, **record)
    torch.save({"state_dict": module.state_dict(), "tta_lightning": entry}, path)
    return str(path)


def test_a_module_comes_back_as_it_is():
    network = SmallConvNet(width=8).train()
    assert load_model(network) is network
    assert network.training


def test_a_module_is_wrapped_when_facts_are_given():
    network = SmallConvNet(width=8).eval()
    wrapped = load_model(network, mean=[0.5, 0.5, 0.5], std=(0.5, 0.5, 0.5), num_classes=10)
    assert wrapped.network is network
    torch.testing.assert_close(wrapped(IMAGES), network(IMAGES * 2 - 1))
    assert wrapped.info.name == "tta_lightning.models.convnet.SmallConvNet"
    assert wrapped.info.num_classes == 10
    assert wrapped.info.spec is None


def test_weights_go_into_a_module_that_is_handed_over(tmp_path):
    trained, network = SmallConvNet(width=8), SmallConvNet(width=8)
    torch.save(trained.state_dict(), tmp_path / "w.pt")
    assert load_model(network, weights=tmp_path / "w.pt") is network
    assert weights_hash(network) == weights_hash(trained)


def test_a_built_module_takes_no_arguments():
    with pytest.raises(InputError, match="pretrained, width cannot be applied to a module"):
        load_model(SmallConvNet(width=8), pretrained=True, width=8)


def test_three_ways_to_name_a_class_agree():
    torch.manual_seed(0)
    by_hand = SmallConvNet(num_classes=4, width=8).eval()
    torch.manual_seed(0)
    by_keyword = load_model(SMALL, num_classes=4, width=8)
    by_mapping = small(num_classes=4)
    torch.manual_seed(0)
    by_init_args = load_model(
        {"class_path": SMALL, "init_args": {"width": 8, "num_classes": 4}, "weights": None}
    )
    for network in (by_keyword, by_mapping, by_init_args):
        torch.testing.assert_close(network(IMAGES), by_hand(IMAGES), atol=0, rtol=0)
        assert network.info.num_classes == 4
        assert not any(module.training for module in network.modules())
        assert all(parameter.requires_grad for parameter in network.parameters())


def test_keywords_win_over_the_mapping():
    assert small(num_classes=4).info.num_classes == 4
    mapping = {"class_path": SMALL, "init_args": {"width": 8}, "num_classes": 4}
    assert load_model(mapping, num_classes=6).info.num_classes == 6


def test_number_of_classes_is_read_from_the_head():
    assert small().info.num_classes == 10
    assert load_model("torch.nn.Identity").info.num_classes is None


def test_given_constants_of_untrained_networks_need_no_warning():
    network = small(mean=[0.5, 0.5, 0.5])
    assert network.mean.flatten().tolist() == [0.5, 0.5, 0.5]
    assert network.std.flatten().tolist() == [1.0, 1.0, 1.0]
    assert load_model("timm:resnet18", pretrained=False, mean=(0, 0, 0)).info.mean == (0, 0, 0)


def test_other_constants_than_the_model_was_trained_with_are_said_loudly(tmp_path):
    trained = load_model("timm:resnet10t", pretrained=False, num_classes=3)
    torch.save(trained.network.state_dict(), tmp_path / "w.pt")
    with pytest.warns(UserWarning, match=r"0\.485, 0\.456, 0\.406.*mean \(0\.5, 0\.5, 0\.5\)"):
        network = load_model(
            "timm:resnet10t", weights=tmp_path / "w.pt", mean=[0.5, 0.5, 0.5], num_classes=3
        )
    assert network.info.mean == (0.5, 0.5, 0.5)
    assert network.info.std == pytest.approx((0.229, 0.224, 0.225))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = load_model(
            "timm:resnet10t", weights=tmp_path / "w.pt", mean=[0.485, 0.456, 0.406], num_classes=3
        )
    assert weights_hash(again) == weights_hash(trained)


def test_constants_in_a_weight_file_win_over_the_models_own(tmp_path):
    trained = small(mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6])
    torch.save(trained.state_dict(), tmp_path / "w.pt")
    again = small(weights=tmp_path / "w.pt")
    assert again.info.mean == pytest.approx((0.1, 0.2, 0.3))
    assert weights_hash(again) == weights_hash(trained)
    assert weights_hash(load_model(again.info.spec)) == weights_hash(trained)
    with pytest.warns(UserWarning, match=r"mean \(0\.5, 0\.5, 0\.5\)"):
        other = small(weights=tmp_path / "w.pt", mean=[0.5, 0.5, 0.5])
    assert other.info.mean == (0.5, 0.5, 0.5)


def test_class_names_are_kept_and_counted():
    network = small(num_classes=2, class_names=["cat", "dog"])
    assert network.info.class_names == ("cat", "dog")
    with pytest.raises(InputError, match="There are 3 class names for 2 logits"):
        small(num_classes=2, class_names=["cat", "dog", "fish"])


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_a_checkpoint_rebuilds_its_network(tmp_path, norm):
    init_args = {"width": 8, "norm": norm, "num_classes": 3}
    network = small(
        init_args=init_args,
        mean=[0.1, 0.2, 0.3],
        std=[0.4, 0.5, 0.6],
        class_names=["a", "b", "c"],
    )
    path = write_checkpoint(tmp_path / "source.ckpt", network)
    again = load_model(path)
    assert weights_hash(again) == weights_hash(network)
    torch.testing.assert_close(again(IMAGES), network(IMAGES), atol=0, rtol=0)
    assert again.info.mean == (0.1, 0.2, 0.3)
    assert again.info.std == (0.4, 0.5, 0.6)
    assert again.info.class_names == ("a", "b", "c")
    assert again.info.num_classes == 3
    assert not again.training


def test_a_timm_checkpoint_survives_two_generations(tmp_path):
    network = load_model("timm:resnet10t", pretrained=False, num_classes=3, drop_rate=0.5)
    first = load_model(write_checkpoint(tmp_path / "1.ckpt", network))
    second = load_model(write_checkpoint(tmp_path / "2.ckpt", first))
    assert weights_hash(second) == weights_hash(network)
    assert second.info.name == "timm:resnet10t"
    assert second.network.drop_rate == 0.5
    # the spec in the manifest builds the very same network
    assert weights_hash(load_model(second.info.spec)) == weights_hash(network)


@pytest.mark.filterwarnings("ignore:.*was trained with mean:UserWarning")
def test_record_holds_plain_values_and_no_weights(tmp_path):
    torch.save(small().state_dict(), tmp_path / "w.pt")
    network = small(weights=tmp_path / "w.pt", mean=[0.5, 0.5, 0.5], num_classes=10)
    assert checkpoint_record(network, class_names="abcdefghij", kind="test") == {
        "format": 1,
        "kind": "test",
        "network": {
            "class_path": SMALL,
            "init_args": {"width": 8},
            "num_classes": 10,
            "mean": [0.5, 0.5, 0.5],
            "std": [1.0, 1.0, 1.0],
        },
        "class_names": list("abcdefghij"),
    }
    with pytest.raises(InputError, match="There are 1 class names for 10 logits"):
        checkpoint_record(network, class_names=["only"])


def test_names_given_to_the_record_come_back(tmp_path):
    network = small(num_classes=2)
    path = write_checkpoint(tmp_path / "x.ckpt", network, class_names=["no", "yes"])
    again = load_model(path)
    assert again.info.class_names == ("no", "yes")
    assert load_model(again.info.spec).info.class_names == ("no", "yes")
    assert load_model(path, class_names=["0", "1"]).info.class_names == ("0", "1")


def test_a_checkpoint_of_a_handed_over_module_asks_for_it(tmp_path):
    network = SmallConvNet(width=8)
    path = write_checkpoint(tmp_path / "x.ckpt", network)
    with pytest.raises(InputError, match=r"Give the module yourself: load_model\(module, weights="):
        load_model(path)
    again = load_model(SmallConvNet(width=8), weights=path)
    assert weights_hash(again) == weights_hash(network)
    assert describe(small(weights=path)).num_classes == 10


def test_a_checkpoint_of_a_wrapped_module_brings_its_constants(tmp_path):
    network = load_model(SmallConvNet(width=8), mean=[0.5, 0.5, 0.5])
    path = write_checkpoint(tmp_path / "x.ckpt", network)
    again = load_model(SmallConvNet(width=8), weights=path)
    assert isinstance(again, Classifier)
    assert weights_hash(again) == weights_hash(network)


def test_arguments_that_are_objects_leave_no_spec():
    network = load_model(
        "timm:vit_tiny_patch16_224", pretrained=False, depth=1, norm_layer=nn.LayerNorm
    )
    assert network.info.spec is None
    assert checkpoint_record(network)["network"] is None


def test_checkpoints_that_cannot_be_read_say_why(tmp_path):
    path = write_checkpoint(tmp_path / "x.ckpt", small())
    content = torch.load(path)
    with pytest.raises(InputError, match="leave out weights, width"):
        load_model(path, weights="y.pt", width=8)
    with pytest.raises(InputError, match=r"num_classes is 4, but the checkpoint .* with 10 logits"):
        load_model(path, num_classes=4)
    torch.save(content | {"tta_lightning": {"format": 2}}, path)
    with pytest.raises(InputError, match="has format 2; this version reads format 1"):
        load_model(path)
    torch.save({"tta_lightning": content["tta_lightning"], "state_dict": {}}, path)
    with pytest.raises(InputError, match=r"missing mean; missing std"):
        load_model(path)
    torch.save(content["state_dict"], path)
    with pytest.raises(InputError, match="holds weights only and does not say of which model"):
        load_model(path)
    with pytest.raises(InputError, match="There is no weight file"):
        load_model("nowhere.ckpt")


def test_other_constants_than_the_checkpoints_are_said_loudly(tmp_path):
    path = write_checkpoint(tmp_path / "x.ckpt", small(mean=[0.5, 0.5, 0.5]))
    with pytest.warns(UserWarning, match="trained with mean"):
        network = load_model(path, mean=[0.25, 0.25, 0.25])
    assert network.mean.flatten().tolist() == [0.25, 0.25, 0.25]
    assert network.info.spec["mean"] == [0.25, 0.25, 0.25]


@pytest.mark.parametrize("spec", ["nonsense", "tim:resnet18", "", 7, None, "a b.c"])
def test_anything_else_lists_the_accepted_forms(spec):
    with pytest.raises(
        InputError, match=r"which model .* is\. Expected an nn\.Module; 'timm:NAME'"
    ):
        load_model(spec)


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"weights": "w.pt"}, "with the keys weights; expected the key 'spec' or 'class_path'"),
        ({"class_path": SMALL, "init_arg": {}}, "beside class_path 'init_arg'. Did you mean 'init"),
        (
            {"class_path": SMALL, "init_args": {"widht": 8}},
            "'widht'. Did you mean 'width'? Known: ",
        ),
        ({"class_path": SMALL + "s"}, "'SmallConvNets'. Did you mean 'SmallConvNet'?"),
        ({"class_path": "no_such_package.Net"}, "cannot be imported: No module named"),
        ({"class_path": "subprocess.Popen"}, "is not a class derived from torch.nn.Module"),
        ({"class_path": "torch.nn.Linear"}, "torch.nn.Linear could not be built: "),
        ({"class_path": SMALL, "pretrained": True}, "comes without weights"),
        (
            {"class_path": SMALL, "init_args": {"num_classes": 3}, "num_classes": 4},
            "num_classes is 4, but the network tta_lightning.models.SmallConvNet has 3 logits",
        ),
        ({"spec": SMALL, "num_classes": 0}, "num_classes is 0; expected a whole number"),
        ({"spec": SMALL, "mean": [1, 2]}, "mean is [1, 2]; expected three numbers"),
        ({"spec": SMALL, "mean": 0.5}, "mean is 0.5; expected three numbers"),
        ({"spec": SMALL, "std": [1, 0, 1]}, "expected three numbers above 0"),
        ({"spec": SMALL, "weights": "w.pt", "pretrained": True}, "Both `weights` and `pretrained"),
    ],
)
def test_mistakes_in_a_mapping_are_explained(mapping, message):
    with pytest.raises(InputError, match=re.escape(message)):
        load_model(mapping)


def test_a_class_that_takes_anything_is_not_second_guessed(monkeypatch):
    class Anything(nn.Linear):
        def __init__(self, **options):
            super().__init__(3, options["outputs"])

    module = types.ModuleType("my_networks")
    module.Anything = Anything
    monkeypatch.setitem(sys.modules, "my_networks", module)
    assert load_model("my_networks.Anything", outputs=5).info.num_classes == 5
