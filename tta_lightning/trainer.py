"""Lightning's trainer with a third verb: fit, test, adapt."""

from __future__ import annotations

import errno
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, ProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.utilities import rank_zero_only

from tta_lightning.adapter import Adapter
from tta_lightning.callbacks import (
    AdaptationCheckpoint,
    AdaptationProgress,
    AdaptCallback,
    CostMonitor,
    PredictionWriter,
    RunRecorder,
    StreamMetrics,
)
from tta_lightning.checkpoints import LAST, Resumable, find, is_complete, read_newest
from tta_lightning.data.stream import Stream
from tta_lightning.errors import InputError
from tta_lightning.loops import AdaptationLoop
from tta_lightning.models.classifier import describe
from tta_lightning.runs import locked, reserved, unused_folder

PRECISIONS = ("32-true", "64-true", "bf16-mixed", "bf16-true")
_SHORT_PRECISIONS = ("32", "64", "bf16")  # what Lightning takes for some of them
_NAMED_CHECKPOINTS = ("best", "last", "hpc")  # Lightning looks for them itself
_DEFAULTS: tuple[type[AdaptCallback], ...] = (
    StreamMetrics,
    CostMonitor,
    PredictionWriter,
    AdaptationCheckpoint,
    RunRecorder,
)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a full disk, a quota, a limit of the file


class Trainer(pl.Trainer):
    """A :class:`lightning.pytorch.Trainer` that can also :meth:`adapt`.

    Every ``fit`` and every ``adapt`` writes one run folder. ``adapt`` runs the callbacks
    StreamMetrics, CostMonitor, PredictionWriter, AdaptationCheckpoint and RunRecorder besides those
    given; one of yours of the same class takes the place of the default one.

    Args:
        run_dir: The run folder; it must not exist yet. None makes a new one under ``runs/`` named
            after the time. False writes nothing at all.
        logger: As in Lightning; by default a CSV logger in the ``logs`` folder of the run.
        callbacks: As in Lightning.
        enable_progress_bar: As in Lightning; the default bar is a rich one.
        kwargs: Everything else that Lightning's trainer takes.
    """

    callbacks: list[Callback]
    fast_dev_run: bool | int

    def __init__(
        self,
        *,
        run_dir: bool | str | Path | None = None,
        logger: Logger | Iterable[Logger] | bool | None = None,
        callbacks: list[Callback] | Callback | None = None,
        enable_progress_bar: bool | None = None,
        **kwargs: Any,
    ) -> None:
        given = [callbacks] if isinstance(callbacks, Callback) else list(callbacks or [])
        _check_callbacks(given)
        shown = enable_progress_bar is not False and not kwargs.get("barebones", False)
        if shown and not any(isinstance(callback, ProgressBar) for callback in given):
            given.append(AdaptationProgress())
        self.run_dir = run_dir
        self.run_folder: Path | None = None
        self._own_logger = logger is None or logger is True
        self._precision_asked = kwargs.get("precision")  # Lightning may silently take another
        super().__init__(
            logger=False if self._own_logger else logger,
            callbacks=given,
            enable_progress_bar=enable_progress_bar,
            **kwargs,
        )

    def adapt(
        self,
        model: Adapter,
        dataloaders: Any = None,
        datamodule: pl.LightningDataModule | None = None,
        resume_from: str | Path | None = None,
    ) -> dict[str, Any]:
        """Adapt a classifier online: predict each batch of a stream, then learn from it.

        The adapter starts from its source model, whatever it did before. Labels of the stream are
        used for metrics alone.

        A run that was interrupted goes on in its folder with ``resume_from`` and otherwise the same
        arguments: it ends with the predictions, figures and weights that it would have had.

        Args:
            model: The method.
            dataloaders: A DataLoader of image batches ``[B, 3, H, W]``, alone or with labels.
            datamodule: A :class:`~tta_lightning.data.Stream`, instead of ``dataloaders``.
            resume_from: A run folder, one of its checkpoints, or ``last`` for the newest run under
                ``runs/``; see :class:`~tta_lightning.callbacks.AdaptationCheckpoint`.

        Returns:
            The figures that ``metrics.json`` holds.

        Raises:
            InputError: Something given does not fit; the message says what and what to do.
        """
        self._check(model, dataloaders if datamodule is None else datamodule)
        _suit(datamodule, model)
        before = None if resume_from is None else self._find(resume_from, datamodule)
        test_loop, callbacks = self.test_loop, list(self.callbacks)
        self.callbacks = _with_defaults(callbacks)
        self.should_stop = False  # an earlier run may have been stopped
        try:
            with self._run_folder(self._has_predicted, before), _room_on_disk(), _quiet():
                loop = AdaptationLoop(self, _state(before, resume_from))
                self.test_loop = loop
                if loop.resumed is not None:
                    datamodule.start = loop.resumed["loop"]["served"]  # type: ignore[union-attr]
                super().test(model, dataloaders=dataloaders, datamodule=datamodule, verbose=False)
                if loop.completed_batches == 0:
                    reason = f": {loop.bad_images[0][1]}" if loop.bad_images else "."
                    raise InputError(f"The stream gave no image that could be used{reason}")
                recorders = [c for c in self.callbacks if isinstance(c, RunRecorder)]
                return recorders[0].results(self)
        finally:
            self.test_loop, self.callbacks = test_loop, callbacks
            if isinstance(datamodule, Stream):
                datamodule.start = 0

    def fit(self, model: pl.LightningModule, *args: Any, **kwargs: Any) -> None:
        """Train a model on labelled source data; see Lightning's trainer."""
        _suit(kwargs.get("datamodule") or next(iter(args), None), model)
        self._check_fit(model, kwargs.get("ckpt_path"))
        own = [c for c in self.callbacks if isinstance(c, ModelCheckpoint) and c.dirpath is None]
        with self._run_folder(lambda: self.global_step > 0), _quiet():
            if getattr(model, "chooses_modes", False):
                warnings.filterwarnings("ignore", message=".*in eval mode at the start of.*")
            for callback in own:
                if self.run_folder is not None:
                    callback.dirpath = str(self.run_folder / "checkpoints")
            try:
                super().fit(model, *args, **kwargs)
            finally:
                for callback in own:  # the next fit has a folder of its own
                    callback.dirpath = None

    def test(self, model: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Measure a trained model on labelled test images."""
        _suit(kwargs.get("datamodule") or next(iter(args), None), model)
        with _quiet():
            return super().test(model, *args, **kwargs)

    def validate(self, model: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Measure a trained model on labelled validation images."""
        _suit(kwargs.get("datamodule") or next(iter(args), None), model)
        with _quiet():
            return super().validate(model, *args, **kwargs)

    def _has_predicted(self) -> bool:
        return getattr(self.test_loop, "completed_batches", 0) > 0

    def _find(self, resume_from: str | Path, stream: Any) -> Resumable:
        """Find the run to resume.

        Raises:
            InputError: There is none, or this trainer or these data cannot go on with it.
        """
        if not isinstance(stream, Stream):
            raise InputError(
                "resume_from needs a Stream, whose plan says where a run stood. What a plain "
                "dataloader would give next is not known: begin a new run."
            )
        if self.run_dir is False or self.fast_dev_run:
            raise InputError("resume_from goes on in a run folder: leave run_dir: false out.")
        found = find(resume_from)
        if isinstance(self.run_dir, str | Path) and (
            Path(self.run_dir).resolve() != found.folder.resolve()
        ):
            raise InputError(
                f"A run goes on in its own folder {found.folder}, but run_dir is {self.run_dir}. "
                "Leave run_dir out, or set it to null where a file says so."
            )
        return found

    @contextmanager
    def _run_folder(
        self, has_results: Callable[[], bool], before: Resumable | None = None
    ) -> Iterator[None]:
        if before is not None:
            with locked(before.folder):
                self.run_folder = before.folder
                if self._own_logger:
                    self.loggers = [CSVLogger(before.folder, name="logs", version=_next(before))]
                yield
            return
        is_first = getattr(rank_zero_only, "rank", 0) == 0  # of several processes one writes
        if self.run_dir is False or self.fast_dev_run or not is_first:
            self.run_folder = None
            yield
            return
        automatic = self.run_dir is None or self.run_dir is True
        folder = unused_folder() if automatic else Path(str(self.run_dir))
        with reserved(folder, has_results):
            self.run_folder = folder
            if self._own_logger:
                self.loggers = [CSVLogger(folder, name="logs", version="")]
            yield

    def _check_fit(self, model: pl.LightningModule, checkpoint: Any) -> None:
        if not model.automatic_optimization and (
            self.gradient_clip_val is not None or self.accumulate_grad_batches != 1
        ):
            raise InputError(
                f"{type(model).__name__} takes its optimizer steps itself: leave gradient_clip_val "
                "and accumulate_grad_batches of the trainer out (the module has `clip`)."
            )
        is_elsewhere = "://" in str(checkpoint) or str(checkpoint).startswith("registry")
        if checkpoint in (None, *_NAMED_CHECKPOINTS) or is_elsewhere:
            return
        if not Path(checkpoint).is_file():
            raise InputError(f"There is no checkpoint {str(checkpoint)!r} to resume from.")

    def _check(self, model: Adapter, data: Any) -> None:
        if not isinstance(model, Adapter):
            raise InputError(
                f"adapt needs a test-time adaptation method such as Tent(network), got "
                f"{type(model).__name__}. Use fit, validate or test for other modules."
            )
        if data is None:
            raise InputError("adapt needs a stream: give datamodule=Stream(...) or dataloaders.")
        for precision in (str(self._precision_asked or self.precision), str(self.precision)):
            if precision not in PRECISIONS and precision not in _SHORT_PRECISIONS:
                raise InputError(
                    f"adapt does not support precision {precision!r}: it has no loss scaling. Use "
                    f"one of {', '.join(PRECISIONS)}."
                )
        if "bf16-true" in (str(self._precision_asked), str(self.precision)):
            warnings.warn(
                "bf16-true keeps 8 bits of each parameter, so small updates of weights near 1 are "
                "lost. bf16-mixed keeps the parameters in float32.",
                stacklevel=3,
            )
        if self.world_size > 1:
            raise InputError(
                f"adapt serves one stream on one device, got {self.world_size} of them. Set "
                "devices: 1, and run independent streams as independent runs."
            )


def _state(before: Resumable | None, resume_from: Any) -> dict[str, Any] | None:
    """Read the newest checkpoint of a run that is whole; None where the run begins.

    Raises:
        InputError: There is none that is whole, or the run is complete.
    """
    if before is None:
        return None
    # once more, now that no other process writes to it
    files = find(before.folder if str(resume_from) == LAST else resume_from).files
    if not files:  # it was interrupted before its first batch: what it began is replaced
        return None
    _, state = read_newest(files)
    if state["loop"]["finished"] and is_complete(before.folder):
        raise InputError(
            f"The run {before.folder} is complete: there is nothing to resume. Its results are in "
            "metrics.json."
        )
    return state


def _next(before: Resumable) -> str:
    """Name the folder of the loggers of a process that goes on: each has its own."""
    number = 2
    while any((before.folder / "logs" / f"resumed_{number}").glob("*")):
        number += 1
    return f"resumed_{number}"


@contextmanager
def _room_on_disk() -> Iterator[None]:
    """Turn the error of a full disk into a sentence."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        where = f" to {error.filename}" if error.filename else ""
        raise InputError(
            f"Nothing more can be written{where}: {error.strerror}. What was written before is as "
            "it was. Make room; a run that has predicted something goes on with resume_from."
        ) from error


def _suit(data: Any, model: Any) -> None:
    """Tell a data module of ours what size of images the model's network was made for."""
    network = getattr(model, "network", None)
    if hasattr(data, "suit") and network is not None:
        info = describe(network)
        data.suit(info.input_size, info.crop_pct, info.interpolation)


def _check_callbacks(callbacks: list[Callback]) -> None:
    """Refuse a callback of ours that was given twice, in a sentence."""
    names = [c.state_key for c in callbacks if isinstance(c, AdaptCallback)]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"The callback {twice} was given twice with the same options. Keep one.")


def _with_defaults(callbacks: list[Callback]) -> list[Callback]:
    """Add the default callbacks that are missing, and bring them in order.

    The checkpoint comes first, because after an error the others let go of what it saves; the
    recorder reads what the others found, so it is last.
    """
    missing = [c for c in _DEFAULTS if not any(isinstance(given, c) for given in callbacks)]
    complete = [*callbacks, *(default() for default in missing)]
    return sorted(
        complete,
        key=lambda callback: (
            isinstance(callback, RunRecorder) - isinstance(callback, AdaptationCheckpoint)
        ),
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence advice on worker processes, and a deprecation inside Lightning 2.6 on torch 2.15."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", module="lightning")
        # of the checkpoints of a training that is over
        warnings.filterwarnings("ignore", message=".*The dirpath has changed from.*")
        # a module that takes its steps itself has nothing to save before them
        warnings.filterwarnings("ignore", message=".*no pre-optimization state.*")
        # lightning 2.6 gathers with a function that torch 2.15 deprecates
        warnings.filterwarnings("ignore", message=".*all_gather is deprecated.*")
        yield
