"""What adaptation costs: time, memory, forwards and backwards."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tta_lightning.adapter import Adapter
from tta_lightning.callbacks.base import AdaptCallback
from tta_lightning.contract import unobserved
from tta_lightning.data.batches import StreamBatch
from tta_lightning.models.byol import BYOLHeads

_ADDED = ("batches", "images", "forwards", "backwards", "seconds", "first", "peaks")
_CLEAR_REFS, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class CostMonitor(AdaptCallback):
    """Measure inference and update separately, and count forwards and backwards.

    A forward is a call of the network, for however many images; a backward is a gradient that
    reaches the logits of such a call, or the predictions of BYOL heads. The two phases are those
    that the method itself marks; what it does outside, such as to time itself, is not counted. Peak
    memory is that of the device's allocator on CUDA and the highest resident set of the process on
    Linux; elsewhere it is None.
    The first batch, which warms caches up, is left out of the seconds a batch where there are more.
    On Linux the process's high-water mark of memory is set back twice a batch, so another monitor
    that reads it (``ru_maxrss``, a scheduler's accounting) sees the peak since then only.
    """

    def __init__(self) -> None:
        self._hooks: list[RemovableHandle] = []
        self.images_per_second: float | None = None
        self._clear()

    def on_adapt_start(self, trainer: Trainer, adapter: Adapter) -> None:
        """Start to observe the adapter's phases and its network."""
        self._clear()
        self._device = adapter.device
        adapter.phase = self._observe
        self._hooks = [adapter.network.register_forward_hook(self._count_forward)]
        for module in adapter.network.modules():
            if isinstance(module, BYOLHeads):  # self-supervision differentiates no logits
                self._hooks.append(module.predictor.register_forward_hook(self._watch))
        self._started = time.perf_counter()

    def on_adapt_batch_start(
        self, trainer: Trainer, adapter: Adapter, batch: StreamBatch, batch_idx: int
    ) -> None:
        """Count the images."""
        self._batches += 1
        self._images += len(batch.labels)
        self._batch_seconds = 0.0

    def on_adapt_batch_end(
        self, trainer: Trainer, adapter: Adapter, logits: Tensor, batch: StreamBatch, batch_idx: int
    ) -> None:
        """Note how fast the batch was."""
        seconds = self._batch_seconds
        self.images_per_second = len(batch.labels) / seconds if seconds else None

    def on_adapt_end(self, trainer: Trainer, adapter: Adapter) -> None:
        """Stop observing."""
        self._wall += time.perf_counter() - self._started
        self._release(adapter)

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Stop observing."""
        self._wall += time.perf_counter() - self._started
        if isinstance(pl_module, Adapter):
            self._release(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return all figures so far."""
        wall = self._wall + time.perf_counter() - self._started
        return {"wall": wall, **{name: getattr(self, f"_{name}") for name in _ADDED}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the figures of a run that goes on; the time in between is nobody's."""
        for name in ("wall", *_ADDED):
            setattr(self, f"_{name}", state_dict[name])
        self._started = time.perf_counter()

    def summary(self) -> dict[str, Any]:
        """Return the figures under ``cost``; seconds and bytes."""
        seconds = sum(self._seconds.values())
        batches = max(self._batches, 1)
        phases = {
            name: {
                "seconds_per_batch": self._seconds_per_batch(name),
                "peak_memory_bytes": self._peaks.get(name),
            }
            for name in self._seconds
        }
        return {
            "cost": {
                "images_per_second": self._images / seconds if seconds else None,
                "images_per_second_with_loading": self._images / self._wall if self._wall else None,
                "forwards_per_batch": self._forwards / batches,
                "backwards_per_batch": self._backwards / batches,
                **phases,
            }
        }

    def _seconds_per_batch(self, phase: str) -> float:
        """Average over all batches but the first; a phase need not run in each of them."""
        if self._batches <= 1:
            return self._seconds[phase]
        return (self._seconds[phase] - self._first.get(phase, 0.0)) / (self._batches - 1)

    @contextmanager
    def _observe(self, phase: str) -> Iterator[None]:
        _reset_peak(self._device)
        _synchronise(self._device)
        self._counts = True
        start = time.perf_counter()
        try:
            yield
        finally:
            self._counts = False
        _synchronise(self._device)
        elapsed = time.perf_counter() - start
        self._batch_seconds += elapsed
        self._seconds[phase] = self._seconds.get(phase, 0.0) + elapsed
        if self._batches <= 1:
            self._first[phase] = self._seconds[phase]
        peak = _peak(self._device)
        if peak is not None:
            self._peaks[phase] = max(peak, self._peaks.get(phase, 0))

    def _count_forward(self, module: nn.Module, args: Any, logits: Any) -> None:
        self._forwards += self._counts
        self._watch(module, args, logits)

    def _watch(self, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(self._count_backward)

    def _count_backward(self, grad: Tensor) -> None:
        self._backwards += self._counts

    def _release(self, adapter: Adapter) -> None:
        adapter.phase = unobserved
        for hook in self._hooks:
            hook.remove()

    def _clear(self) -> None:
        self._device = torch.device("cpu")
        self._counts = False
        self._hooks = []
        self._batches = self._images = self._forwards = self._backwards = 0
        self._seconds: dict[str, float] = {}
        self._first: dict[str, float] = {}
        self._peaks: dict[str, int] = {}
        self._batch_seconds = self._wall = self._started = 0.0
        self.images_per_second = None


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        _CLEAR_REFS.write_text("5")  # Linux: resets the high-water mark of the resident set
    except OSError:
        return


def _peak(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    kilobytes = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    return int(kilobytes[0]) * 1024 if kilobytes else None
