"""Read weight files without running code from them, and load them with nothing left over."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tta_lightning.errors import InputError, nearest_path
from tta_lightning.models.classifier import describe

CHECKPOINT_KEY = "tta_lightning"  # the entry that marks a checkpoint as ours
SUFFIXES = (".pt", ".pth", ".th", ".ckpt", ".bin", ".safetensors")
# Under which key other people's training scripts keep the weights.
WRAPPER_KEYS = ("state_dict", "model", "model_state_dict")
SHOWN = 10  # how many wrong names an error lists


def is_file(path: str | Path) -> bool:
    """Say whether there is such a file; a name that none can have, too long a one, is none."""
    try:
        return Path(path).is_file()
    except OSError:
        return False


def read_file(path: str | Path) -> Any:
    """Read a weight file or checkpoint to the CPU.

    Args:
        path: A ``.safetensors`` file, or a ``torch.save`` file of tensors and plain values.

    Returns:
        What the file holds, usually a dict.

    Raises:
        InputError: The file is missing, of another kind, damaged, or carries Python code.
    """
    path = Path(path)
    if not is_file(path):
        raise InputError(
            f"There is no weight file {str(path)!r}.{nearest_path(path)} Give the path of an "
            "existing file; `tta fit` writes best.ckpt into the checkpoints of its run folder."
        )
    if path.suffix not in SUFFIXES:
        raise InputError(
            f"The weight file {str(path)!r} has the suffix {path.suffix!r}; expected one of "
            f"{', '.join(SUFFIXES)}."
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise nearly anything
        if "Unsupported" in str(error):
            raise InputError(
                f"The weight file {str(path)!r} is a pickle that carries Python code, which is not "
                "run. Expected tensors and plain values only: save `model.state_dict()` instead of "
                "the model."
            ) from error
        raise InputError(
            f"The weight file {str(path)!r} cannot be read ({type(error).__name__}): it is damaged "
            "or not what its suffix says. Download or save it again."
        ) from error


class WeightFile(NamedTuple):
    """What a weight file holds.

    Attributes:
        tensors: State dict of the bare network.
        mean: Per-channel mean the weights were trained with, when the file says so.
        std: The same for the standard deviation.
    """

    tensors: dict[str, Tensor]
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


def read_weights(path: str | Path) -> WeightFile:
    """Read the state dict of a bare network from a file.

    Accepts a state dict, a state dict under ``state_dict``, ``model`` or ``model_state_dict``, and
    a checkpoint of this project, from which it takes the network's part. A ``module.`` in front
    of every name (left by DataParallel) is dropped. The state dict of a `Classifier` is taken
    apart into the network's weights and the normalisation constants.

    Raises:
        InputError: As `read_file`, or the file holds no state dict.
    """
    content = read_file(path)
    is_ours = isinstance(content, Mapping) and CHECKPOINT_KEY in content
    for key in WRAPPER_KEYS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if is_ours:
        content = network_part(content)
    if (
        not isinstance(content, Mapping)
        or not content
        or not all(isinstance(value, Tensor) for value in content.values())
    ):
        raise InputError(
            f"The weight file {str(path)!r} holds no state dict. Expected names with tensors, bare "
            f"or under one of {', '.join(WRAPPER_KEYS)}. Save `model.state_dict()`."
        )
    if all(name.startswith("module.") for name in content):
        content = {name.removeprefix("module."): value for name, value in content.items()}
    inner = network_part(content)
    if inner and content.keys() - {f"network.{name}" for name in inner} == {"mean", "std"}:
        return WeightFile(inner, *(tuple(content[k].flatten().tolist()) for k in ("mean", "std")))
    return WeightFile(dict(content))


def network_part(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries below ``network.``, without that prefix."""
    start = "network."
    return {k.removeprefix(start): value for k, value in state.items() if k.startswith(start)}


def load_strictly(
    network: nn.Module,
    weights: Mapping[str, Tensor],
    origin: str,
    what: str = "network",
    advice: str = "Choose the model (and num_classes) that the weights were saved from.",
) -> None:
    """Load a state dict into a network, or change nothing and say what does not fit.

    Args:
        network: Receives the weights in place.
        weights: Names with tensors.
        origin: Where the weights come from, for the message.
        what: What the network is called in the message.
        advice: What the message tells to do.

    Raises:
        InputError: Names are missing or left over, or shapes differ. Lists the first ten.
    """
    own = {name: value for name, value in network.state_dict().items() if isinstance(value, Tensor)}
    problems = [f"missing {name}" for name in own if name not in weights and not _is_counter(name)]
    problems += [f"unexpected {name}" for name in weights if name not in own]
    problems += [
        f"shape of {name} is {list(weights[name].shape)}, not {list(value.shape)}"
        for name, value in own.items()
        if name in weights and weights[name].shape != value.shape
    ]
    if problems:
        more = "; ..." if len(problems) > SHOWN else ""
        raise InputError(
            f"The weights {origin} do not fit the {what} {describe(network).name}: "
            f"{len(problems)} differences: {'; '.join(problems[:SHOWN])}{more}. {advice}"
        )
    network.load_state_dict(weights, strict=False)


def _is_counter(name: str) -> bool:
    """Say whether this is BatchNorm's step count, which old files lack and evaluation ignores."""
    return name.endswith("num_batches_tracked")
