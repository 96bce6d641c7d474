"""Every method in the field's settings, at the papers' hyper-parameters, with and without STAG.

The methods are those of the shipped configurations. Each network given is one repetition with its
own order and noise; all runs of a repetition and a setting see the same images in the same order,
but for MEMO, which sees the first ones of each batch (``--episodic-share``): beside its figure in
the table stands that of the network itself on the same images.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from rich.console import Console
from stag_study import Batch, known_classes, run, stream
from torch import nn

from tta_lightning import methods, rules
from tta_lightning.adapter import Adapter
from tta_lightning.data import Digits, ImageFolder
from tta_lightning.data.geometry import geometry
from tta_lightning.data.stream import clean_batches
from tta_lightning.methods.stag import StagOptions, StagTerm
from tta_lightning.models import load_model
from tta_lightning.runs import write_atomically

CONFIGS = Path(__file__).parents[1] / "configs" / "adapt"
METHODS = (
    *("source", "bnstats", "tent", "eta", "eata", "sar", "deyo", "cotta", "rotta", "roid"),
    *("mgtta", "lame", "t3a", "memo"),
)
REGIMES = {  # scenario, batch size (None: --batch-size)
    "reset_each_shift": ("reset_each_shift", None),
    "continual": ("continual", None),
    "mixed_domains": ("mixed_domains", None),
    "label_shift": ("label_shift", None),
    "single_sample": ("reset_each_shift", 1),
}
LEARNS_BY_A_LOSS = {"tent", "eta", "eata", "sar", "deyo", "cotta", "rotta", "roid", "mgtta", "memo"}
EPISODIC = {"memo"}  # the same in every setting
WHATEVER_THE_BATCH = {"rotta", "memo"}  # their updates do not depend on the stream's batches


def scaled(options: argparse.Namespace, name: str, lr: float, batch_size: int) -> float:
    """Bring a paper's learning rate to another batch size, by the papers' own rules.

    Tent scales with the batch (Adam, 200 images). For ResNets on ImageNet SAR's code doubles that
    below 32 of 64 images and keeps the rate above; SAR itself doubles it again at one image.
    """
    if name in WHATEVER_THE_BATCH:
        return lr
    if options.presets == "small":
        return lr * batch_size / 200
    lr *= 1.0 if batch_size >= 32 else batch_size * 2 / 64
    return lr * 2 if name == "sar" and batch_size == 1 else lr


def make(options: argparse.Namespace, name: str, network: nn.Module, batch_size: int) -> Adapter:
    """Build a method from its shipped configuration on a copy of the network."""
    folder = CONFIGS
    if options.presets == "imagenet" and name != "mgtta":
        folder = CONFIGS / "imagenet_resnet"
    config = "eata" if name == "eta" else name
    described = yaml.safe_load((folder / f"{config}.yaml").read_text())["model"]
    given = dict(described.get("init_args", {}))
    given.pop("network")
    rule = given.pop("rule", None)
    if name == "mgtta":  # the learning rate that learned_rules.py found on the tuning corruptions
        given["rule"] = rules.MGG(options.mgg, lr=0.01)
    elif rule is not None:
        lr = scaled(options, name, rule["init_args"].pop("lr"), batch_size) * options.lr_factor
        given["rule"] = getattr(rules, rule["class_path"])(lr=lr, **rule["init_args"])
    if name == "eta":
        given["fisher_alpha"] = 0.0
    if name != "source":
        given |= json.loads(options.given)
    method: type[Adapter] = getattr(methods, described["class_path"])
    adapter = method(copy.deepcopy(network), **given)
    adapter.restrict_classes(known_classes(options, network))
    adapter.reset()
    if name in ("eata", "mgtta"):
        adapter.prepare(clean_images(options))
    return adapter


def clean_images(options: argparse.Namespace) -> list[torch.Tensor]:
    """Return up to 2,000 clean images in batches of 64, as EATA's paper has them."""
    source = Digits("train") if options.clean is None else ImageFolder(options.clean)
    size = geometry(options.image_size or "keep", None, None, 1.0, "bilinear")
    batches = []
    for images in clean_batches(source, size, 64):
        batches.append(images)
        if 64 * len(batches) >= 2000:
            break
    return batches


def attach_stag(adapter: Adapter) -> Adapter:
    """Add STAG with its default options."""
    adapter.ready()
    adapter.terms.append(StagTerm(adapter.head, StagOptions(), adapter.classes))
    return adapter


def suits(options: argparse.Namespace, name: str, network: nn.Module) -> bool:
    """Whether a method can run."""
    if name == "mgtta":
        return options.mgg is not None
    has_batch_norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.modules())
    return name != "bnstats" or has_batch_norm


def arms(options: argparse.Namespace, name: str, regime: str) -> list[bool]:
    """Say whether a method runs without and with STAG here."""
    if name in EPISODIC and regime != "reset_each_shift":
        return []
    if name in options.without_stag or name not in LEARNS_BY_A_LOSS:
        return [False]
    return [False, True]


def shortened(batches: list[Batch], share: float) -> list[Batch]:
    """Keep the first images of each batch, a share of them."""
    if share == 1.0:
        return batches
    kept = max(1, round(share * len(batches[0].images)))
    return [Batch(b.images[:kept], b.labels[:kept], b.domains[:kept], b.resets) for b in batches]


SETTINGS = (
    *("presets", "test", "corruptions", "severity", "table", "image_size", "limit", "single"),
    *("batch_size", "episodic_share", "mgg", "clean", "given", "lr_factor"),
)


def opened(options: argparse.Namespace) -> dict[str, Any]:
    """Read the file that runs are added to, if it is of the same settings."""
    settings = {name: getattr(options, name) for name in SETTINGS}
    if not options.out.exists():
        return {"settings": settings, "runs": []}
    results: dict[str, Any] = json.loads(options.out.read_text())
    if results["settings"] != settings:
        raise SystemExit(f"{options.out} holds runs with other settings: {results['settings']}")
    return results


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run everything; the file is written after each run, and finished runs are not repeated."""
    results = opened(options)
    runs: list[dict[str, Any]] = results["runs"]
    done = {(r["network"], r["seed"], r["regime"], r["method"], r["stag"]) for r in runs}
    for seed, path in enumerate(options.networks):
        network = load_model(json.loads(path) if path.startswith("{") else path)
        for regime in options.regimes:
            scenario, single = REGIMES[regime]
            batches, domains = stream(options, scenario, single, options.corruptions, seed)
            for name in options.methods:
                if not suits(options, name, network):
                    continue
                for stag in arms(options, name, regime):
                    if (path, seed, regime, name, stag) in done:
                        continue
                    start = time.perf_counter()
                    adapter = make(options, name, network, single or options.batch_size)
                    if stag:
                        attach_stag(adapter)
                    share = options.episodic_share if name in EPISODIC else 1.0
                    shown = shortened(batches, share)
                    accuracy = run(adapter, shown)
                    seconds = time.perf_counter() - start
                    runs.append(
                        {
                            **{"network": path, "seed": seed, "regime": regime, "method": name},
                            **{"stag": stag, "domains": domains, "accuracy": accuracy},
                            "seconds": seconds,
                            "source": run(make(options, "source", network, 1), shown)
                            if share < 1
                            else None,
                        }
                    )
                    print(
                        f"{path} {regime} {name}{' + STAG' if stag else ''}: "
                        f"{np.mean(accuracy):.1f} % in {seconds:.0f} s",
                        flush=True,
                    )
                    write_atomically(options.out, json.dumps(results))
    return runs


def table(runs: list[dict[str, Any]]) -> str:
    """Write accuracy in %, mean over corruptions and repetitions ± s.d., and STAG's gain."""
    regimes = list(dict.fromkeys(each["regime"] for each in runs))
    names = list(dict.fromkeys(each["method"] for each in runs))
    rows = ["| method | " + " | ".join(regimes) + " |", "|---" * (len(regimes) + 1) + "|"]
    for name in names:
        cells = []
        for regime in regimes:
            found = [
                {
                    each["seed"]: float(np.mean(each["accuracy"]))
                    for each in runs
                    if (each["method"], each["regime"], each["stag"]) == (name, regime, stag)
                }
                for stag in (False, True)
            ]
            same = [
                float(np.mean(each["source"]))
                for each in runs
                if (each["method"], each["regime"]) == (name, regime) and each["source"]
            ]
            beside = f" (source {np.mean(same):.1f})" if same else ""
            cells.append(_cell(*found) + beside)
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _cell(alone: dict[int, float], with_stag: dict[int, float]) -> str:
    if not alone:
        return "-"
    text = f"{np.mean(list(alone.values())):.1f}{_spread(list(alone.values()))}"
    gains = [with_stag[seed] - alone[seed] for seed in with_stag if seed in alone]
    return f"{text}, {np.mean(gains):+.1f}{_spread(gains)}" if gains else text


def _spread(values: list[float]) -> str:
    return f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""


def main() -> None:
    """Run the grid, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("networks", nargs="+", help="as in `tta`, or a JSON object")
    parser.add_argument("--presets", choices=("small", "imagenet"), default="small")
    parser.add_argument("--test", default="digits", help="'digits', or a folder of class folders")
    parser.add_argument("--clean", help="a folder of class folders; else digits")
    parser.add_argument("--corruptions", nargs="+", default=["common"])
    parser.add_argument("--severity", type=int, default=3)
    parser.add_argument("--table", choices=("imagenet", "cifar"), default="imagenet")
    parser.add_argument("--image-size", type=int, help="side in px; as it is by default")
    parser.add_argument("--limit", type=int, default=500, help="images a corruption")
    parser.add_argument("--single", type=int, default=40, help="the same at batch size 1")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--regimes", nargs="+", choices=list(REGIMES), default=list(REGIMES))
    parser.add_argument("--without-stag", nargs="*", choices=METHODS, default=[])
    parser.add_argument(
        "--episodic-share", type=float, default=1.0, help="of the images, for MEMO, which is slow"
    )
    parser.add_argument("--mgg", help="checkpoint of MGG; without it MGTTA is left out")
    parser.add_argument("--given", default="{}", help="JSON, instead of the preset's arguments")
    parser.add_argument(
        "--lr-factor", type=float, default=1.0, help="0: what a method does unlearnt"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    parser.add_argument("--out", type=Path, required=True, help="JSON file; runs are added to it")
    options = parser.parse_args()
    if len(options.corruptions) == 1:
        options.corruptions = options.corruptions[0]
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    Console().print(table(measure(options)), soft_wrap=True)


if __name__ == "__main__":
    main()
