"""Checkpoints of learned rules: the published file, and what pre-training writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from tta_lightning.errors import InputError
from tta_lightning.models.weights import CHECKPOINT_KEY, read_file

FORMAT = 1
KIND = "learned rule"
WEIGHTS = "method.rule."  # where the weights lie in the state_dict of pre-training
STATISTICS = "method.source."
PUBLISHED = "seq_modeling_block."


@dataclass(frozen=True)
class LearnedRule:
    """What a checkpoint says of a learned rule.

    Attributes:
        origin: The file.
        weights: State dict of the rule.
        options: Constructor arguments that belong to the weights; empty for the published file.
        statistics: Standard deviation and mean ``[F]`` of the features of clean images; None where
            the file holds none.
        backbone: ``name`` and ``weights_sha256`` of the network it was trained on; empty where the
            file does not say.
    """

    origin: str
    weights: Mapping[str, Tensor]
    options: Mapping[str, Any] = field(default_factory=dict)
    statistics: tuple[Tensor, Tensor] | None = None
    backbone: Mapping[str, str] = field(default_factory=dict)


def learned_rule_record(options: Mapping[str, Any], backbone: Mapping[str, str]) -> dict[str, Any]:
    """Describe a learned rule such that :func:`read_learned_rule` knows the checkpoint again.

    Args:
        options: Constructor arguments that belong to the weights, plain values.
        backbone: ``name`` and ``weights_sha256`` of the network.

    Returns:
        What a checkpoint keeps under the key ``"tta_lightning"``.
    """
    return {"format": FORMAT, "kind": KIND, "rule": dict(options), "backbone": dict(backbone)}


def read_learned_rule(path: str | Path) -> LearnedRule:
    """Read a learned rule.

    Args:
        path: A checkpoint of :class:`~tta_lightning.meta.MGGPretraining`, or the published
            ``mgg_ckpt.pth``.

    Returns:
        What the file holds.

    Raises:
        InputError: The file is missing, damaged, or of another kind.
    """
    content = read_file(path)
    record = content.get(CHECKPOINT_KEY) if isinstance(content, Mapping) else None
    published = content.get("model_state_dict") if isinstance(content, Mapping) else None
    try:
        if isinstance(record, Mapping) and record.get("kind") == KIND:
            return _ours(str(path), record, content["state_dict"])
        if isinstance(published, Mapping) and any(map(_is_published, published)):
            return _published(str(path), published)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise InputError(
            f"The learned rule {str(path)!r} is damaged or incomplete ({error!r}). Train or "
            "download it again."
        ) from error
    kind = record.get("kind") if isinstance(record, Mapping) else None
    raise InputError(
        f"The file {str(path)!r} holds no learned rule: it is of "
        f"{'another kind' if kind is None else f'kind {kind!r}'}. Expected a checkpoint that `tta "
        "fit` wrote with MGGPretraining, or the published mgg_ckpt.pth (with names such as "
        f"{PUBLISHED}q_proj.weight under model_state_dict)."
    )


def _ours(path: str, record: Mapping[str, Any], state: Mapping[str, Any]) -> LearnedRule:
    if record.get("format") != FORMAT:
        raise InputError(
            f"The learned rule {path!r} has format {record.get('format')!r}; this version reads "
            f"format {FORMAT}. Update tta_lightning."
        )
    found = {name: state.get(STATISTICS + name) for name in ("std", "mean")}
    std, mean = found["std"], found["mean"]
    return LearnedRule(
        origin=path,
        weights=_below(WEIGHTS, state),
        options=dict(record["rule"]),
        statistics=(std, mean) if std is not None and mean is not None and std.numel() else None,
        backbone=dict(record["backbone"]),
    )


def _published(path: str, state: Mapping[str, Any]) -> LearnedRule:
    weights = _below(PUBLISHED, state)
    width = {"hidden": weights["W1"].shape[-1]} if "W1" in weights else {}
    named = {f"memory.{name}": value.float() for name, value in weights.items()}
    return LearnedRule(path, named, options=width)


def _is_published(name: Any) -> bool:
    return str(name).startswith(PUBLISHED)


def read_statistics(path: str | Path) -> tuple[Tensor, Tensor]:
    """Read the standard deviation and the mean of clean features.

    Args:
        path: A pair (std, mean) of tensors as the published ``train_info.pt`` holds it, or a
            checkpoint that :func:`read_learned_rule` reads.

    Returns:
        std ``[F]`` and mean ``[F]``.

    Raises:
        InputError: The file holds neither.
    """
    content = read_file(path)
    if isinstance(content, tuple | list):
        if len(content) == 2 and all(isinstance(item, Tensor) for item in content):
            return content[0], content[1]
    elif isinstance(content, Mapping) and CHECKPOINT_KEY in content:
        statistics = read_learned_rule(path).statistics
        if statistics is not None:
            return statistics
    raise InputError(
        f"The file {str(path)!r} holds no feature statistics. Expected a pair of tensors (std, "
        "mean), or a checkpoint that `tta fit` wrote with MGGPretraining on MGTTA."
    )


def _below(start: str, state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {k.removeprefix(start): value for k, value in state.items() if k.startswith(start)}
