"""STAG: align a closed-form entropy gradient with anchors taken from the classifier alone.

"STAG", https://arxiv.org/abs/2402.09004v2. **A reconstruction from the abstract; no parity with the
paper's tables is claimed**: its equations, constants and tables were not at hand, and no code of
its authors is known. The abstract fixes that STAG is added to other methods, that anchors of the
classes come from a "self-structural entropy" of the classifier, that a "predicted-class entropy
gradient" is computed from what the forward pass has, that a cosine loss aligns it with the anchor,
and that there is no further backward pass. Between its possible readings the user chooses by
``space`` and ``kind``; ``docs/stag.md`` says how the default was chosen.

Symbols, for features ``h [B, D]``, a classifier ``W [C, D]`` with bias ``b [C]``, logits
``z = h W^T + b``, ``p = softmax(z)``, ``y = argmax z`` and the entropy ``H`` in nats:

* ``a_k = dH/dz_k = -p_k (log p_k + H)``: :func:`entropy_logit_gradient`.
* The classifier classifies its own rows: ``S = W W^T``, ``q_c = softmax(S_c / T)``. ``H(q_c)`` is
  the self-structural entropy of class c, ``A_c = a(S_c / T)``, and a derivative of ``H(q_c)`` is
  the anchor of the class: :func:`structural_anchors`.
* The loss of a sample is ``1 - cos(g, anchor_y)``, ``g`` being the derivative of ``H(p)`` in the
  same space: :func:`stag_loss`.

Anchors, ``W`` and ``y`` are constants of the loss; its gradient flows through ``h`` and ``p``.
A cosine does not change when ``a`` is divided by a number, so ``a`` is divided by the largest
``p_k, k != y`` before anything is exponentiated. That keeps the direction for confident samples and
saturated heads, where ``a`` itself is rounded to zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from tta_lightning.contract import Outputs
from tta_lightning.errors import InputError, unknown_name
from tta_lightning.functional import (
    entropy_logit_gradient,
    has_direction,
    scaled_logit_gradient,
    wide,
)
from tta_lightning.models.anchors import Kind, check_temperature, structural_anchors, unit_anchors
from tta_lightning.models.heads import Head, check_head
from tta_lightning.rules.base import require

__all__ = [
    "Kind",
    "Scope",
    "Space",
    "StagOptions",
    "StagTerm",
    "Unit",
    "counted_samples",
    "entropy_logit_gradient",
    "stag_alignment",
    "stag_loss",
    "structural_anchors",
]

Space = Literal["row", "feature", "full"]
Scope = Literal["host", "all"]
NATURAL: dict[Space, Kind] = {"row": "self", "feature": "input", "full": "full"}
Unit = Literal["logit", "cosine"]


@dataclass(frozen=True)
class StagOptions:
    """What :class:`StagTerm` can be told.

    Attributes:
        weight: Of the loss, 0 or more. With 0 the method is left exactly as it is.
        space: See :func:`stag_alignment`.
        anchors: The kind; see :func:`structural_anchors`. None for the one that is the same
            derivative as the space: ``self`` for ``row``, ``input`` for ``feature``, ``full`` for
            ``full``.
        scope: ``host`` for the samples that the method itself learns from, ``all`` for all samples
            of a batch that it learns from.
        unit: What a weight of 1 means. ``cosine``: the loss as it stands. Its gradient by the
            features falls as ``1 / ||h||``, so the weight that matters grows with the network's
            logits. ``logit``: the loss of a sample times ``||h|| ||w_y||``, a constant; that is
            what logits are made of, and so what the entropy of the host is made of.
        row_normalize: See :func:`structural_anchors`.
        temperature: See :func:`structural_anchors`.
        use_bias: See :func:`structural_anchors`.

    Raises:
        InputError: An option is not possible.
    """

    weight: float = 1.0
    space: Space = "full"
    anchors: Kind | None = None
    scope: Scope = "host"
    unit: Unit = "logit"
    row_normalize: bool = False
    temperature: float = 1.0
    use_bias: bool = False

    def __post_init__(self) -> None:
        require("weight", self.weight, 0.0)
        check_temperature(self.temperature)
        if self.anchors is None and self.space in NATURAL:
            object.__setattr__(self, "anchors", NATURAL[self.space])
        for name, given, choices in (
            ("space", self.space, get_args(Space)),
            ("kind of anchors", self.anchors, get_args(Kind)),
            ("scope", self.scope, get_args(Scope)),
            ("unit", self.unit, get_args(Unit)),
        ):
            if given not in choices:
                raise unknown_name(name, given, choices)
        if (self.space == "full") != (self.anchors == "full"):
            raise InputError(
                f"space {self.space!r} and anchors {self.anchors!r} do not fit: the gradient by "
                "the whole classifier is compared with `full` anchors, and it alone."
            )


class StagTerm:
    """The loss of STAG as a term that any method adds to its own.

    Holds the unit anchors of one classifier, computed when it is made.

    Args:
        head: The classifier that the anchors are computed from.
        options: See :class:`StagOptions`.
        classes: Positions ``[C]`` among its outputs that the stream has, in order; None for all.

    Attributes:
        anchors: ``[C, D]``, or ``[C, C + D]`` for ``full``; rows (both factors of a row) have
            length one.
        reversed_classes: ``[K]`` int64, the classes with ``A_cc > 0``, whose anchors of kind
            ``self`` push features away from ``w_c``.
        entropy: ``[C]``, the self-structural entropies in nats.
        alignment: Mean cosine of the last call, a detached scalar; None where no sample counted.

    Raises:
        InputError: A class has no anchor.
    """

    def __init__(
        self,
        head: Head,
        options: StagOptions | None = None,
        classes: Tensor | None = None,
    ) -> None:
        self.options = StagOptions() if options is None else options
        self.classes = classes
        self.alignment: Tensor | None = None
        self._checked = False
        weight, bias = head.restricted(classes)
        assert self.options.anchors is not None
        found = unit_anchors(
            weight,
            bias,
            kind=self.options.anchors,
            row_normalize=self.options.row_normalize,
            temperature=self.options.temperature,
            use_bias=self.options.use_bias,
        )
        self.anchors = found.directions.to(wide(weight).dtype)
        self.reversed_classes, self.entropy = found.reversed_classes, found.entropy

    def __call__(self, out: Outputs, head: Head) -> Tensor:
        """Compute the weighted loss of one forward pass.

        Args:
            out: Its logits ``[B, C]`` and features ``[B, D]``.
            head: The classifier as it is now; a method may have moved it.

        Returns:
            A scalar; zero, and without graph, where no sample counts.

        Raises:
            InputError: The head is not what makes the logits (seen at the first call).
        """
        logits, options = out.logits, self.options
        zero = wide(logits.detach()).new_zeros(())
        if options.weight == 0:
            return zero
        weight, bias = head.restricted(self.classes)
        features = self._features(out, weight, bias, head.name)
        if head.trains:  # CoTTA: the classifier is a constant of this loss
            with torch.autocast(logits.device.type, enabled=False):
                logits = F.linear(
                    wide(features), wide(weight), None if bias is None else wide(bias)
                )
        counted = counted_samples(
            features, logits, out.selected if options.scope == "host" else None
        )
        self.alignment = None
        if len(counted) == 0:
            return zero
        if len(counted) < len(logits):
            features, logits = features[counted], logits[counted]
        cosine = stag_alignment(features, logits, weight, self.anchors, space=options.space)
        self.alignment = cosine.detach().mean()
        loss = 1 - cosine
        if options.unit == "logit":
            rows = weight[logits.detach().argmax(dim=1)]
            loss = loss * wide(features.detach()).norm(dim=1) * wide(rows).norm(dim=1)
        return options.weight * loss.mean()

    def _features(self, out: Outputs, weight: Tensor, bias: Tensor | None, name: str) -> Tensor:
        """Return the features, after seeing once that the head makes the logits of them."""
        fits = out.features is not None and out.logits.shape[1] == len(weight)
        if not (self._checked and fits):
            check_head(name, out.features, weight, bias, out.logits)
            self._checked = bool(out.logits.isfinite().all())  # NaN says nothing about a head
        assert out.features is not None
        return out.features


def stag_alignment(
    features: Tensor, logits: Tensor, weight: Tensor, anchors: Tensor, *, space: Space
) -> Tensor:
    """Compare each sample's entropy gradient with the anchor of its predicted class.

    =========== ================================ ================== =========================
    space       ``g``, the derivative by         closed form        anchors that fit
    =========== ================================ ================== =========================
    ``row``     row y of the classifier          ``a_y h``          ``self input total sum``
    ``feature`` the features                     ``W^T a``          ``self input total sum``
    ``full``    the whole classifier             ``a (outer) h``    ``full``
    =========== ================================ ================== =========================

    ``a_y <= 0`` always, so ``row`` is ``-cos(h, anchor_y)`` whatever the entropy is. With anchors
    of kind ``self`` and a classifier that knows its own rows (``A_yy < 0``) all entropies cancel:
    it is ``cos(h, w_y)``. ``full`` is ``cos(a, A_y) cos(h, w_y)``.

    Args:
        features: ``h [B, D]``, no row of them zero.
        logits: ``z [B, C]``, no row of them constant.
        weight: ``W [C, D]``, taken as a constant.
        anchors: What :func:`structural_anchors` returned, of any length but zero.
        space: Where the gradients are compared.

    Returns:
        Cosines ``[B]``, in float32 at least (autocast or not), with the graph of features and
        logits.

    Raises:
        InputError: The shapes do not fit each other or the space.
    """
    with torch.autocast(logits.device.type, enabled=False):
        h, z, w = wide(_samples(features)), wide(_samples(logits)), wide(weight.detach().flatten(1))
        _check_fit(h, z, w, anchors, space)
        anchor = anchors.detach().to(h).index_select(0, z.detach().argmax(dim=1))
        if space == "row":
            return -_cosine(h, anchor)
        gradient, _ = scaled_logit_gradient(z)
        if space == "feature":
            return _cosine(gradient @ w, anchor)
        self_gradient, row = anchor.tensor_split([len(w)], dim=1)
        return _cosine(gradient, self_gradient) * _cosine(h, row)


def stag_loss(
    features: Tensor,
    logits: Tensor,
    weight: Tensor,
    anchors: Tensor,
    *,
    space: Space,
    mask: Tensor | None = None,
) -> Tensor:
    """Average ``1 - cos(g, anchor_y)`` over samples.

    Args:
        features: ``h [B, D]``; or ``[B, D, H, W]``, where each location is a sample, as before a
            segmentation network's last 1x1 convolution.
        logits: ``z [B, C]`` or ``[B, C, H, W]``.
        weight: ``W [C, D]`` or that of a 1x1 convolution, taken as a constant.
        anchors: What :func:`structural_anchors` returned.
        space: See :func:`stag_alignment`.
        mask: ``[B]`` or ``[B, H, W]`` bool, the samples that count; None for all. A sample without
            a direction never counts; see :func:`counted_samples`.

    Returns:
        A scalar; zero, and without graph, where no sample counts.

    Raises:
        InputError: The shapes do not fit each other or the space.
    """
    if features.shape[:1] + features.shape[2:] != logits.shape[:1] + logits.shape[2:]:
        raise InputError(
            f"Features {list(features.shape)} and logits {list(logits.shape)} are not of the same "
            "samples: expected [B, D] and [B, C], or [B, D, H, W] and [B, C, H, W]."
        )
    h, z = _samples(features), _samples(logits)
    _check_fit(h, z, weight.flatten(1), anchors, space)
    if mask is not None and (mask.numel() != len(z) or mask.dtype != torch.bool):
        raise InputError(
            f"The mask is {mask.dtype} with {mask.numel()} entries, expected bool, one a sample: "
            f"{len(z)}."
        )
    counted = counted_samples(h, z, None if mask is None else mask.flatten())
    if len(counted) == 0:
        return wide(z.detach()).new_zeros(())
    return (1 - stag_alignment(h[counted], z[counted], weight, anchors, space=space)).mean()


def counted_samples(features: Tensor, logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Find the samples of a mask whose gradient has a direction.

    Args:
        features: ``[B, D]``.
        logits: ``[B, C]``.
        mask: ``[B]`` bool; None for all.

    Returns:
        Their positions ``[N]`` int64: not those with constant logits, with features that are all
        zero (or nearly: 1e-30), or with a feature that is not finite.
    """
    largest = features.detach().abs().amax(dim=1)
    counted = has_direction(logits.detach()) & (largest > 1e-30) & largest.isfinite()
    return (counted if mask is None else counted & mask).nonzero().flatten()


def _cosine(one: Tensor, other: Tensor) -> Tensor:
    """Compare pairs of rows, none of them zero, whatever their lengths."""
    one, other = _near_one(one), _near_one(other)
    cosine: Tensor = (one * other).sum(dim=1) / (one.norm(dim=1) * other.norm(dim=1))
    return cosine


def _near_one(rows: Tensor) -> Tensor:
    """Scale rows by a constant such that no square of theirs leaves the range of the type."""
    return rows / rows.detach().abs().amax(dim=1, keepdim=True)


def _samples(tensor: Tensor) -> Tensor:
    """Make a list of locations ``[B H W, D]`` of ``[B, D, H, W]``; leave ``[B, D]`` as it is."""
    return tensor.movedim(1, -1).flatten(0, -2)


def _check_fit(h: Tensor, z: Tensor, w: Tensor, anchors: Tensor, space: str) -> None:
    """Refuse tensors that do not belong together."""
    if space not in get_args(Space):
        raise unknown_name("space", space, get_args(Space))
    classes, width = w.shape
    expected = (classes, classes + width) if space == "full" else (classes, width)
    if h.shape == (len(z), width) and z.shape[1] == classes and anchors.shape == expected:
        return
    shapes = ", ".join(str(list(tensor.shape)) for tensor in (h, z, w, anchors))
    raise InputError(
        f"Features, logits, weight and anchors have the shapes {shapes}; expected [B, D], [B, C], "
        f"[C, D] and {'[C, C + D]' if space == 'full' else '[C, D]'} in the space {space!r}."
    )
