"""What a run folder says about its run."""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from tta_lightning.adapter import Adapter
from tta_lightning.callbacks.base import AdaptCallback
from tta_lightning.describe import plain
from tta_lightning.errors import InputError
from tta_lightning.models.classifier import describe, weights_hash
from tta_lightning.report.run import Run
from tta_lightning.runs import run_folder, write_atomically, write_json

PACKAGES = ("tta_lightning", "torch", "torchvision", "lightning", "torchmetrics", "timm", "numpy")


class RunRecorder(AdaptCallback):
    """Write ``manifest.json`` at the start; ``metrics.json``, ``.csv``, ``curves.png`` at the end.

    The manifest holds what makes two runs comparable: method and hyper-parameters, model with the
    hash of its weights and its normalisation constants, the stream with the digest of its plan,
    batch size and reset policy, precision, versions, device. A run that stops early still writes
    its metrics, marked ``"completed": false`` with the reason.
    """

    def __init__(self) -> None:
        self._manifest: dict[str, Any] | None = None
        self._begun: dict[str, Any] | None = None  # by the process that the run is resumed after

    def on_adapt_start(self, trainer: Trainer, adapter: Adapter) -> None:
        """Write the manifest."""
        self._manifest = None
        folder = run_folder(trainer)
        if folder is None:
            return
        path = folder / "manifest.json"
        self._begun = None
        if getattr(trainer.test_loop, "resumed", None) is not None and path.is_file():
            self._begun = _read(path)
            return
        self._manifest = self.manifest(trainer, adapter)
        write_json(path, self._manifest)

    def on_adapt_boundary(self, trainer: Trainer, adapter: Adapter) -> None:
        """Write into the manifest of a run that is resumed where and when it goes on."""
        loop: Any = trainer.test_loop
        folder, begun = run_folder(trainer), self._begun
        if folder is None or begun is None:
            return
        again = {"batches": loop.drawn, "resumed": _now(), "command": sys.argv}
        here = {"device": _device_name(adapter.device), "versions": _versions()}
        again |= {name: value for name, value in here.items() if value != begun.get(name)}
        self._manifest = {**begun, "resumed": [*begun.get("resumed", []), again]}
        self._begun = None
        write_json(folder / "manifest.json", self._manifest)

    def on_adapt_end(self, trainer: Trainer, adapter: Adapter) -> None:
        """Write the figures of the run, and into the manifest what the method chose meanwhile."""
        self._complete(trainer, adapter)
        self._write(trainer, stopped=None)
        self._manifest = None

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Write the figures of what was done before the run stopped."""
        try:
            if isinstance(pl_module, Adapter):
                self._complete(trainer, pl_module)
            self._write(trainer, stopped=f"{type(exception).__name__}: {exception}")
        except OSError as error:  # what stopped the run is what the user hears of
            rank_zero_warn(f"The figures of the run could not be written: {error}")
        self._manifest = None

    def manifest(self, trainer: Trainer, adapter: Adapter) -> dict[str, Any]:
        """Describe a run as plain values.

        Args:
            trainer: The trainer that runs it.
            adapter: The method, standing at the source model.

        Returns:
            What ``manifest.json`` holds.
        """
        stream: Any = getattr(trainer, "datamodule", None)
        info = describe(adapter.network)
        return {
            "method": adapter.describe(),
            "model": {
                "name": info.name,
                "num_classes": info.num_classes,
                "input_size": info.input_size,
                "mean": plain(info.mean),
                "std": plain(info.std),
                "weights_sha256": weights_hash(adapter.network),
                "adapted_parameters": sum(p.numel() for p in adapter.adapted_parameters.values()),
            },
            "stream": stream.describe() if hasattr(stream, "describe") else None,
            "callbacks": {
                type(callback).__name__: callback.describe()
                for callback in _callbacks(trainer)
                if isinstance(callback, AdaptCallback)
            },
            "precision": str(trainer.precision),
            "device": _device_name(adapter.device),
            "seed": int(os.environ["PL_GLOBAL_SEED"]) if "PL_GLOBAL_SEED" in os.environ else None,
            "versions": _versions(),
            "command": sys.argv,
            "started": _now(),
        }

    def results(self, trainer: Trainer, stopped: str | None = None) -> dict[str, Any]:
        """Collect the figures of all callbacks.

        Args:
            trainer: The trainer that ran.
            stopped: Why the run ended early; None if it did not.

        Returns:
            What ``metrics.json`` holds.
        """
        loop: Any = trainer.test_loop
        stopped = stopped or _why_short(trainer)
        results: dict[str, Any] = {
            "completed": stopped is None,
            "stopped": stopped,
            "batches": loop.completed_batches,
            "nonfinite_batches": loop.nonfinite_batches,
            "nonfinite": loop.nonfinite,
            "recoveries": loop.recoveries,
            "images_without_step": loop.images_without_step,
            "bad_images": {
                "count": len(loop.bad_images),
                "files": [reason for _, reason in loop.bad_images],
            },
        }
        for callback in _callbacks(trainer):
            if isinstance(callback, AdaptCallback):
                results.update(callback.summary())
        return results

    def _complete(self, trainer: Trainer, adapter: Adapter) -> None:
        """Write the manifest again if the method has something to add to it."""
        folder = run_folder(trainer)
        if folder is None or self._manifest is None:
            return
        method = adapter.describe()
        if method != self._manifest["method"]:
            write_json(folder / "manifest.json", {**self._manifest, "method": method})

    def _write(self, trainer: Trainer, stopped: str | None) -> None:
        folder = run_folder(trainer)
        if folder is None or not hasattr(trainer.test_loop, "completed_batches"):
            return
        if trainer.test_loop.completed_batches == 0:
            return
        results = self.results(trainer, stopped)
        if "segments" in results:
            write_atomically(folder / "metrics.csv", _table(results["segments"]))
            _draw(folder, results)
        write_json(folder / "metrics.json", results)  # last: where it says so, all is complete


def _why_short(trainer: Trainer) -> str | None:
    """Say why a run that ended without an error did not serve its whole plan; None if it did."""
    loop: Any = trainer.test_loop
    if loop.stop_reason is not None:
        return str(loop.stop_reason)
    if loop.plan is None or loop.served >= len(loop.plan):
        return None
    return f"ended after {loop.served} of {len(loop.plan)} images (should_stop or a limit)"


def _read(path: Path) -> dict[str, Any]:
    """Read the manifest of a run that is resumed.

    Raises:
        InputError: It is damaged.
    """
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read: {error}. Move it away to write it anew."
        ) from error
    if not isinstance(manifest, dict):
        raise InputError(f"{path} is no manifest of a run. Move it away to write it anew.")
    return manifest


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _callbacks(trainer: Trainer) -> list[Any]:
    return list(trainer.callbacks)  # type: ignore[attr-defined]


def _table(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _draw(folder: Path, results: dict[str, Any]) -> None:
    from tta_lightning.report.pictures import draw_curves  # takes two seconds to import

    write_atomically(folder / "curves.png", draw_curves([Run(folder, {}, results)]))


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine() or device.type
