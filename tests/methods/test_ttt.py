"""TTT is the step of MT3 at another rate, under a name of its own."""

import inspect

import pytest
import torch

from tests.networks import make_batches, make_network
from tta_lightning.errors import InputError
from tta_lightning.meta import JointTraining
from tta_lightning.methods import MT3
from tta_lightning.methods.ttt import TTT
from tta_lightning.models import BYOLHeads, SmallConvNet

IMAGES = make_batches(1, 3)[0]


def make_heads():
    network = make_network("gn")
    torch.manual_seed(5)
    return BYOLHeads(network, hidden=8, projection=6)


@pytest.mark.parametrize(
    "options",
    [
        {"copies": 2},
        {"steps": 2, "copies": 3, "target": "self", "lr": 0.2, "episodes": "loop"},
        {"episodes": "vmap", "in_flight": 2, "copies": 2},
        {"crop": (8, 9), "flips": False, "seed": 4, "copies": 2, "episodes": "loop"},
    ],
)
def test_is_the_step_of_mt3(options):
    given = {"episodes": "loop", "lr": 0.01, **options}
    ours = TTT(make_heads(), **{"episodes": "loop", **options})
    theirs = MT3(make_heads(), **given)
    for images in (IMAGES, 1 - IMAGES):
        found = ours.adapt_step(images)
        assert torch.equal(found, theirs.adapt_step(images))
        assert (found - make_heads()(images)).abs().max() > 1e-5
    assert torch.equal(ours.report.loss, theirs.report.loss)
    hyper = ours.describe()["hyper_parameters"]
    assert hyper == theirs.describe()["hyper_parameters"]


def test_the_defaults_are_those_of_mt3_but_for_the_rate():
    ours, theirs = (inspect.signature(method).parameters for method in (TTT, MT3))
    assert list(ours) == list(theirs)
    differ = {name for name in ours if ours[name].default != theirs[name].default}
    assert differ == {"lr"}
    assert ours["lr"].default == 0.01


def test_describes_itself():
    described = TTT(make_heads()).describe()
    assert (described["name"], described["predicts"]) == ("TTT", "after update")
    assert described["hyper_parameters"]["lr"] == 0.01
    assert described["rule"]["lr"] == 0.01
    assert set(described["hyper_parameters"]) == set(inspect.signature(TTT).parameters) - {
        "network"
    }


def test_runs_on_the_network_of_joint_training():
    trained = JointTraining(make_heads())
    adapter = TTT(trained.network, copies=2, episodes="loop")
    logits = adapter.adapt_step(IMAGES)
    assert adapter.report.updated
    assert logits.shape == (3, 10)


def test_a_state_belongs_to_one_of_them():
    state = MT3(make_heads(), episodes="loop").state_dict()
    with pytest.raises(InputError, match="state of MT3, not of TTT"):
        TTT(make_heads()).load_state_dict(state)
    state = TTT(make_heads(), episodes="loop").state_dict()
    with pytest.raises(InputError, match="state of TTT, not of MT3"):
        MT3(make_heads()).load_state_dict(state)


def test_a_state_continues():
    adapter = TTT(make_heads(), copies=2, episodes="loop")
    adapter.adapt_step(IMAGES)
    other = TTT(make_heads(), copies=2, episodes="loop")
    other.load_state_dict(adapter.state_dict())
    assert torch.equal(other.adapt_step(IMAGES), adapter.adapt_step(IMAGES))


def test_wrong_input():
    with pytest.raises(InputError, match=r"SmallConvNet has no BYOL heads.*JointTraining"):
        TTT(SmallConvNet(width=8)).adapt_step(IMAGES)
    with pytest.raises(InputError, match=r"TTT got images of shape .*\[B, 3"):
        TTT(make_heads()).adapt_step(IMAGES[0])
    with pytest.raises(InputError, match=r"lr\b.*-0\.1"):
        TTT(make_heads(), lr=-0.1)
