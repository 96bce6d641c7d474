"""What MT3 costs, an episode at test time and a meta-step, beside the plain form of four forwards.

The plain form is that of the published code: every view goes through the network twice, once for
the prediction and once for the target, and a meta-step holds the graphs of all its tasks. Arms run
in one process by turns; peak memory is measured apart, each arm in a fresh process.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import torch
from learned_rule_cost import Arm, table, time_arms
from overhead import high_water_mark
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

from tta_lightning import meta
from tta_lightning.inner_loop import (
    Parameters,
    Task,
    clip_by_norm,
    direction_loss,
    embed,
    unstack,
)
from tta_lightning.methods import MT3
from tta_lightning.models import BYOLHeads, Embedder, ResNet26GN

EPISODES, META_STEP = "four forwards, a loop", "four forwards, four tasks at once"
COPIES, TASKS, IMAGES, LR, SSL_WEIGHT, CLIP = 32, 4, 8, 0.1, 0.1, 10.0  # the published values
LIMITS = {"episodes": {"cpu": 1 / 1.3, "cuda": 1 / 8}, "meta-step": {"cpu": 0.8, "cuda": 0.8}}
MEMORY_LIMIT = 0.6


def make_network(width: int, device: str) -> BYOLHeads:
    """Make the network of the paper, or a narrower one."""
    torch.manual_seed(0)
    return BYOLHeads(ResNet26GN(width=width, groups=width // 2)).to(device)


def four_forwards(embedder: Embedder, parameters: Parameters, views: Tensor) -> Tensor:
    """Compute the self-supervised loss as published: targets from passes of their own."""
    first, second = (embed(embedder, parameters, view).predictions for view in views)
    with torch.no_grad():
        target, other = (embed(embedder, parameters, view).projections for view in views)
    return (direction_loss(first, other) + direction_loss(second, target)).mean()


def plain_episodes(embedder: Embedder, images: Tensor, draw: Callable[[int], Tensor]) -> Tensor:
    """Adapt to each image and predict it."""
    theta = {n: p.detach().requires_grad_() for n, p in embedder.named_parameters()}
    names, logits = embedder.adapted(), []
    for number, image in enumerate(images):
        loss = four_forwards(embedder, theta, draw(number))
        grads = torch.autograd.grad(loss, [theta[name] for name in names])
        with torch.no_grad():
            moved = {n: theta[n] - LR * g for n, g in zip(names, grads, strict=True)}
            logits.append(embed(embedder, {**theta, **moved}, image[None]).logits)
    return torch.cat(logits)


def plain_meta_step(embedder: Embedder, tasks: Task) -> tuple[Tensor, ...]:
    """Differentiate the mean loss of the tasks after their steps, all graphs at once."""
    theta, names = dict(embedder.named_parameters()), embedder.adapted()
    losses = []
    for task in unstack(tasks):
        loss = four_forwards(embedder, theta, task.views)
        grads = torch.autograd.grad(loss, [theta[name] for name in names], create_graph=True)
        moved = {
            n: theta[n] - LR * clip_by_norm(g, CLIP) for n, g in zip(names, grads, strict=True)
        }
        phi = {**theta, **moved}
        supervised = F.cross_entropy(embed(embedder, phi, task.images).logits, task.labels)
        losses.append(supervised + SSL_WEIGHT * four_forwards(embedder, phi, task.views))
    return torch.autograd.grad(torch.stack(losses).mean(), list(theta.values()))


def episode_arms(width: int, images: int, device: str) -> dict[str, Arm]:
    """Make the ways to adapt to a few images, one batch a call."""
    torch.manual_seed(1)
    batch = torch.rand(images, 3, 32, 32, device=device)
    ours = {
        name: MT3(make_network(width, device), episodes=name, in_flight=images)
        for name in ("loop", "vmap")
    }
    for adapter in ours.values():
        adapter.ready()

    def plain() -> Tensor:
        drawn = ours["loop"]
        return plain_episodes(
            Embedder(drawn.network), batch, lambda number: drawn._views(batch[number], number)
        )

    arms: dict[str, Arm] = {EPISODES: plain}
    for name, adapter in ours.items():
        arms[f"MT3, episodes={name}"] = lambda adapter=adapter: adapter.adapt_step(batch)
    return arms


def make_tasks(device: str) -> Task:
    """Make random tasks of the published size."""
    torch.manual_seed(2)
    return Task(
        torch.rand(TASKS, 2, IMAGES, 3, 32, 32, device=device),
        torch.rand(TASKS, IMAGES, 3, 32, 32, device=device),
        torch.randint(0, 10, (TASKS, IMAGES), device=device),
    )


def meta_arms(width: int, device: str) -> dict[str, Arm]:
    """Make the ways to a meta-gradient."""
    tasks, embedder = make_tasks(device), Embedder(make_network(width, device))
    ours = {
        f"MT3, backend={name}": meta.MT3(make_network(width, device), backend=name)
        for name in ("loop", "vmap")
    }
    arms: dict[str, Arm] = {META_STEP: lambda: plain_meta_step(embedder, tasks)}
    for name, module in ours.items():
        arms[name] = lambda module=module: module.meta_gradients(tasks)
    return arms


def peak_memory(name: str, width: int, device: str, threads: int) -> tuple[int, int]:
    """Take two meta-steps in this process; return its resident memory before them and its peak."""
    torch.set_num_threads(threads)
    arm = meta_arms(width, device)[name]
    before = high_water_mark(device)
    arm()
    arm()
    return before, high_water_mark(device)


def memory(console: Console, width: int, device: str, rounds: int, threads: int) -> None:
    """Measure the peak of every way to a meta-gradient by turns, above what is there before."""
    found: dict[str, list[int]] = {}
    for _ in range(rounds):
        for name in meta_arms(width, device):
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
                before, peak = fresh.submit(peak_memory, name, width, device, threads).result()
            found.setdefault(name, []).append(peak - before)
    plain = float(np.median(found[META_STEP]))
    for name, values in found.items():
        share = float(np.median(values)) / plain
        console.print(
            f"{name}: {np.median(values) / 2**20:.0f} MiB above the start "
            f"({min(values) / 2**20:.0f} - {max(values) / 2**20:.0f}), {share:.2f} x"
            + ("" if name == META_STEP else f", limit {MEMORY_LIMIT}")
        )


def main() -> None:
    """Measure on the CPU and, where there is one, on a GPU."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 8], help="of the ResNet-26")
    parser.add_argument("--images", type=int, default=4, help="in a batch; on a GPU 16 or more")
    parser.add_argument("--rounds", type=int, default=10, help="timed calls of every arm")
    parser.add_argument("--memory-rounds", type=int, default=3, help="fresh processes of every arm")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console = Console()
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        for width in options.widths:
            title = f"width {width}, {device}"
            for what, arms in (
                ("episodes", episode_arms(width, options.images, device)),
                ("meta-step", meta_arms(width, device)),
            ):
                seconds = time_arms(arms, options.rounds, device)
                limit = LIMITS[what][device]
                console.print(table(f"{what}, {title}: limit {limit:.2f}", seconds))
            if options.memory_rounds:
                memory(console, width, device, options.memory_rounds, options.threads)


if __name__ == "__main__":
    main()
