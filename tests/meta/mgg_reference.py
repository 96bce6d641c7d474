"""The published recipe of MGG, written out once more from its equations.

It differentiates the loss of the next batch end to end, with autograd inside the memory too; the
module under test does neither.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector

from tests.meta.pretraining import INNER_LR, LR
from tests.networks import make_network
from tta_lightning.rules import MGG


class Problem:
    """The loss as a function of one vector that holds all parameters of normalisation layers."""

    def __init__(self, norm="ln"):
        self.network = make_network(norm).double().requires_grad_(False)
        layers = [n for n, m in self.network.named_modules() if isinstance(m, nn.LayerNorm)]
        layers += [n for n, m in self.network.named_modules() if isinstance(m, nn.GroupNorm)]
        self.named = {
            name: p
            for name, p in self.network.named_parameters()
            if name.rpartition(".")[0] in layers
        }
        self.start = parameters_to_vector(self.named.values())

    def pieces(self, theta: Tensor) -> dict[str, Tensor]:
        parts = theta.split([p.numel() for p in self.named.values()])
        return {n: part.view_as(p) for part, (n, p) in zip(parts, self.named.items(), strict=True)}

    def logits(self, theta: Tensor, images: Tensor) -> Tensor:
        return functional_call(self.network, self.pieces(theta), (images,))

    def loss(self, theta: Tensor, images: Tensor) -> Tensor:
        probabilities = self.logits(theta, images).softmax(1)
        return -(probabilities * probabilities.log()).sum(1).mean()


@dataclass
class State:
    """Moments, step and memory of every coordinate; no memory stands for the learned first one."""

    m: Tensor | float = 0.0
    v: Tensor | float = 0.0
    step: int = 0
    memory: tuple[Tensor, Tensor] | None = None

    def cut(self) -> "State":
        memory = self.memory and tuple(t.detach().requires_grad_() for t in self.memory)
        return State(self.m, self.v, self.step, memory)


def layer_norm(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = z - z.mean(1, keepdim=True)
    return centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt() * weight + bias


def generate(phi: dict[str, Tensor], g: Tensor, state: State) -> tuple[Tensor, State]:
    """Equations 2.1 and 2.2 with the published constants: gradient ``[N]`` to u ``[N]``."""
    step = state.step + 1
    m, v = 0.9 * state.m + 0.1 * g, 0.99 * state.v + 0.01 * g**2
    size = (v / (1 - 0.99 ** (step + 1))).sqrt() + 1e-8
    x = torch.stack((m / (1 - 0.9 ** (step + 1)) / size, g / size), dim=1)
    first = (phi["W1"].expand(len(g), 8, 8), phi["b1"][0].expand(len(g), 8))
    w, b = first if state.memory is None else state.memory
    q, k, value = (x @ phi[f"{name}_proj.weight"].T for name in "qkv")
    gamma, beta = phi["ttt_norm_weight"], phi["ttt_norm_bias"]
    gate = x @ phi["learnable_ttt_lr_weight"][0].T + phi["learnable_ttt_lr_bias"]
    eta = (1 + phi["learnable_token_idx"]).clamp(min=0) * gate.sigmoid() / 8
    written = layer_norm((k[:, None] @ w)[:, 0] + b, gamma, beta)
    error = 0.5 * (written - (value - k)).square().sum()
    d_w, d_b = torch.autograd.grad(error, (w, b), create_graph=True)
    w, b = w - eta[:, :, None] * d_w, b - eta * d_b
    read = q + layer_norm((q[:, None] @ w)[:, 0] + b, gamma, beta)
    out = layer_norm(read, phi["post_norm.weight"], phi["post_norm.bias"])
    return torch.tanh(out @ phi["o_proj.weight"].T)[:, 0], State(m, v, step, (w, b))


def leaves(rule: MGG) -> dict[str, Tensor]:
    return {n: p.detach().clone().requires_grad_() for n, p in rule.memory.named_parameters()}


@dataclass
class Scored:
    """Everything that the loss after one update depends on, besides the rule."""

    theta: Tensor
    g: Tensor
    state: State
    images: Tensor

    def loss(self, problem: Problem, phi: dict[str, Tensor]) -> Tensor:
        u, _ = generate(phi, self.g, self.state)
        return problem.loss(self.theta - INNER_LR * u, self.images)


@dataclass
class Reference:
    """What the recipe gives: rule and network after every batch, and every update's circumstances.

    The rule is listed only where it changed.
    """

    phi: list[Tensor] = field(default_factory=list)
    theta: list[Tensor] = field(default_factory=list)
    scored: list[Scored] = field(default_factory=list)
    leaves: dict[str, Tensor] = field(default_factory=dict)


def recipe(problem, rule, batches, *, epochs=1, unroll=1, reset=False) -> Reference:
    """Let theta depend on phi over `unroll` updates, then take a step on the sum of the losses."""
    phi = leaves(rule)
    optimizer = torch.optim.Adam(phi.values(), lr=LR)
    found = Reference(phi=[parameters_to_vector(phi.values()).detach()], leaves=phi)
    theta = problem.start
    numbers = [segment for _, _, segment in batches]
    for _ in range(epochs):
        for number in dict.fromkeys(numbers):
            stretch = [images for images, _, segment in batches if segment == number]
            theta = problem.start if reset else theta
            state, g, losses = State(), None, []
            for position, images in enumerate(stretch):
                if g is not None:
                    found.scored.append(Scored(theta.detach(), g, state.cut(), images))
                    u, state = generate(phi, g, state)
                    theta = theta - INNER_LR * u
                found.theta.append(theta.detach())
                at = theta if theta.requires_grad else theta.detach().requires_grad_()
                loss = problem.loss(at, images)
                finite = bool(loss.isfinite())
                g = torch.autograd.grad(loss, at, retain_graph=True)[0] if finite else None
                if finite and theta.requires_grad:
                    losses.append(loss)
                if losses and (len(losses) == unroll or position + 1 == len(stretch)):
                    optimizer.zero_grad()
                    sum(losses).backward()
                    optimizer.step()
                    found.phi.append(parameters_to_vector(phi.values()).detach())
                    theta, state, losses = theta.detach(), state.cut(), []
    return found


def distinct(first: Tensor, trace: list[Tensor]) -> list[Tensor]:
    """Leave out what equals its predecessor."""
    kept = [first]
    for phi in trace:
        if not torch.equal(phi, kept[-1]):
            kept.append(phi)
    return kept


def assert_follows(trace, reference, tolerance=1e-10):
    ours = distinct(reference.phi[0], trace.rule)
    assert len(ours) == len(reference.phi) >= 3
    torch.testing.assert_close(
        torch.stack(ours), torch.stack(reference.phi), rtol=0, atol=tolerance
    )
    torch.testing.assert_close(
        torch.stack(trace.network), torch.stack(reference.theta), rtol=0, atol=tolerance
    )
