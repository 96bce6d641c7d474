"""Small networks that tests adapt."""

import torch
from torch import nn


def golden_network(norm: str = "bn") -> nn.Sequential:
    """The toy network of the golden figures; keys are those of nn.Sequential."""

    def layer(channels):
        return nn.BatchNorm2d(channels) if norm == "bn" else nn.GroupNorm(4, channels)

    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        layer(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2),
        layer(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


class LayerNormNet(nn.Module):
    """Patches, a layer norm over channels, a mean over patches, a linear head."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 8, stride=8)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        return self.head(self.norm(tokens).mean(dim=1))


def make_network(norm: str) -> nn.Module:
    """A randomly initialised network with batch, group or layer normalisation."""
    torch.manual_seed(0)
    network = LayerNormNet() if norm == "ln" else golden_network(norm)
    if norm == "bn":  # running statistics that differ from those of any batch
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-0.3, 0.3)
                module.running_var.uniform_(0.5, 1.5)
    return network


def make_batches(count: int = 4, size: int = 16, seed: int = 1) -> list[torch.Tensor]:
    """Batches of random images [size, 3, 32, 32] in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(size, 3, 32, 32, generator=generator) for _ in range(count)]
