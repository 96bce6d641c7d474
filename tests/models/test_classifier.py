import copy
import hashlib

import pytest
import torch
from torch import nn

from tta_lightning.errors import InputError
from tta_lightning.models import Classifier, ModelInfo, describe, weights_hash


def flat_classifier(**facts):
    return Classifier(nn.Flatten(), ModelInfo(name="flat", **facts))


def test_images_are_normalised_before_the_network():
    classifier = flat_classifier(mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 2.0))
    images = torch.tensor([1.0, 0.5, 0.5]).view(1, 3, 1, 1)
    # by hand: 0.5 over 0.5, 0.25 over 0.25, 0.5 over 2
    assert classifier(images).tolist() == [[1.0, 1.0, 0.25]]


def test_constants_are_saved_with_the_weights():
    classifier = flat_classifier(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    state = classifier.state_dict()
    assert state["mean"].flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert state["std"].flatten().tolist() == pytest.approx([0.4, 0.5, 0.6])


@pytest.mark.parametrize(
    "images",
    [torch.zeros(1, 1, 4, 4), torch.zeros(3, 4, 4), torch.zeros(1, 3, 4, 4, dtype=torch.uint8)],
    ids=["grey", "no batch", "8 bit"],
)
def test_images_of_another_kind_are_refused(images):
    with pytest.raises(InputError, match=r"expects floating-point images \[B, 3, H, W\]"):
        flat_classifier()(images)


def test_describe_returns_the_facts_and_only_the_class_of_others():
    info = ModelInfo(name="flat", num_classes=7)
    assert describe(Classifier(nn.Flatten(), info)) is info
    assert describe(nn.Linear(2, 2)) == ModelInfo(
        name="torch.nn.modules.linear.Linear",
        num_classes=None,
        class_names=None,
        input_size=None,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        spec=None,
    )


def test_a_copy_keeps_its_facts():
    classifier = flat_classifier(num_classes=7)
    assert copy.deepcopy(classifier).info == classifier.info


def test_hash_is_that_of_the_sorted_tensors():
    layer = nn.Linear(2, 1)
    layer.weight.data = torch.tensor([[1.0, 2.0]])
    layer.bias.data = torch.tensor([3.0])
    # little-endian float32 of 3, then of 1 and 2
    expected = hashlib.sha256(
        b"bias torch.float32 [1]\n"
        + bytes.fromhex("00004040")
        + b"weight torch.float32 [1, 2]\n"
        + bytes.fromhex("0000803f00000040")
    )
    assert weights_hash(layer) == expected.hexdigest()


def test_hash_of_equal_weights_is_equal_whatever_their_memory_layout():
    layer = nn.Linear(3, 3)
    twin = nn.Linear(3, 3)
    twin.weight.data = layer.weight.data.t().contiguous().t()
    twin.bias.data = layer.bias.data.clone()
    assert not twin.weight.is_contiguous()
    assert weights_hash(twin) == weights_hash(layer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_hash_sees_one_changed_number(dtype):
    network = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).to(dtype)
    before = weights_hash(network)
    assert weights_hash(copy.deepcopy(network)) == before
    network[1].num_batches_tracked += 1
    assert weights_hash(network) != before


def test_hash_sees_type_and_shape():
    zeros = nn.ParameterDict({"a": torch.zeros(4)})
    other_shape = nn.ParameterDict({"a": torch.zeros(2, 2)})
    other_type = nn.ParameterDict({"a": torch.zeros(2, dtype=torch.float64)})
    assert len({weights_hash(module) for module in (zeros, other_shape, other_type)}) == 3


def test_hash_leaves_out_what_is_no_tensor():
    class Noted(nn.Linear):
        def get_extra_state(self):
            return {"note": 1}

        def set_extra_state(self, state):
            pass

    plain = nn.Linear(2, 2)
    noted = Noted(2, 2)
    noted.load_state_dict(plain.state_dict(), strict=False)
    assert weights_hash(noted) == weights_hash(plain)


def test_a_compiled_network_is_the_network():
    network = flat_classifier(mean=(0.5, 0.25, 0.0))
    compiled = torch.compile(network)
    assert describe(compiled) is network.info
    assert weights_hash(compiled) == weights_hash(network)
