"""Checkpoints of a running adaptation."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from tta_lightning import checkpoints
from tta_lightning.adapter import Adapter
from tta_lightning.callbacks.base import AdaptCallback
from tta_lightning.callbacks.cost import CostMonitor
from tta_lightning.callbacks.recorder import RunRecorder
from tta_lightning.checkpoints import check_same, path_of, write
from tta_lightning.describe import constructor_arguments, plain
from tta_lightning.errors import InputError
from tta_lightning.models.classifier import describe, weights_hash
from tta_lightning.runs import run_folder


class AdaptationCheckpoint(AdaptCallback):
    """Write checkpoints from which ``resume_from`` goes on as if nothing had happened.

    A checkpoint holds what adaptation changed (not the weights that stay), the state of the method
    and its rule, what the method learnt from clean images, STAG's anchors, the position in the
    stream and in ``predictions.csv``, the figures so far, and the random number generators of
    torch, NumPy and Python; and what run it belongs to, so that another one is refused. They lie in
    the folder ``checkpoints`` of the run, each written whole or not at all, with its checksum. A
    trainer without a run folder writes none.

    The first is written before the first batch and the last one after the last, whatever the
    options say. Of a run that is complete only the last one stays: the adapted model.

    Args:
        every_n_batches: How often; None for never in between.
        keep_last: How many are kept. Of two, one remains where the newest is damaged.
        on_segment: Also after the last batch of each segment.
        on_exception: Also where the run ends with an error between two batches, such as an image
            that cannot be read. In the middle of a batch there is nothing consistent to write.
        on_signal: Also where the process is told to end (SIGTERM, as SLURM does), after the batch.

    Raises:
        InputError: A number is not 1 or more.
    """

    def __init__(
        self,
        every_n_batches: int | None = 50,
        keep_last: int = 2,
        on_segment: bool = False,
        on_exception: bool = True,
        on_signal: bool = True,
    ) -> None:
        given = {"keep_last": keep_last}
        if every_n_batches is not None:
            given["every_n_batches"] = every_n_batches
        for name, value in given.items():
            if not isinstance(value, int) or value < 1:
                raise InputError(f"{name} = {value}: expected a whole number from 1 on.")
        self.every_n_batches, self.keep_last = every_n_batches, keep_last
        self._on_segment, self._on_exception, self._on_signal = on_segment, on_exception, on_signal
        self._run: dict[str, Any] = {}
        self._kept: list[Path] = []
        self._disk_failed = self._goes_on = False

    def on_adapt_start(self, trainer: Trainer, adapter: Adapter) -> None:
        """Note which run it is.

        Raises:
            InputError: It is to go on from a checkpoint of another one, or there are several of
                this callback.
        """
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        if sum(isinstance(callback, AdaptationCheckpoint) for callback in callbacks) > 1:
            raise InputError(
                "There is more than one AdaptationCheckpoint, and they would remove each other's "
                "files. Keep one."
            )
        self._kept, self._disk_failed, self._goes_on = [], False, False
        folder, loop = run_folder(trainer), trainer.test_loop
        if folder is None:
            return
        self._run = identity(trainer, adapter)
        resumed: Any = getattr(loop, "resumed", None)
        if resumed is not None:
            self._kept, self._goes_on = [path_of(folder, resumed["loop"]["drawn"])], True
            check_same(resumed["run"], self._run, self._kept[0])

    def on_adapt_boundary(self, trainer: Trainer, adapter: Adapter) -> None:
        """Write a checkpoint where one is due.

        Raises:
            InputError: It cannot be written; the one before it is as it was.
        """
        folder, loop = run_folder(trainer), trainer.test_loop
        if folder is None:
            return
        if self._goes_on:  # before a file is cut back to where this one stood
            self._goes_on = False
            self._remove_others(folder)
        if not self._is_due(loop, folder):
            return
        try:
            self._write(trainer, folder)
        except OSError as error:
            self._disk_failed = True
            then = "Make room, and begin again."
            if getattr(loop, "completed_batches", 0):
                then = (
                    f"The last good one is {self._kept[-1]}. Make room, then resume from {folder}."
                )
            raise InputError(
                f"A checkpoint cannot be written to {folder}: {error.strerror}. {then}"
            ) from error

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Write a checkpoint if the run stopped between two batches, and say where the last is."""
        loop: Any = trainer.test_loop
        folder = run_folder(trainer)
        if folder is None or not isinstance(pl_module, Adapter):
            return
        told = isinstance(exception, SIGTERMException)
        wanted = self._on_signal if told else self._on_exception
        between = getattr(loop, "between_batches", False) and not loop.ended
        if wanted and between and not self._disk_failed and self._is_new(loop, folder):
            try:
                self._write(trainer, folder)
            except (OSError, InputError) as error:  # what stopped the run is what the user hears of
                rank_zero_warn(f"No further checkpoint could be written: {error}")
        if self._kept and int(getattr(loop, "completed_batches", 0)):
            rank_zero_info(f"Checkpoint: {self._kept[-1]}. resume_from={folder} goes on there.")

    def describe(self) -> dict[str, Any]:
        """Return the options, for the manifest."""
        return {
            "every_n_batches": self.every_n_batches,
            "keep_last": self.keep_last,
            "on_segment": self._on_segment,
            "on_exception": self._on_exception,
            "on_signal": self._on_signal,
        }

    def _is_due(self, loop: Any, folder: Path) -> bool:
        if not self._is_new(loop, folder):
            return False
        if loop.drawn == 0 or loop.ended:
            return True
        if self.every_n_batches is not None and loop.drawn % self.every_n_batches == 0:
            return True
        return self._on_segment and loop.segment is not None and loop.served == loop.segment.stop

    def _is_new(self, loop: Any, folder: Path) -> bool:
        """Whether this state has no checkpoint yet; the end of a run is a state of its own."""
        newest = self._kept[-1] if self._kept else None
        return loop.ended or newest != path_of(folder, loop.drawn)

    def _write(self, trainer: Trainer, folder: Path) -> None:
        loop: Any = trainer.test_loop
        path = path_of(folder, loop.drawn)
        path.parent.mkdir(exist_ok=True)
        write(path, {**loop.state(), "run": self._run})
        if path not in self._kept:
            self._kept.append(path)
        finished = loop.ended and loop.plan is not None and loop.served >= len(loop.plan)
        self._kept = self._kept[-1:] if finished else self._kept[-self.keep_last :]
        self._remove_others(folder)

    def _remove_others(self, folder: Path) -> None:
        """Remove checkpoints that are too many, of a time that is over, or half written."""
        parts = checkpoints.half_written(folder)
        for other in [*checkpoints.stored(folder), *parts]:
            if other not in self._kept:
                other.unlink()


def identity(trainer: Trainer, adapter: Adapter) -> dict[str, Any]:
    """Say which run a trainer runs: all that has to be the same for its results to be.

    Args:
        trainer: With its callbacks and its data module.
        adapter: The method, standing at its source model.

    Returns:
        Plain values: method and hyper-parameters, model, stream, callbacks, precision.
    """
    stream: Any = getattr(trainer, "datamodule", None)
    info = describe(adapter.network)
    learns, rule = bool(adapter.adapted_parameters), adapter.rule
    return {
        "method": {
            "name": type(adapter).__name__,
            **constructor_arguments(adapter, skip=("network", "rule")),
            "classes": None if adapter.classes is None else adapter.classes.tolist(),
        },
        "rule": {**rule.describe(), "weights_sha256": weights_hash(rule)} if learns else {},
        "model": {
            "name": info.name,
            "weights_sha256": weights_hash(adapter.network),
            "mean": plain(info.mean),
            "std": plain(info.std),
        },
        "stream": stream.describe() if hasattr(stream, "describe") else {},
        "callbacks": _options(trainer.callbacks),  # type: ignore[attr-defined]
        "precision": str(trainer.precision),
    }


def _options(callbacks: list[Any]) -> dict[str, Any]:
    """Return the options of the callbacks that can change a result, by their class."""
    seen: Counter[str] = Counter()
    found = {}
    for callback in callbacks:
        if isinstance(callback, AdaptCallback) and not isinstance(callback, _FREE):
            name = type(callback).__name__
            seen[name] += 1
            found[name if seen[name] == 1 else f"{name} ({seen[name]})"] = callback.describe()
    return found


_FREE = (AdaptationCheckpoint, CostMonitor, RunRecorder)  # whose options change no result
