"""What the learned rule costs: a step of MGTTA beside one of Tent, and a step of its pre-training.

All arms run in one process by turns, so that a slow spell of the machine hits each of them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor

from tta_lightning.methods import MGTTA, Tent
from tta_lightning.models import load_model
from tta_lightning.rules import MGG

STEP_LIMIT = 1.10  # MGTTA to Tent
VJP_LIMIT = 5.0  # a backward call for each tensor to a single product

Arm = Callable[[], object]


def time_arms(arms: dict[str, Arm], rounds: int, device: str) -> dict[str, NDArray[np.float64]]:
    """Run every arm by turns, after two turns that do not count; return seconds a call."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(-2, rounds):
        for name, arm in arms.items():
            start = time.perf_counter()
            arm()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: np.array(values) for name, values in seconds.items()}


def adaptation_arms(device: str, images: Tensor) -> dict[str, Arm]:
    """Make one step of Tent and of MGTTA, on the same network and images."""
    torch.manual_seed(0)
    tent = Tent(load_model("timm:vit_tiny_patch16_224", pretrained=False)).to(device)
    mgtta = MGTTA(load_model("timm:vit_tiny_patch16_224", pretrained=False), MGG()).to(device)
    mgtta.prepare([images, images.flip(0)])
    return {
        "Tent (SGD with momentum)": lambda: tent.adapt_step(images),
        "MGTTA (MGG)": lambda: mgtta.adapt_step(images),
    }


def rule_arms(device: str, compiled: bool) -> dict[str, Arm]:
    """Make the rule alone for ViT-B's 50 tensors, 38,400 scalars."""
    params = {f"norm{number}": torch.zeros(768, device=device) for number in range(50)}
    grads = {name: torch.randn_like(param) for name, param in params.items()}
    rule = MGG().to(device).requires_grad_(False)
    state = rule.init(params)
    arms: dict[str, Arm] = {"eager": lambda: rule.update(grads, state, params)}
    if compiled:
        update = torch.compile(rule.update)
        arms["torch.compile"] = lambda: update(grads, state, params)
    return arms


def meta_arms(device: str) -> tuple[dict[str, Arm], float]:
    """Make the two ways to a meta-gradient for ViT-B's 50 tensors; return their difference too."""
    torch.manual_seed(0)
    params = {f"norm{number}": torch.zeros(768, device=device) for number in range(50)}
    grads = {name: torch.randn_like(param) for name, param in params.items()}
    later = {name: torch.randn_like(param) for name, param in params.items()}
    rule = MGG().to(device)
    weights = list(rule.parameters())
    state = rule.init(params)

    def single() -> list[Tensor]:
        directions, _ = rule.generate(grads, state, params)
        product = sum((later[name] * u).sum() for name, u in directions.items())
        assert isinstance(product, Tensor)
        return list(torch.autograd.grad(product, weights, retain_graph=True))

    def one_by_one() -> list[Tensor]:
        directions, _ = rule.generate(grads, state, params)
        total = [torch.zeros_like(weight) for weight in weights]
        for name, u in directions.items():
            found = torch.autograd.grad(u, weights, later[name], retain_graph=True)
            total = [a + b for a, b in zip(total, found, strict=True)]
        return total

    pairs = list(zip(single(), one_by_one(), strict=True))
    scale = max(float(a.abs().max()) for a, _ in pairs)
    difference = max(float((a - b).abs().max()) for a, b in pairs) / scale
    return {"single product": single, "a call for each tensor": one_by_one}, difference


def table(title: str, seconds: dict[str, NDArray[np.float64]]) -> Table:
    """Show medians, quartiles and the ratio to the first arm."""
    shown = Table(title=title)
    shown.add_column("ms a step")
    for column in ("n", "median", "quartiles", "ratio"):
        shown.add_column(column, justify="right")
    first = float(np.median(next(iter(seconds.values()))))
    for name, values in seconds.items():
        low, median, high = np.percentile(values, [25, 50, 75])
        shown.add_row(
            name,
            str(len(values)),
            f"{median * 1e3:.1f}",
            f"{low * 1e3:.1f} - {high * 1e3:.1f}",
            f"{median / first:.3f}",
        )
    return shown


def state_bytes(scalars: int) -> int:
    """Return the bytes that the state of the rule takes, without its step counter."""
    state = MGG().requires_grad_(False).init({"all": torch.zeros(scalars)})
    return sum(t.numel() * t.element_size() for name, t in state.items() if name != "step")


def main() -> None:
    """Measure on the CPU and, where there is one, on a GPU."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20, help="timed calls of every arm")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console = Console()
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        images = torch.rand(16, 3, 224, 224, device=device)
        steps = time_arms(adaptation_arms(device, images), options.rounds, device)
        console.print(table(f"vit_tiny_patch16_224, batch 16, {device}: limit {STEP_LIMIT}", steps))
        rule = time_arms(rule_arms(device, compiled=device == "cuda"), options.rounds, device)
        console.print(table(f"the rule alone, 38,400 scalars, {device}", rule))
        arms, difference = meta_arms(device)
        meta = time_arms(arms, options.rounds, device)
        console.print(table(f"meta-gradient, 38,400 scalars, {device}: at least {VJP_LIMIT}", meta))
        console.print(f"largest difference of the two meta-gradients: {difference:.1e}, relative")
    console.print(f"state: {state_bytes(1000) / 1000:.0f} bytes a scalar")


if __name__ == "__main__":
    main()
