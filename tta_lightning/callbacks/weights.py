"""The adapted network as a weight file that needs nothing of this package."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tta_lightning.adapter import Adapter
from tta_lightning.callbacks.base import AdaptCallback
from tta_lightning.data.batches import StreamBatch
from tta_lightning.errors import InputError
from tta_lightning.functional import wide
from tta_lightning.methods.cotta import CoTTA
from tta_lightning.methods.rotta import RoTTA
from tta_lightning.models.byol import BYOLHeads
from tta_lightning.models.classifier import Classifier, ModelInfo, describe, weights_hash
from tta_lightning.models.norms import BatchNorm, batch_norm_layers
from tta_lightning.runs import run_folder, write_atomically

_SUFFIX = ".safetensors"
_LENGTH = 8  # bytes at the start of such a file that say how long its header is; it is aligned to 8
_LARGE = 1e3  # of a squared mean over a variance: float32 leaves four digits of the variance
_TEACHER = "teacher"  # in the memory of methods that predict with an average of their weights


class AdaptedWeights(AdaptCallback):
    """Write the network as it is after the last batch, for use without this package.

    The file in the run folder is a plain state dict with the names of the network that was given,
    without those of our wrappers, so that timm or torchvision load it as they load any other::

        model = timm.create_model("resnet50_gn", num_classes=7)
        timm.models.load_checkpoint(model, "adapted.safetensors")

    Its metadata, all strings: ``format``; ``model``, ``num_classes`` and ``input_size`` (pixels)
    where they are known; ``mean`` and ``std`` (JSON lists) that images in [0, 1] are normalised
    with; ``method``; ``images``, how many the model has seen since it was last reset; ``classes``
    (a JSON list of positions among the logits) where the stream has some of the network's classes
    only; ``source_weights_sha256``, as ``weights_sha256`` in the manifest. Tensors that share
    memory are written one by one.

    What is written:

    * The model after the last batch. Where the stream resets the model before each segment, that is
      the model that the last segment made.
    * The weights that predict: those of the teacher with CoTTA and RoTTA.
    * Batch normalisation: methods that normalise by statistics of the batch leave the running ones
      as the source model had them, and with these the adapted weights would predict something else.
      So the file gets the mean and the variance of all that each layer saw since the last reset,
      batch by batch as it was predicted; the network that runs is not touched, and no prediction
      changes. Where a method carries running statistics itself (RoTTA, ``BNStats(running=True)``),
      its own are written. Statistics that are fixed are not those of each batch: such a model
      predicts nearly, but not exactly, as the one that ran.
    * What a method does to the logits (the prior of ROID) is no weight, and stays out.

    Nothing is written, and a warning says so, where no weight is adapted when the run ends: by
    methods that forget each image (MT3, TTT, MEMO) or move no weight (Source, LAME, T3A), in a
    stream that resets before each batch, or after a reset that no batch followed. A run that a
    callback stopped has its file; one that ended with an error has none until it was resumed.

    Args:
        filename: Name of the file in the run folder.

    Raises:
        InputError: The name is no file name that ends in ``.safetensors``.
    """

    def __init__(self, filename: str = "adapted.safetensors") -> None:
        if Path(filename).name != filename or Path(filename).suffix != _SUFFIX:
            raise InputError(
                f"filename = {filename!r}: expected a name without a folder that ends in "
                f"{_SUFFIX}, such as adapted{_SUFFIX}."
            )
        self.filename = filename
        self._source_hash = ""
        self._statistics: dict[str, _Statistics] = {}
        self._hooks: list[RemovableHandle] = []
        self._images = self._passes = 0
        self._predicts_in = 1
        self._watches = False

    def on_adapt_start(self, trainer: Trainer, adapter: Adapter) -> None:
        """Note the source model, and begin to watch batch normalisation."""
        self._release()
        self._statistics, self._images = {}, 0
        if run_folder(trainer) is None:
            return
        self._source_hash = weights_hash(adapter.network)
        if not _forgets(trainer, adapter):
            self._watch(adapter)

    def on_adapt_reset(self, trainer: Trainer, adapter: Adapter, reason: str) -> None:
        """Forget what was seen before."""
        self._images = 0
        for statistics in self._statistics.values():
            statistics.clear()

    def on_adapt_batch_start(
        self, trainer: Trainer, adapter: Adapter, batch: StreamBatch, batch_idx: int
    ) -> None:
        """Count the images, and watch what comes: before a reset inside the step, not after it."""
        self._images += len(batch.labels)
        self._passes, self._watches = 0, True

    def on_adapt_batch_end(
        self, trainer: Trainer, adapter: Adapter, logits: Tensor, batch: StreamBatch, batch_idx: int
    ) -> None:
        """Look away: what runs between batches predicts no batch."""
        self._watches = False

    def on_adapt_end(self, trainer: Trainer, adapter: Adapter) -> None:
        """Write the file.

        Raises:
            InputError: It cannot be written.
        """
        self._release()
        folder, loop = run_folder(trainer), trainer.test_loop
        if folder is None or not getattr(loop, "completed_batches", 0):
            return
        path = Path(folder, self.filename)
        exchanged = {**_teacher(adapter), **self._gathered(adapter)}
        reason = self._why_nothing(trainer, adapter, exchanged)
        if reason is not None:
            rank_zero_warn(f"{self.filename} was not written: {reason}")
            return
        plain, info = _without_wrappers(adapter.network)
        state = _named_as(plain, adapter, exchanged)
        try:
            metadata = self._metadata(adapter, info, _served_size(trainer) or info.input_size)
            write_atomically(path, _to_bytes(state, metadata))
        except OSError as error:
            raise InputError(
                f"The adapted weights cannot be written to {path}: {error.strerror}. See to it, "
                f"and resume from {folder}, which writes them."
            ) from error
        rank_zero_info(f"Adapted weights: {path}")

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Stop watching."""
        self._release()

    def state_dict(self) -> dict[str, Any]:
        """Return what was seen since the last reset."""
        held = {name: each.state() for name, each in self._statistics.items()}
        return {"images": self._images, "statistics": held}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what a run that goes on has seen."""
        self._images = state_dict["images"]
        for name, held in state_dict["statistics"].items():
            self._statistics[name].load(held)

    # Batch normalisation -------------------------------------------------------------------------

    def _watch(self, adapter: Adapter) -> None:
        """Hook every layer whose running statistics the method does not carry itself."""
        carried = {id(tensor) for tensor in adapter.moving_tensors().values()}
        for name, layer in batch_norm_layers(adapter.network).items():
            if layer.running_mean is None or id(layer.running_mean) in carried:
                continue
            self._statistics[name] = statistics = _Statistics(layer.running_mean)
            self._hooks.append(layer.register_forward_hook(partial(self._see, statistics)))
        if self._statistics:
            self._hooks.append(adapter.network.register_forward_pre_hook(self._count_pass))
        # Methods predict in their first pass over a batch; later ones serve their losses. CoTTA
        # asks its source model first, and then the teacher.
        self._predicts_in = 2 if isinstance(adapter, CoTTA) else 1

    def _count_pass(self, network: nn.Module, args: tuple[Any, ...]) -> None:
        self._passes += 1

    def _see(
        self, statistics: _Statistics, layer: BatchNorm, args: tuple[Any, ...], output: Any
    ) -> None:
        if self._watches and self._passes == self._predicts_in:
            statistics.add(layer, args[0])

    def _gathered(self, adapter: Adapter) -> dict[str, Tensor]:
        """Return the statistics of each layer that saw a batch, by name in the ``state_dict``."""
        found = {}
        for name, seen in self._statistics.items():
            if int(seen.count):
                found[f"network.{name}.running_mean"] = seen.mean
                found[f"network.{name}.running_var"] = seen.var
        return found

    def _release(self) -> None:
        self._watches = False
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    # The file ------------------------------------------------------------------------------------

    def _why_nothing(
        self, trainer: Trainer, adapter: Adapter, exchanged: dict[str, Tensor]
    ) -> str | None:
        """Say why there are no adapted weights; None where there are."""
        method = type(adapter).__name__
        if adapter.episodic:
            return f"{method} forgets each image after its prediction, so no weight is adapted."
        if _forgets(trainer, adapter):
            return "the stream resets the model before each batch, so no weight is adapted."
        if not self._images:
            return "the model was reset after the last batch, so no weight is adapted."
        if self._statistics and not any(int(seen.count) for seen in self._statistics.values()):
            return (
                "no batch since the last reset showed the statistics that batch normalisation "
                "used. With others than these the adapted weights would predict something else."
            )
        own = adapter.state_dict()
        same = all(torch.equal(value.to(own[name]), own[name]) for name, value in exchanged.items())
        if same and weights_hash(adapter.network) == self._source_hash:
            return f"{method} left every weight as it was, so no weight is adapted."
        return None

    def _metadata(
        self, adapter: Adapter, info: ModelInfo, input_size: int | None
    ) -> dict[str, str]:
        """Describe the network in strings, the only values that the format takes."""
        known = {
            "num_classes": info.num_classes,
            "input_size": input_size,
            "classes": None if adapter.classes is None else adapter.classes.tolist(),
        }
        return {
            "format": "pt",
            "model": info.name,
            "mean": json.dumps(info.mean),
            "std": json.dumps(info.std),
            "method": type(adapter).__name__,
            "images": str(self._images),
            "source_weights_sha256": self._source_hash,
            **{name: json.dumps(value) for name, value in known.items() if value is not None},
        }


class _Statistics:
    """Mean and variance of what a layer normalised, in the precision of its statistics or float32.

    Attributes:
        mean: ``[C]``.
        var: ``[C]``, biased, as batch normalisation itself uses it.
        count: Number of images, a scalar. A tensor, so that nothing waits for the device.
    """

    def __init__(self, like: Tensor) -> None:
        self.mean, self.var = torch.zeros_like(wide(like)), torch.zeros_like(wide(like))
        self.count = torch.zeros((), dtype=torch.int64, device=like.device)

    def clear(self) -> None:
        """Forget all of it."""
        for tensor in (self.mean, self.var, self.count):
            tensor.zero_()

    @torch.no_grad()
    def add(self, layer: BatchNorm, inputs: Tensor) -> None:
        """Add what a layer has just normalised by; a batch that is not finite is left out.

        Args:
            layer: In training mode it uses statistics of the batch, else those in its buffers.
            inputs: ``[B, C, ...]``.
        """
        if layer.training:
            mean, var = _moments(wide(inputs))
        else:
            assert layer.running_mean is not None
            assert layer.running_var is not None
            mean, var = layer.running_mean.to(self.mean), layer.running_var.to(self.var)
        finite = torch.isfinite(mean).all() & torch.isfinite(var).all()
        added = finite * len(inputs)
        share = added.to(self.mean) / (self.count + added).clamp(min=1)
        rise = torch.where(finite, mean - self.mean, 0.0)
        spread = torch.where(finite, var - self.var, 0.0)
        # The variance of two groups together, by differences: no large numbers cancel.
        self.mean += share * rise
        self.var += share * spread + share * (1 - share) * rise.square()
        self.count += added

    def state(self) -> list[Tensor]:
        """Return copies for a checkpoint."""
        return [tensor.clone() for tensor in (self.mean, self.var, self.count)]

    def load(self, state: list[Tensor]) -> None:
        """Take over what :meth:`state` returned."""
        for tensor, held in zip((self.mean, self.var, self.count), state, strict=True):
            tensor.copy_(held)


def _moments(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance ``[C]`` of ``[B, C, ...]``.

    On a CPU torch's own variance takes longer than the layer whose inputs these are. Mean squares
    do not, and are kept where no channel's mean is so large beside its spread that they lose it.
    """
    if inputs.device.type == "cpu":
        rows = inputs.reshape(*inputs.shape[:2], -1)
        squares = torch.linalg.vector_norm(rows, dim=2).double().square() / rows.shape[2]
        mean = rows.mean(dim=2).double().mean(dim=0)
        var = squares.mean(dim=0) - mean.square()
        if not (mean.square() > _LARGE * var).any():
            return mean.to(inputs), var.to(inputs)
    dims = [d for d in range(inputs.dim()) if d != 1]
    var, mean = torch.var_mean(inputs, dim=dims, correction=0)
    return mean, var


def _forgets(trainer: Trainer, adapter: Adapter) -> bool:
    """Say whether nothing that was learnt outlives a batch."""
    plan = getattr(trainer.test_loop, "plan", None)
    return adapter.episodic or (plan is not None and plan.reset_each_batch)


def _served_size(trainer: Trainer) -> int | None:
    """Return the side in px that a stream brings its images to; None where it leaves them."""
    geometry = getattr(getattr(trainer, "datamodule", None), "geometry", None)
    size: int | None = getattr(geometry, "size", None)
    return size


def _teacher(adapter: Adapter) -> dict[str, Tensor]:
    """Return the weights that a method predicts with in place of the network's own.

    Returns:
        Tensors by name in the adapter's ``state_dict``.
    """
    held: dict[str, Tensor] = adapter.memory.get(_TEACHER, {})
    if isinstance(adapter, CoTTA):  # names them as the network does
        return {f"network.{name}": tensor for name, tensor in held.items()}
    return dict(held) if isinstance(adapter, RoTTA) else {}


def _without_wrappers(network: nn.Module) -> tuple[nn.Module, ModelInfo]:
    """Return the network that was given, without our wrappers, and what is known of it."""
    info = describe(network)
    while True:
        network = getattr(network, "_orig_mod", network)  # what torch.compile was given
        if isinstance(network, BYOLHeads):
            network = network.backbone
            info = describe(network)
        elif isinstance(network, Classifier):
            info = network.info
            network = network.network
        else:
            return network, info


def _named_as(
    plain: nn.Module, adapter: Adapter, exchanged: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return copies of the tensors of a part of an adapter, some exchanged, by their names there.

    Each tensor is a copy of its own, also where two share memory (tied weights), which the format
    refuses: a plain loader expects every name.
    """
    start = next(name for name, module in adapter.named_modules() if module is plain) + "."
    state = {}
    for name, value in adapter.state_dict().items():
        if name.startswith(start) and isinstance(value, Tensor):
            tensor = exchanged.get(name, value).detach().to("cpu", value.dtype)
            copy = tensor.clone(memory_format=torch.contiguous_format)
            state[name.removeprefix(start)] = copy
    return state


def _to_bytes(state: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """Serialise; the library writes metadata in random order, here equal content is equal bytes."""
    data = save(state, metadata)
    end = _LENGTH + int.from_bytes(data[:_LENGTH], "little")
    header = json.loads(data[_LENGTH:end])
    header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH)
    return len(text).to_bytes(_LENGTH, "little") + text + data[end:]
