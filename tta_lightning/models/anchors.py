"""Structural anchors: what the entropy of a classifier's own rows says of each class.

The mathematics is that of :mod:`tta_lightning.methods.stag`; nothing but the classifier enters.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from tta_lightning.errors import InputError, unknown_name
from tta_lightning.functional import has_direction, scaled_logit_gradient, surprise

Kind = Literal["self", "input", "total", "sum", "full"]
CHUNK = 1024  # classes whose rows of a [C, C] matrix are held at once


class UnitAnchors(NamedTuple):
    """The directions of structural anchors, which a saturated head does not lose.

    Attributes:
        directions: ``[C, D]`` float64, rows of length one; for ``full`` ``[C, C + D]``, both
            factors of length one.
        reversed_classes: ``[K]`` int64, the classes with ``A_cc > 0``: other rows win so clearly in
            ``q_c`` that their anchors of kind ``self`` point along ``w_c`` and not against it.
        entropy: ``[C]`` float64, the self-structural entropies ``H(q_c)`` in nats.
    """

    directions: Tensor
    reversed_classes: Tensor
    entropy: Tensor


def structural_anchors(
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    kind: Kind,
    row_normalize: bool = False,
    temperature: float = 1.0,
    use_bias: bool = False,
) -> Tensor:
    """Differentiate the self-structural entropy of every class.

    ``w_c`` plays two roles in ``H(q_c)``, that of the input and that of row c of the classifier:

    ========= ================================================ ========================
    kind      derivative of ``H(q_c)`` by                      closed form for T = 1
    ========= ================================================ ========================
    ``self``  row c of the classifier, the input held fixed    ``A_cc w_c``
    ``input`` the input, the classifier held fixed             ``sum_k A_ck w_k``
    ``total`` ``w_c`` in both roles                            ``self`` + ``input``
    ``sum``   ``w_c``, of the sum over all classes             ``(A W + A^T W)_c``
    ``full``  the whole classifier, the input held fixed       ``A_c (outer) w_c``
    ========= ================================================ ========================

    Args:
        weight: ``W [C, D]``, any floating-point type; computed in float64.
        bias: ``b [C]``; read only with ``use_bias``.
        kind: Which derivative.
        row_normalize: Bring the rows of W to length one first.
        temperature: ``T`` of the softmax over S.
        use_bias: Add b to S. A bias can move the arg-max of ``q_c`` away from c and so turn the
            anchor round.

    Returns:
        ``[C, D]`` float64 without graph; for ``full`` ``[C, C + D]``, the two factors ``A_c`` and
        ``w_c`` side by side. Where a head is so sure of its own rows that float64 cannot hold the
        derivative it is zero; :func:`unit_anchors` keeps
        the direction of such anchors.

    Raises:
        InputError: A shape, the temperature or the kind is not possible, or a number is not finite.
    """
    found, log_scale, *_ = _scaled_anchors(weight, bias, kind, row_normalize, temperature, use_bias)
    if kind != "full":
        return found * log_scale.exp()
    gradient, rows = found.tensor_split([len(weight)], dim=1)
    return torch.cat([gradient * log_scale.exp(), rows], dim=1)


def unit_anchors(
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    kind: Kind,
    row_normalize: bool = False,
    temperature: float = 1.0,
    use_bias: bool = False,
) -> UnitAnchors:
    """Compute the directions of :func:`structural_anchors`, whose arguments these are.

    Raises:
        InputError: As there, or a class has no anchor.
    """
    found, _, own, entropy = _scaled_anchors(
        weight, bias, kind, row_normalize, temperature, use_bias
    )
    reversed_classes = (own.flatten() > 0).nonzero().flatten()
    return UnitAnchors(_unit(found, kind), reversed_classes, entropy.flatten())


def check_temperature(temperature: float) -> None:
    """Refuse a temperature that is not a positive number.

    Raises:
        InputError: Names it.
    """
    if not 0 < temperature < math.inf:
        raise InputError(f"temperature = {temperature}: expected a positive number, mostly 1.")


def _scaled_anchors(
    weight: Tensor,
    bias: Tensor | None,
    kind: Kind,
    row_normalize: bool,
    temperature: float,
    use_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute anchors times ``exp(-log_scale)``, in numbers that do not underflow.

    Returns:
        They, ``log_scale``, ``A_cc`` times something positive, and the entropies; the last three
        ``[C, 1]``.
    """
    if kind not in get_args(Kind):
        raise unknown_name("kind of anchors", kind, get_args(Kind))
    check_temperature(temperature)
    rows = _checked_rows(weight, row_normalize)
    added: Tensor | float = 0.0
    if use_bias:
        if bias is None or bias.shape != weight.shape[:1]:
            got = "none" if bias is None else str(list(bias.shape))
            raise InputError(f"use_bias needs a bias [{len(weight)}] of the classifier, got {got}.")
        added = bias.detach().double()
    parts = []
    for index in torch.arange(len(rows), device=rows.device).split(CHUNK):
        structure = (rows[index] @ rows.T + added) / temperature
        if not bool(structure.isfinite().all()):
            raise InputError(
                "What the classifier says of its own rows is not finite. Look for NaN in its bias; "
                "with very large weights row_normalize or a larger temperature helps."
            )
        parts.append(_some_anchors(rows, index, structure, kind))
    found, log_scale, own, entropy = (torch.cat(column) for column in zip(*parts, strict=True))
    if kind == "sum":  # found holds A: its columns need one scale
        common = log_scale.max()
        gradient = found * (log_scale - common).exp()
        found, log_scale = gradient @ rows + gradient.T @ rows, common.expand_as(log_scale)
    return found, log_scale - math.log(temperature), own, entropy


def _some_anchors(
    rows: Tensor, index: Tensor, structure: Tensor, kind: Kind
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the anchors of some classes; for ``sum`` their rows of A."""
    known = has_direction(structure)[:, None]
    gradient, log_scale = scaled_logit_gradient(structure)
    gradient = gradient * known
    log_p, surprised = surprise(structure)
    entropy = surprised[:, :1] - log_p[:, :1]  # no view of a [C, C] matrix
    column = index[:, None]
    loses = structure.argmax(dim=1, keepdim=True) != column  # to the row of another class
    own = torch.where(loses, -surprised.gather(1, column), gradient.gather(1, column)) * known
    if kind == "self":  # A_cc may be nothing beside the other A_ck, so it has a scale of its own
        return (
            own * rows[index],
            torch.where(loses, log_p.gather(1, column), log_scale),
            own,
            entropy,
        )
    if kind == "sum":
        return gradient, log_scale, own, entropy
    if kind == "full":
        return torch.cat([gradient, rows[index]], dim=1), log_scale, own, entropy
    found = gradient @ rows
    if kind == "total":
        found = found + gradient.gather(1, column) * rows[index]
    return found, log_scale, own, entropy


def _unit(anchors: Tensor, kind: Kind) -> Tensor:
    """Bring rows, or both factors of a row, to length one.

    Raises:
        InputError: One of them is zero.
    """
    classes = len(anchors)
    parts = anchors.tensor_split([classes], dim=1) if kind == "full" else (anchors,)
    largest = [part.abs().amax(dim=1, keepdim=True) for part in parts]
    lost = (torch.cat(largest, dim=1).amin(dim=1) == 0).nonzero().flatten().tolist()
    if lost:
        raise InputError(
            f"{len(lost)} of {classes} classes have a structural anchor of length zero (class "
            f"{', '.join(map(str, lost[:5]))}): their rows of the classifier are zero or all "
            "alike, or so far from the others that the gradient vanishes. Use a trained head; with "
            "an over-confident one a temperature above 1 or row_normalize helps."
        )
    scaled = [part / size for part, size in zip(parts, largest, strict=True)]
    return torch.cat([part / part.norm(dim=1, keepdim=True) for part in scaled], dim=1)


def _checked_rows(weight: Tensor, row_normalize: bool) -> Tensor:
    """Return the rows of a classifier in float64.

    Raises:
        InputError: It is no matrix of two finite rows or more, or a row to normalise is zero.
    """
    if weight.dim() != 2 or len(weight) < 2:
        raise InputError(
            "STAG compares the classes of a classifier or of a stream, two or more: expected a "
            f"weight [C, D], got {list(weight.shape)}."
        )
    rows = weight.detach().double()
    if not bool(rows.isfinite().all()):
        raise InputError("The weight of the classifier is not finite everywhere. Train it anew.")
    lengths = rows.norm(dim=1, keepdim=True)
    if row_normalize and bool((lengths == 0).any()):
        raise InputError("row_normalize divides each row by its length, but a row is zero.")
    return rows / lengths if row_normalize else rows
