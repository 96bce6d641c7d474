"""Find published weights in the local caches, and fail within seconds when there is no network.

The hub's own client retries for most of a minute before it gives up, and torch.hub sets no time
limit at all.
"""

from __future__ import annotations

import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import constants, try_to_load_from_cache

from tta_lightning.errors import InputError

CONNECT_SECONDS = 5.0


def cached_hub_file(repository: str, filename: str | None) -> str | None:
    """Return the path of a model's weights in the Hugging Face cache, or None.

    Args:
        repository: Hub id, with an optional ``@revision``.
        filename: Name of the weight file; by default ``pytorch_model.bin``. Its safetensors
            counterpart is preferred, as timm does.
    """
    name, _, revision = repository.partition("@")
    filename = filename or "pytorch_model.bin"
    for candidate in (filename.replace("pytorch_model.bin", "model.safetensors"), filename):
        found = try_to_load_from_cache(name, candidate, revision=revision or None)
        if isinstance(found, str):
            return found
    return None


def cached_torch_file(url: str) -> Path | None:
    """Return the path of a file in torch.hub's cache, or None."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(urllib.parse.urlparse(url).path).name
    return path if path.is_file() else None


@contextmanager
def downloading(model: str, url: str | None = None) -> Iterator[None]:
    """Turn a failed download inside the block into one sentence.

    Args:
        model: The model's spec, for the message.
        url: A host that has to be reachable; by default that of the Hugging Face hub.

    Raises:
        InputError: The host cannot be reached, or the download fails.
    """
    try:
        _check_connection(url or constants.ENDPOINT)
        yield
    except OSError as error:  # the hub's, urllib's and socket errors all derive from it
        raise InputError(
            f"The weights of {model!r} could not be downloaded ({type(error).__name__}). Give a "
            "local file with `weights: path/to/file`, or take random weights with "
            "`pretrained: false`."
        ) from error


def _check_connection(url: str) -> None:
    """Open and close a connection to the host.

    Nothing is tried where a proxy makes the connections, or where HF_HUB_OFFLINE lets the hub's
    client fail at once by itself.

    Raises:
        OSError: There is no connection.
    """
    if constants.HF_HUB_OFFLINE and url == constants.ENDPOINT:
        return
    if {"https", "all"} & urllib.request.getproxies().keys():
        return
    parts = urllib.parse.urlparse(url)
    port = parts.port or (80 if parts.scheme == "http" else 443)
    socket.create_connection((parts.hostname or "", port), timeout=CONNECT_SECONDS).close()
