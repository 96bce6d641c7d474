"""Answering requests with a network that learns from them."""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any, Self

import torch
from torch import Tensor

from tta_lightning.adapter import Adapter
from tta_lightning.contract import StepReport
from tta_lightning.errors import InputError
from tta_lightning.functional import all_finite
from tta_lightning.serving.backlog import Backlog, Gatherer
from tta_lightning.serving.contract import (
    Answer,
    Guard,
    ServingStatistics,
    Updates,
    as_parameters,
    check_images,
    check_options,
)
from tta_lightning.snapshots import Snapshot, capture, restore

_LOG = logging.getLogger(__name__)
_BEFORE = "before update"  # value of Adapter.predicts
_FORMAT = 1  # of the state_dict


class OnlineClassifier:
    """Predicts for many threads at once, and learns from what it predicts.

    In line, a request is predicted and learnt from by one ``adapt_step``; requests wait for each
    other. In the background, requests are predicted by the adapter, while a thread updates a copy
    of it (so there are two networks in memory) and hands over what moved after each step; when it
    falls behind, the newest images are dropped. Predictions run one at a time in either case: a
    network that adapts is not made for several forward passes at once.

    An update that fails never fails a prediction: it is undone, logged and counted. Nothing else
    may use the adapter meanwhile.

    Args:
        adapter: The method; it goes on from where it stands.
        updates: ``"inline"`` or ``"background"``.
        update_size: Images an update; requests are then only predicted, and their images gathered
            until there are this many of one size. None for one update a request.
        queue_size: How many updates may wait in the background.
        guard: Is shown each step, such as a detector of collapse; None for none.

    Raises:
        InputError: An argument is out of range, or the method learns from the very image that it
            predicts, so that it cannot learn later.
    """

    def __init__(
        self,
        adapter: Adapter,
        updates: Updates = "inline",
        update_size: int | None = None,
        queue_size: int = 16,
        guard: Guard | None = None,
    ) -> None:
        check_options(adapter, updates, update_size, queue_size)
        adapter.ready()
        inline = updates == "inline"
        self._adapter = adapter
        self._learner = adapter if inline else copy.deepcopy(adapter)
        self._learner.ready()
        self._guard = guard
        self._at_once = inline and update_size is None
        # Whoever needs several takes them in this order: learning, predicting, gathering.
        self._predicting = threading.RLock()
        self._learning = self._predicting if inline else threading.RLock()
        self._gathering = threading.RLock()
        self._counting = threading.Lock()
        self._gatherer = Gatherer(update_size)
        self._backlog = Backlog(queue_size)
        self._statistics = ServingStatistics()
        self._saved: Snapshot | None = None
        self._adapting, self._closed = True, False
        self._worker: threading.Thread | None = None
        if not inline:
            self._worker = threading.Thread(target=self._work, name="tta-updates", daemon=True)
            self._worker.start()

    # Predicting ----------------------------------------------------------------------------------

    def predict(self, images: Tensor) -> Tensor:
        """Predict a request, and learn from it now or later.

        Args:
            images: ``[B, 3, H, W]``, floating point in [0, 1].

        Returns:
            Probabilities ``[B, C]`` float32 on the device of the images, without graph. They are
            NaN where the network gives NaN.

        Raises:
            InputError: The images are no such tensor, or the classifier is closed; nothing changed.
        """
        return self.answer(images).probabilities

    def answer(self, images: Tensor) -> Answer:
        """Do what :meth:`predict` does, and say which version of the weights made the prediction.

        Raises:
            InputError: As there.
        """
        check_images(images)
        with _plain_mode(), torch.no_grad():
            own = as_parameters(images.detach(), self._adapter)
            logits, version = self._answer(own)
            probabilities = logits.detach().float().softmax(dim=1).to(images.device)
        self._count(images=len(images), predictions=1)
        return Answer(probabilities, version)

    def _answer(self, images: Tensor) -> tuple[Tensor, int]:
        """Return logits ``[B, C]`` and the version of the weights that they are of."""
        with self._predicting:
            self._check_open()
            if self._at_once and self._adapting:
                before = self._statistics.version
                learnt = self._update(images)
                if learnt is not None:
                    logits, after = learnt
                    return logits, before if self._adapter.predicts == _BEFORE else after
            logits, version = self._adapter(images), self._statistics.version
            if self._worker is None:
                for chunk in self._gather(images):
                    self._update(chunk)
        if self._worker is not None:
            self._enqueue(images)
        return logits, version

    # Learning ------------------------------------------------------------------------------------

    def _update(self, images: Tensor) -> tuple[Tensor, int] | None:
        """Make one step under the lock of the learner, and undo it if it fails.

        Returns:
            Logits ``[B, C]`` and the version after the step; None if it was undone.
        """
        learner, before = self._learner, None
        try:
            before = capture(learner)
            with torch.enable_grad():
                logits = learner.adapt_step(images)
            report = learner.report
            sound = report.finite or report.updated or report.failed > 0
            if not sound:
                restore(learner, before)
            elif not _has_finite_weights(learner):
                raise FloatingPointError("the update left weights that are not finite")
            alarm = self._ask_guard(images, logits)
        except BaseException as error:
            if before is not None:
                restore(learner, before)
            if not isinstance(error, Exception):  # such as KeyboardInterrupt
                raise
            first = self._statistics.failed_updates == 0  # later ones get a line each
            self._count(failed_updates=1)
            _LOG.warning("An update failed and was undone: %s", error, exc_info=first)
            return None
        version = self._note_step(report, alarm)
        return (logits, version) if sound else None

    def _ask_guard(self, images: Tensor, logits: Tensor) -> object | None:
        if self._guard is None:
            return None
        with torch.enable_grad():
            return self._guard.after_update(self._learner, images, logits.detach())

    def _note_step(self, report: StepReport, alarm: object | None) -> int:
        """Count a step and hand over what moved; returns the version before the guard acted."""
        moved = (report.updated or report.reset) and not self._learner.episodic
        changes = int(moved) + int(alarm is not None)
        elsewhere = changes and self._learner is not self._adapter
        after = capture(self._learner) if elsewhere else None
        with self._predicting:
            if after is not None:
                restore(self._adapter, after)
            version = self._statistics.version + int(moved)
            self._count(
                updates=int(report.updated),
                skipped_updates=int(not report.updated),
                alarms=int(alarm is not None),
                version=changes,
            )
        if alarm is not None:
            _LOG.warning("The guard raised an alarm: %s", alarm)
        return version

    def _work(self) -> None:
        """Learn from what is queued until the classifier is closed."""
        while self._backlog.wait_for_work():
            # taken out under the lock only: a reset that comes first leaves nothing to take
            with self._learning, _plain_mode(), torch.no_grad():
                images = self._backlog.take()
                try:
                    if images is not None:
                        self._update(images)
                except BaseException:  # in a thread it would end learning without a word
                    self._count(failed_updates=1)
                    _LOG.exception("An update could not be handed over.")
                finally:
                    self._backlog.done()

    # Gathering -----------------------------------------------------------------------------------

    def _gather(self, images: Tensor) -> list[Tensor]:
        """Keep images ``[B, 3, H, W]``; returns the chunks that are complete with them."""
        if not self._adapting or self._at_once:
            return []
        chunks, dropped = self._gatherer.add(images)
        self._count(dropped_images=dropped)
        return chunks

    def _enqueue(self, images: Tensor) -> None:
        """Queue what a request completes; the newest is dropped where there is no place left."""
        with self._gathering:
            for chunk in self._gather(images):
                if not self._backlog.offer(chunk):
                    self._count(dropped_images=len(chunk))

    def _forget_waiting(self) -> None:
        with self._gathering:
            self._count(dropped_images=self._gatherer.clear() + self._backlog.clear())

    # Control -------------------------------------------------------------------------------------

    @property
    def statistics(self) -> ServingStatistics:
        """What was done so far."""
        return self._statistics

    @property
    def adapting(self) -> bool:
        """Whether the model learns. Switching it off drops the images that wait."""
        return self._adapting

    @adapting.setter
    def adapting(self, value: bool) -> None:
        with self._learning, self._predicting, self._gathering:
            self._adapting = bool(value)
            if not value:
                self._forget_waiting()

    def snapshot(self) -> Snapshot:
        """Copy all that adaptation has changed, and remember it for :meth:`rollback`."""
        with self._learning, _plain_mode():
            self._saved = capture(self._learner)
            return copy.deepcopy(self._saved)

    def rollback(self, snapshot: Snapshot | None = None) -> None:
        """Return bit for bit to a snapshot; images that wait are dropped.

        Args:
            snapshot: What :meth:`snapshot` returned; None for its last one, or for the source model
                where there is none.

        Raises:
            InputError: It is of another method or network; nothing changed.
        """
        with self._moving_elsewhere():
            target = self._saved if snapshot is None else snapshot
            if target is None:
                self._learner.reset()
            else:
                restore(self._learner, target)

    def reset(self) -> None:
        """Return bit for bit to the source model; images that wait are dropped."""
        with self._moving_elsewhere():
            self._learner.reset()

    def state_dict(self) -> dict[str, Any]:
        """Return what a new process needs to go on: tensors and plain values only.

        Holds what moves, the state of the method, the counters, whether it adapts, and the last
        snapshot; neither the weights that stay, nor images that wait, nor the state of the guard.
        """
        with self._learning, _plain_mode():
            return {
                "format": _FORMAT,
                "adapter": capture(self._learner),
                "saved": copy.deepcopy(self._saved),
                "adapting": self._adapting,
                "statistics": asdict(self._statistics),
            }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state; images that wait are dropped. The version never goes back.

        Args:
            state: What :meth:`state_dict` returned, of the same method on the same network.

        Raises:
            InputError: It is of something else; nothing changed.
        """
        try:
            known = ServingStatistics(**state["statistics"])
            adapter, saved, adapting = state["adapter"], state["saved"], bool(state["adapting"])
            if state["format"] != _FORMAT:
                raise ValueError(state["format"])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                "This is not the state of an OnlineClassifier of this version. Expected what its "
                "state_dict() returned."
            ) from error
        with self._moving_elsewhere():
            restore(self._learner, adapter)
            self._saved, self._adapting = copy.deepcopy(saved), adapting
            with self._counting:
                reached = max(self._statistics.version, known.version - 1)  # and one for the change
                self._statistics = replace(known, version=reached)

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until every queued update is made; an incomplete one goes on waiting for images.

        Args:
            timeout: In seconds; None to wait for as long as it takes.

        Returns:
            Whether the queue was emptied in time.
        """
        return self._backlog.wait_until_done(timeout)

    def close(self) -> None:
        """Stop learning and answering; images that wait are dropped. Call it as often as you like.

        Call :meth:`flush` before to learn from all that is queued.
        """
        with self._predicting:
            self._closed = True
        self._backlog.close()
        self._forget_waiting()
        if self._worker is not None and self._worker is not threading.current_thread():
            self._worker.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @contextmanager
    def _moving_elsewhere(self) -> Iterator[None]:
        """Let the learner go to other weights, and everything else with it."""
        with self._learning, self._predicting, self._gathering, _plain_mode():
            yield
            self._forget_waiting()
            if self._learner is not self._adapter:
                restore(self._adapter, capture(self._learner))
            self._count(version=1)
            note_reset = getattr(self._guard, "note_reset", None)
            if callable(note_reset):
                note_reset()

    def _check_open(self) -> None:
        if self._closed:
            raise InputError("This classifier is closed. Make a new one to predict again.")

    def _count(self, **more: int) -> None:
        with self._counting:
            now = asdict(self._statistics)
            self._statistics = replace(
                self._statistics, **{name: now[name] + number for name, number in more.items()}
            )


def _has_finite_weights(adapter: Adapter) -> bool:
    """Look at what moves in the network; averages of a method may be NaN until there is one."""
    moving = adapter.moving_tensors()
    return all_finite(*(moving[name] for name in moving if name.startswith("network.")))


@contextmanager
def _plain_mode() -> Iterator[None]:
    """Make tensors that can be written to later, whatever mode the caller is in."""
    with torch.inference_mode(False):
        yield
