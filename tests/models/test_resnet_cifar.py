"""The ResNets of He et al. for CIFAR: their size, their shortcuts, their published weights."""

import os
from pathlib import Path

import pytest
import torch

from tta_lightning.errors import InputError
from tta_lightning.models import CIFARResNet, load_model

SHARED = os.environ.get("TTA_SHARED")


@pytest.mark.parametrize(
    ("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)]
)
def test_has_as_many_parameters_as_the_paper_says(depth, millions):
    count = sum(p.numel() for p in CIFARResNet(depth).parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.04 if depth == 110 else 0.006)


def test_a_shortcut_takes_every_second_pixel_and_adds_channels_of_zeros_on_both_sides():
    block = CIFARResNet(20).layer2[0].eval()
    for parameter in block.parameters():
        torch.nn.init.zeros_(parameter)  # leaves the shortcut alone
    images = torch.rand(2, 16, 8, 8)
    out = block(images)
    assert out.shape == (2, 32, 4, 4)
    assert torch.equal(out[:, 8:24], images[:, :, ::2, ::2])
    assert not out[:, :8].any()
    assert not out[:, 24:].any()


@pytest.mark.parametrize("depth", [2, 18, 21])
def test_refuses_a_depth_that_does_not_exist(depth):
    with pytest.raises(InputError, match=f"6 n \\+ 2 layers, got depth {depth}"):
        CIFARResNet(depth)


@pytest.mark.skipif(SHARED is None, reason="TTA_SHARED names no folder")
@pytest.mark.parametrize(("depth", "file"), [(20, "12fca82f"), (56, "4bfd9763")])
def test_loads_the_published_weights(depth, file):
    path = Path(SHARED) / "weights" / f"resnet{depth}-{file}.th"
    network = load_model("tta_lightning.models.CIFARResNet", depth=depth, weights=str(path))
    assert network(torch.rand(2, 3, 32, 32)).shape == (2, 10)
