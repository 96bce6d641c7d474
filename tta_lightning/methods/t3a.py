"""T3A: the classifier's rows replaced by centroids of the surest features so far."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tta_lightning.adapter import Adapter
from tta_lightning.contract import CLASSES, Outputs, check_classes, class_positions, writable
from tta_lightning.errors import InputError
from tta_lightning.functional import entropy, wide
from tta_lightning.methods.features import features_of, report_features
from tta_lightning.models.heads import check_head

_ALL = -1  # as filter_k: no support is dropped
# Names in the memory: [N, D] of unit length, [N] int64, and [N] in nats.
_SUPPORTS, _LABELS, _ENTROPIES = "supports", "labels", "entropies"


class T3A(Adapter):
    """Predict by likeness to centroids of the features that were predicted surely before.

    Iwasawa, Matsuo, "Test-Time Classifier Adjustment Module for Model-Agnostic Domain
    Generalization", NeurIPS 2021, https://openreview.net/forum?id=e_yvNqkJKAW. With the features
    ``z [D]`` that enter the final linear map ``W z + b``, a support is a feature vector with the
    class that the network predicts for it and the entropy H of that prediction, in nats. The first
    supports are the rows of ``W`` themselves, predicted by the whole map, bias included. For each
    batch::

        S     <- S and (z_i, argmax_c f(x_i)_c, H(softmax(f(x_i))))  for all images i of the batch
        S_c   <- the M supports of class c with the lowest H                     for every class c
        mu_c   = v / |v|,   v = sum_{s in S_c} s / |s|
        logits = (<z_i, mu_1>, ..., <z_i, mu_C>)

    M = ``filter_k``, S = the ``memory``. The prediction of a batch is made *after* its update: its
    images are among the supports that predict them. Neither ``z_i`` nor the result is scaled, and
    there is no bias, so confidences are not those of the network.

    A class without any support has the centroid 0 and the logit 0, as in the published code. That
    happens where the row of a class is predicted as another class and no image is predicted as it.

    No parameter moves, and batch normalisation keeps the statistics of the source data. There is no
    loss, so nothing can be added to it: the STAG callback refuses this method. The memory grows to
    ``M * C`` supports of D numbers each, and they are part of the ``state_dict``; with
    ``filter_k=-1`` it grows with the stream.

    Departs from the published code in:

    * ``filter_k=-1`` keeps all supports. Some public copies take it for the end of a slice, and
      drop the least sure support of each class with every batch.
    * Images whose logits or features are not finite are not kept; their own prediction is made of
      the features they have.
    * Supports are held at unit length, of which alone the centroids are made, and in float32 at
      least.
    * Of supports with the same entropy, the older ones are kept.

    The paper chooses ``filter_k`` by validation among 1, 5, 20, 50, 100 and all; the default is the
    largest finite one of these.

    Args:
        network: Images ``[B, 3, H, W]`` in [0, 1] to logits ``[B, C]``, ending in one linear map;
            see :class:`Adapter`.
        filter_k: M, the supports that a class keeps; -1 for all.

    Raises:
        InputError: ``filter_k`` is out of range; or (when adaptation starts) the network does not
            end in one linear map; or the classes of the stream change without a reset.
    """

    predicts = "after update"

    def __init__(self, network: str | dict[str, Any] | nn.Module, filter_k: int = 100) -> None:
        super().__init__(network)
        if filter_k != _ALL and not (isinstance(filter_k, int) and filter_k >= 1):
            raise InputError(
                f"filter_k = {filter_k} is out of range: expected a whole number from 1 on, or "
                f"{_ALL} for all supports."
            )
        self.filter_k = filter_k

    def configure(self) -> None:
        """Let nothing move and keep the source statistics."""

    def adapt_step(self, images: Tensor) -> Tensor:
        """Add the images of a batch to the supports, then predict them.

        Args:
            images: ``[B, 3, H, W]`` in [0, 1].

        Returns:
            Logits ``[B, C]`` in float32 at least, without graph.
        """
        self.ready()
        with torch.inference_mode(False), torch.no_grad():
            with self.phase("inference"):
                out = self.outputs(writable(images))
            with self.phase("update"):
                logits, memory, added = self._adjust(out)
        if added:
            self.memory = memory
        left_out = len(logits) - added
        self.report = report_features(added > 0, left_out, len(logits), "not added to the supports")
        return logits

    def forward(self, images: Tensor) -> Tensor:
        """Predict as the next :meth:`adapt_step` would, without keeping the images.

        Args:
            images: ``[B, 3, H, W]`` in [0, 1].

        Returns:
            Logits ``[B, C]``, without graph.
        """
        self.ready()
        with torch.inference_mode(False), torch.no_grad():
            return self._adjust(self.outputs(writable(images)))[0]

    def _adjust(self, out: Outputs) -> tuple[Tensor, dict[str, Tensor], int]:
        """Predict a batch by the supports that it is part of.

        Returns:
            Logits ``[B, C]``, the memory that follows, and how many images were added to it.
        """
        features, logits = features_of(self, out), out.logits
        finite = features.isfinite().all(dim=1) & logits.isfinite().all(dim=1)
        with torch.autocast(features.device.type, enabled=False):
            new = _supports(features[finite], logits[finite])
            old = self._before(out, finite)
            grown = {name: torch.cat([old[name], tensor]) for name, tensor in new.items()}
            order = _surest(grown[_ENTROPIES], grown[_LABELS], self.filter_k)
            kept = {name: tensor[order] for name, tensor in grown.items()}
            centroids = _centroids(kept[_SUPPORTS], kept[_LABELS], logits.shape[1])
            predicted = features @ centroids.to(features).T
        return predicted, {**kept, CLASSES: old[CLASSES]}, len(new[_LABELS])

    def _before(self, out: Outputs, finite: Tensor) -> dict[str, Tensor]:
        """Return the memory before a batch; at first it is made of the rows of the head.

        Args:
            out: The forward pass on the batch.
            finite: ``[B]`` bool, the images to check the head by.

        Raises:
            InputError: The head does not give the logits, or the classes are not those of the
                memory.
        """
        classes = class_positions(out.logits, self.classes)
        if not self.memory:
            weight, bias = self.head.restricted(self.classes)
            if out.features is not None and finite.any():
                seen, given = out.features[finite], out.logits[finite]
                check_head(self.head.name, seen, weight, bias, given)
            rows = wide(weight)
            logits = F.linear(rows, rows, None if bias is None else bias.to(rows))
            return {**_supports(rows, logits), CLASSES: classes}
        check_classes(self.memory, classes, "T3A")
        return self.memory


def _supports(features: Tensor, logits: Tensor) -> dict[str, Tensor]:
    """Make supports of features ``[B, D]`` and the logits ``[B, C]`` predicted for them."""
    return {
        _SUPPORTS: F.normalize(features, dim=1),
        _LABELS: logits.argmax(dim=1),
        _ENTROPIES: entropy(logits),
    }


def _surest(entropies: Tensor, labels: Tensor, count: int) -> Tensor:
    """Find the supports of each class with the lowest entropy.

    Args:
        entropies: ``[N]`` in nats.
        labels: ``[N]`` int64.
        count: How many of a class, at most; -1 for all.

    Returns:
        Positions ``[M]`` int64 by class, and within a class by entropy.
    """
    order = entropies.argsort(stable=True)
    order = order[labels[order].argsort(stable=True)]
    if count == _ALL:
        return order
    by_class = labels[order]
    first_of_class = torch.searchsorted(by_class, by_class)
    rank = torch.arange(len(order), device=order.device) - first_of_class
    return order[rank < count]


def _centroids(supports: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Return the direction ``[C, D]`` of the sum of each class's supports; 0 where it has none.

    Args:
        supports: ``[N, D]``.
        labels: ``[N]`` int64, ascending.
        classes: C.
    """
    # Sums of consecutive rows, always in the same order: adding by index is not, on a GPU.
    rows = torch.arange(len(labels), device=labels.device)
    starts = torch.searchsorted(labels, torch.arange(classes, device=labels.device))
    return F.normalize(F.embedding_bag(rows, supports, starts, mode="sum"), dim=1)
