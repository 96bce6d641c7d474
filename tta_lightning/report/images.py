"""The images of a run that is over: its stream, built again."""

from __future__ import annotations

from typing import Any

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
    stream = _build(path.read_text(encoding="utf-8"))
    said = run.settings["stream"]
    if not isinstance(stream, Stream) or said is None:
        raise InputError("its data are a module of its own, not a Stream")
    if stream.source.describe().get("digest") != said["source"].get("digest"):
        raise InputError("its images have changed since")
    stream.geometry = Geometry(**said["geometry"])
    return stream


def _build(text: str) -> Any:
    """Make the data module that a configuration describes."""
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data", required=False)
    try:
        config = parser.parse_object({"data": _values(text).get("data")})
        return parser.instantiate_classes(config).data
    except InputError:
        raise
    except Exception as error:  # whatever the user's own classes raise: the report goes on
        raise InputError(f"its images cannot be had: {error}") from error


def _values(text: str) -> dict[str, Any]:
    """Read a configuration as plain values."""
    from jsonargparse import get_loader

    values = get_loader("yaml")(text)
    return values if isinstance(values, dict) else {}
