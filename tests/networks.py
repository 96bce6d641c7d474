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


def head_of(network: nn.Module) -> nn.Linear:
    """The last linear layer of a network."""
    return [module for module in network.modules() if isinstance(module, nn.Linear)][-1]


def sharp_network(norm: str, factor: float = 10.0) -> nn.Module:
    """A network in float64 that is sure of some samples.

    Of :func:`coloured_squares` the entropies lie between 0.1 and 0.9 of ln 10.
    """
    network = make_network(norm).double()
    with torch.no_grad():
        head_of(network).weight.mul_(factor)
    return network


def make_batches(count: int = 4, size: int = 16, seed: int = 1) -> list[torch.Tensor]:
    """Batches of random images [size, 3, 32, 32] in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(size, 3, 32, 32, generator=generator) for _ in range(count)]


def coloured_squares(count: int = 5, size: int = 16, seed: int = 1) -> list[torch.Tensor]:
    """Batches of images of 4 x 4 coloured squares in float64, which a random network tells apart.

    Returns:
        [size, 3, 32, 32] in [0, 1], count of them.
    """
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(count, size, 3, 4, 4, generator=generator, dtype=torch.float64)
    return list(small.repeat_interleave(8, dim=3).repeat_interleave(8, dim=4))


def tensors_of(adapter: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the weights and buffers of an adapter's network."""
    return {name: tensor.clone() for name, tensor in adapter.network.state_dict().items()}


def are_equal(first: object, second: object) -> bool:
    """Whether two nested structures of tensors and plain values agree bit for bit."""
    pairs = zip(*map(torch.utils._pytree.tree_leaves, (first, second)), strict=True)
    return all(
        torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
        for one, other in pairs
    )
