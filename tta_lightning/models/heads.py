"""Find a network's head, the final linear map, and read the features that enter it.

Features are the head's input ``[B, D]``; the logits are ``features @ weight.T + bias``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from tta_lightning.errors import InputError
from tta_lightning.functional import HALF
from tta_lightning.models.classifier import Classifier, describe
from tta_lightning.models.norms import norm_layers

# Where torchvision and common user code keep the head, in the order that is tried.
HEAD_ATTRIBUTES = ("fc", "classifier", "heads.head", "head")
# Modules that leave the linear map's output as it is in eval mode, or only reshape it.
TRANSPARENT = (nn.Dropout, nn.Identity, nn.Flatten)


@dataclass(frozen=True)
class Head:
    """The final linear map of a network.

    Attributes:
        name: The module's dotted name inside the network that was searched.
        module: An ``nn.Linear`` or a 1x1 ``nn.Conv2d``.
    """

    name: str
    module: nn.Linear | nn.Conv2d

    @property
    def weight(self) -> Tensor:
        """The effective weight ``[C, D]``, detached: what a parametrisation yields right now."""
        module = self.module
        if not parametrize.is_parametrized(module, "weight"):
            return module.weight.detach().flatten(1)
        # Spectral norm takes a power step whenever its weight is read in train mode.
        parametrization: Any = module.get_submodule("parametrizations.weight")
        was_training = parametrization.training
        parametrization.eval()
        try:
            return module.weight.detach().flatten(1)
        finally:
            parametrization.train(was_training)

    @property
    def bias(self) -> Tensor | None:
        """The bias ``[C]``, detached, or None."""
        return None if self.module.bias is None else self.module.bias.detach()

    @property
    def trains(self) -> bool:
        """Whether a method moves it."""
        return any(parameter.requires_grad for parameter in self.module.parameters())

    def restricted(self, classes: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias of some classes.

        Args:
            classes: Positions ``[K]`` int64 among the outputs, in the order wanted; None for all.

        Returns:
            ``[K, D]`` and ``[K]`` or None, detached.
        """
        weight, bias = self.weight, self.bias
        if classes is None:
            return weight, bias
        classes = classes.to(weight.device)
        return weight[classes], None if bias is None else bias[classes]


class FeatureCapture:
    """Holds the head's input of the last forward pass inside a `capture_features` block."""

    def __init__(self) -> None:
        self._features: Tensor | None = None

    @property
    def ran(self) -> bool:
        """Whether the head has run inside the block."""
        return self._features is not None

    @property
    def features(self) -> Tensor:
        """The features ``[B, D]``, attached to the graph they were computed in.

        Raises:
            InputError: The head has not run inside the block yet.
        """
        if self._features is None:
            raise InputError(
                "No features were captured: the head did not run inside the block. Call the "
                "network there, the very object whose head was found and not a copy of it."
            )
        return self._features


@contextmanager
def capture_features(head: Head | nn.Module) -> Iterator[FeatureCapture]:
    """Read the head's input while the block runs.

    The hook is removed at the end of the block. A copy of the network that was made inside the
    block does not disturb the capture.

    Args:
        head: What `find_head` returned, or the head's module itself.

    Yields:
        An object whose ``features`` are the ``[B, D]`` input of the last forward pass.

    Raises:
        InputError: At the forward pass, when the head's input is neither ``[B, D]`` nor
            ``[B, D, 1, 1]``.
    """
    module = head.module if isinstance(head, Head) else head
    capture = FeatureCapture()

    def hook(called: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if called is module:  # a deep copy of the network carries this hook along
            capture._features = _as_features(inputs[0])

    handle = module.register_forward_pre_hook(hook)
    try:
        yield capture
    finally:
        handle.remove()


def find_head(network: nn.Module) -> Head:
    """Find the single linear map that ends a network.

    Asks a timm model for its classifier, then looks at the attributes where torchvision keeps it
    (``fc``, ``classifier``, ``heads.head``, ``head``), then takes the last linear layer or 1x1
    convolution in the order of registration. Of a Sequential only its last layer counts; dropout,
    identity and flatten behind the head are skipped.

    Args:
        network: A `Classifier` (its wrapped network is searched) or any other module.

    Returns:
        The head; its name is relative to ``network``.

    Raises:
        InputError: The network has no head of this kind, e.g. none at all (``num_classes=0``), two
            heads that are averaged (a distilled DeiT), a quantised one, or one that is followed by
            another layer.
    """
    found = _search(network)
    if not _is_linear(found):
        raise InputError(
            f"The network {describe(network).name} has no single linear head: found "
            f"{_in_words(found)}. Expected one nn.Linear or 1x1 nn.Conv2d whose output is the "
            f"logits. {_advice(found)}"
        )
    name = next(name for name, candidate in network.named_modules() if candidate is found)
    return Head(name, found)


def head_or_none(network: nn.Module) -> Head | None:
    """Find the head as :func:`find_head` does; None where there is none of this kind."""
    try:
        return find_head(network)
    except InputError:
        return None


def check_head(
    name: str, features: Tensor | None, weight: Tensor, bias: Tensor | None, logits: Tensor
) -> None:
    """See that a head is what makes the logits of its features.

    Args:
        name: Of the head, for the message.
        features: ``[B, D]``, what entered it; None if it did not run.
        weight: ``[C, D]``.
        bias: ``[C]`` or None.
        logits: ``[B, C]``, what the network gave.

    Raises:
        InputError: The network does something else than apply the head, such as to normalise,
            scale or average; the message says how far off that is.
    """
    what = "it did not run once, or another layer comes after it"
    if len(weight) != logits.shape[1]:
        raise InputError(
            f"The classifier {name!r} is looked at for {len(weight)} classes, but the logits are "
            f"those of {logits.shape[1]}. Make what looks at it after restrict_classes()."
        )
    if features is not None and not logits.isfinite().all():
        return  # a batch with NaN says nothing about the head
    if features is not None:
        exact_bias = None if bias is None else bias.detach().double()
        made = F.linear(features.detach().double(), weight.detach().double(), exact_bias)
        off = float((made - logits.detach().double()).abs().max())
        half = any(tensor.dtype in HALF for tensor in (features, weight, logits))
        if off <= (0.05 if half else 5e-3) * (1 + float(made.abs().max())):
            return
        what = f"the network's logits are up to {off:.3g} away from its output"
    raise InputError(
        f"{name!r} looks like the final linear map of the network, but {what}. Use a network that "
        "returns what its head gives, of the classes in use: nothing may normalise, scale or "
        "average it."
    )


def _declared_head(network: nn.Module) -> Any:
    """Return what the network names as its classifier, of any type, or None."""
    get_classifier = getattr(network, "get_classifier", None)
    if callable(get_classifier):
        return get_classifier()
    for path in HEAD_ATTRIBUTES:
        found: Any = network
        for part in path.split("."):
            found = getattr(found, part, None)
        if isinstance(found, nn.Module):
            return found
    return None


def _search(found: Any) -> Any:
    """Follow containers down to the layer that yields the logits, or to what is in its place."""
    if not isinstance(found, nn.Module) or _is_linear(found) or _is_quantised(found):
        return found
    if isinstance(found, Classifier):
        return _search(found.network)
    if isinstance(found, nn.Sequential):
        layers = [layer for layer in found if not isinstance(layer, TRANSPARENT)]
        return _search(layers[-1]) if layers else found
    declared = _declared_head(found)
    if declared is not None:
        return _search(declared)
    layers = [layer for layer in found.modules() if _is_linear(layer) or _is_quantised(layer)]
    return layers[-1] if layers else found


def _is_linear(module: Any) -> TypeGuard[nn.Linear | nn.Conv2d]:
    """Say whether the module is an ordinary linear map of one feature vector."""
    if _is_quantised(module):
        return False
    if isinstance(module, nn.Conv2d):
        return module.kernel_size == (1, 1) and module.groups == 1
    return isinstance(module, nn.Linear)


def _is_quantised(module: Any) -> bool:
    """Say whether a layer is one of torch's quantised ones, or holds integer weights."""
    if ".quantized" in type(module).__module__:
        return True
    return isinstance(module, nn.Linear | nn.Conv2d) and any(
        not parameter.is_floating_point() for parameter in module.parameters(recurse=False)
    )


def _in_words(found: Any) -> str:
    """Name what was found in the head's place."""
    if isinstance(found, tuple | list):
        return f"{len(found)} heads ({', '.join(type(item).__name__ for item in found)})"
    if isinstance(found, nn.Conv2d):
        return f"a Conv2d with kernel {found.kernel_size} and {found.groups} groups"
    return f"{'a quantised ' if _is_quantised(found) else ''}{type(found).__name__}"


def _advice(found: Any) -> str:
    """Say what to do about what was found in the head's place."""
    if isinstance(found, nn.Identity):
        return "It was made without a classifier (num_classes=0): make it with its classes."
    if isinstance(found, tuple | list):
        return (
            "Of heads that are averaged none makes the logits: take a model with one, such as the "
            "same one without distillation."
        )
    if _is_quantised(found):
        return "Integer weights have no geometry to align with: use the model before quantisation."
    if isinstance(found, nn.Module) and "" in norm_layers(found):
        return "It normalises behind the linear map: use a head that ends in the linear map."
    return "Use a model that ends in one."


def _as_features(head_input: Tensor) -> Tensor:
    """Bring the input of a head to ``[B, D]``."""
    if head_input.dim() == 4 and head_input.shape[2:] == torch.Size([1, 1]):
        return head_input.flatten(1)
    if head_input.dim() != 2:
        raise InputError(
            f"The head's input has shape {list(head_input.shape)}; expected one feature vector per "
            "image, [B, D] or [B, D, 1, 1]. Pool the features before the head."
        )
    return head_input
