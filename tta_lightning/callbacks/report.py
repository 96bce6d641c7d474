"""A page about the run, in its folder."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from tta_lightning.callbacks.base import AdaptCallback
from tta_lightning.data.stream import Stream
from tta_lightning.errors import InputError
from tta_lightning.report.run import Run
from tta_lightning.runs import run_folder, write_atomically


class RunReport(AdaptCallback):
    """Write ``report.html`` into the run folder: what ``tta report`` says of this one run.

    A page that needs no network: curves, predicted classes and entropy along the stream, classes,
    calibration (where there are labels), sample images, the manifest. ``tta report`` puts several
    runs into one, beside the source model. It takes a few seconds and one megabyte, so a comparison
    of many runs does without it.

    Args:
        filename: Name of the file in the run folder.
        images: Whether to show sample images.
    """

    def __init__(self, filename: str = "report.html", images: bool = True) -> None:
        self.filename = filename
        self.images = images

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the page, once the figures of the run are there."""
        folder = run_folder(trainer)
        if folder is None or not (folder / "metrics.json").is_file():
            return
        from tta_lightning.report.detail import Pictures  # takes two seconds to import
        from tta_lightning.report.page import Page

        stream: Any = getattr(trainer, "datamodule", None)

        def pictures(run: Run) -> Pictures:
            if not isinstance(stream, Stream):
                raise InputError("the data are no Stream")
            return Pictures(stream.image, stream.classes)

        try:
            run = Run.load(folder)
            page = Page([run], [folder.name], folder.name, pictures if self.images else None)
            write_atomically(folder / self.filename, page.html())
        except Exception as error:  # whatever it is: the run itself is whole
            rank_zero_warn(f"{self.filename} could not be written: {type(error).__name__}: {error}")
            return
        rank_zero_info(f"report: {folder / self.filename}")
