"""The images of a run that is over: its stream, built again."""

from __future__ import annotations

from typing import Any

from jsonargparse import get_loader
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningArgumentParser

from tta_lightning.data.geometry import Geometry
from tta_lightning.data.stream import Stream
from tta_lightning.errors import InputError
from tta_lightning.report.run import Run


def stream_of(run: Run) -> Stream:
    """Build the stream of a run again, from the ``config.yaml`` in its folder.

    Args:
        run: A run that was made by ``tta adapt``.

    Returns:
        The stream, with the geometry that the images had.

    Raises:
        InputError: The run has no configuration, or its images are not there, or are others.
    """
    path = run.folder / "config.yaml"
    if not path.is_file():
        raise InputError("it was not made by `tta adapt`, so its images are not known")
    try:
        stream = _build(path.read_text(encoding="utf-8"))
        said = run.settings["stream"]
        if not isinstance(stream, Stream) or said is None:
            raise InputError("its data are a module of its own, not a Stream")
        if stream.source.describe().get("digest") != said["source"].get("digest"):
            raise InputError("they have changed since")
        stream.geometry = Geometry(**said["geometry"])
    except Exception as error:  # also of a user's own classes: the report goes on without images
        raise InputError(
            f"they cannot be had ({_reason(error)}). Relative paths are taken from the folder that "
            "one stands in, as when the run was started"
        ) from error
    return stream


def _build(text: str) -> Any:
    """Make the data module that a configuration describes."""
    values = get_loader("yaml")(text)
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data", required=False)
    config = parser.parse_object({"data": values["data"]})
    return parser.instantiate_classes(config).data


def _reason(error: BaseException) -> str:
    """Return the sentence of ours inside what a parser says, else the parser's first line."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, InputError):
            return str(inner).rstrip(".")
        inner = inner.__cause__ or inner.__context__
    return f"{type(error).__name__}: {error}".partition("\n")[0]
