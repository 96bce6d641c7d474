"""EATA: entropy minimisation on reliable, diverse samples, held back by a Fisher penalty."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tta_lightning.adapter import Adapter
from tta_lightning.contract import (
    CLASSES,
    Outputs,
    StepReport,
    check_classes,
    class_positions,
    map_tensors,
    writable,
)
from tta_lightning.errors import InputError
from tta_lightning.functional import RELIABLE, entropy, entropy_margin, keep_float32, wide
from tta_lightning.methods.selection import logits_of_kept
from tta_lightning.rules import UpdateRule
from tta_lightning.rules.base import require, require_whole

_DECAY = 0.9  # of the moving average of predictions
_AVERAGE = "probabilities"  # its name in the memory: [C]


class EATA(Adapter):
    """Minimise the weighted entropy of samples that are sure and unlike those before.

    Niu, Wu, Zhang, Chen, Zheng, Zhao, Tan, "Efficient Test-Time Model Adaptation without
    Forgetting", ICML 2022, https://arxiv.org/abs/2204.02610 (equations 2 to 9)::

        L(x) = mean_{i in S} exp(E0 - H_i) * H_i  +  beta * sum_j F_j (theta_j - theta0_j)^2
        S    = {i : H_i < E0  and  |cos(p_i, m)| < eps}

    with ``p_i`` the softmax ``[C]`` of sample ``i``, ``H_i`` its entropy in nats, E0 =
    ``e_margin``, eps = ``d_margin``, beta = ``fisher_alpha``. ``m`` ``[C]`` is the moving average
    of predictions, ``0.9 * m + 0.1 * mean_{i in S} p_i`` after each batch that was learnt from;
    before there is one, all reliable samples are kept. The weights are not differentiated.
    ``theta`` are the affine parameters of normalisation layers, ``theta0`` those of the source
    model. Where S is empty nothing moves, the penalty included. Without batch normalisation the
    backward pass runs over S alone; see :func:`~tta_lightning.methods.selection.logits_of_kept`.

    ``F_j`` is measured by :meth:`prepare` on clean images and needs no labels: the model's own
    predictions stand for them. As in the published code it is the mean over batches of the squared
    gradient of the mean cross-entropy of a batch. So it depends on the batch size (about
    1 / B of the squared gradients of single images), and the published beta on 64 images a batch.
    In a stream the clean batches have the stream's ``batch_size``.

    With ``fisher_alpha=0`` this is ETA, which needs no clean images.

    Departs from the published code in:

    * :meth:`reset` forgets the moving average too; the published one keeps it.
    * A batch whose loss or gradient is not finite changes neither the weights nor the average.
    * ``F`` is measured on at most ``fisher_samples`` images of what is given, in its order; the
      published code draws 2,000 images of ImageNet's validation set. A rest of one image after
      larger batches is left out: it would weigh as much as a batch, by statistics of its own.
      With restricted classes, the predictions on clean images are restricted to them as well.
    * Layer, group and instance normalisation are adapted too, dropout is off, and the running
      statistics are kept unused, as in :class:`Tent <tta_lightning.methods.Tent>`.

    The paper's ``d_margin`` is 0.05 for ImageNet-C. Customary for CIFAR-10-C: ``d_margin=0.4``,
    ``fisher_alpha=1``.

    Args:
        network: Images ``[B, 3, H, W]`` in [0, 1] to logits ``[B, C]``; see :class:`Adapter`.
        rule: How gradients become updates.
        e_margin: E0 in nats; None for ``0.4 ln C``.
        d_margin: eps; above 1 no sample counts as redundant.
        fisher_alpha: beta; 0 for no penalty.
        fisher_samples: How many clean images ``F`` is measured on, at most.

    Raises:
        InputError: A hyper-parameter is out of range, or (when adaptation starts) ``F`` is needed
            and was not measured.
    """

    def __init__(
        self,
        network: str | dict[str, Any] | nn.Module,
        rule: UpdateRule | None = None,
        e_margin: float | None = None,
        d_margin: float = 0.05,
        fisher_alpha: float = 2000.0,
        fisher_samples: int = 2000,
    ) -> None:
        super().__init__(network, rule)
        self.e_margin = None if e_margin is None else require("e_margin", e_margin, 0.0)
        self.d_margin = require("d_margin", d_margin, 0.0)
        self.fisher_alpha = require("fisher_alpha", fisher_alpha, 0.0)
        self.fisher_samples = require_whole("fisher_samples", fisher_samples, 1)
        self.fisher: dict[str, Tensor] = {}
        """F by the parameter's name in the network, in its shape; empty before it was measured."""

    def prepare(self, clean: Iterable[Tensor]) -> None:
        """Measure F at the network as it is now: call it before the stream or after a reset.

        Args:
            clean: Batches of unlabelled images ``[B, 3, H, W]`` in [0, 1], any number; not read at
                all with ``fisher_alpha=0``, and not further than ``fisher_samples`` images. F
                depends on the size of the batches. A rest of one image is left out if it is not the
                only one.

        Raises:
            InputError: There is no image, or a gradient is not finite.
        """
        self.ready()
        if self.fisher_alpha == 0:
            return
        squares: dict[str, Tensor] = {}
        batches = 0
        for images in self._readable(_first(clean, self.fisher_samples)):
            for name, grad in self._gradient_of_own_labels(images).items():
                square = wide(grad).square()
                squares[name] = squares[name] + square if name in squares else square
            batches += 1
        if not batches:
            raise InputError(
                "EATA weighs its penalty by clean images, and got none. Give a source with some "
                "clean, unlabelled images, or set fisher_alpha=0 (ETA)."
            )
        self.fisher = {name: total / batches for name, total in squares.items()}

    def loss(self, out: Outputs, images: Tensor) -> Tensor | None:
        """Compute the weighted entropy of the kept samples plus the penalty, a scalar.

        Returns:
            None where no sample is kept.
        """
        if self.fisher_alpha > 0 and not self.fisher:
            raise InputError(
                f"EATA with fisher_alpha = {self.fisher_alpha:g} needs to know which parameters "
                "matter, and has seen no clean images. Call prepare(clean) with batches of clean "
                "images first, set `clean` of the stream, or set fisher_alpha=0 (ETA)."
            )
        entropies = entropy(out.logits.detach())
        margin = entropy_margin(self.e_margin, RELIABLE, out.logits.shape[1])
        out.selected = (entropies < margin) & self._is_new(out.logits)
        if not out.selected.any():
            return None
        kept = entropy(logits_of_kept(self, out, images))
        weights = (margin - entropies[out.selected]).exp()
        return (weights * kept).mean() + self._penalty()

    def learn(self, out: Outputs, images: Tensor) -> StepReport:
        """Take a step, and then count the kept samples into the moving average."""
        report = super().learn(out, images)
        if report.updated:
            assert out.selected is not None
            batch = wide(out.logits.detach()).softmax(dim=1)[out.selected].mean(dim=0)
            before = self.memory.get(_AVERAGE)
            after = batch if before is None else _DECAY * before + (1 - _DECAY) * batch
            self.memory = {_AVERAGE: after, CLASSES: class_positions(out.logits, self.classes)}
        return report

    def get_extra_state(self) -> dict[str, Any]:
        """Return the state of the rule, the memory and F."""
        return {**super().get_extra_state(), "fisher": self.fisher}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take what :meth:`get_extra_state` returned, onto the network's device."""
        super().set_extra_state(state)
        device = next((p.device for p in self.network.parameters()), None)
        self.fisher = map_tensors(lambda tensor: tensor.to(device), state["fisher"])

    def _readable(self, clean: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield the clean images; where there are none, say what does without."""
        try:
            yield from clean
        except InputError as error:
            raise InputError(f"{error} With fisher_alpha=0 (ETA) EATA does without.") from error

    def _gradient_of_own_labels(self, images: Tensor) -> dict[str, Tensor]:
        """Differentiate the mean cross-entropy of a batch against the model's own predictions."""
        with torch.inference_mode(False), torch.enable_grad():
            images = writable(images)
            logits = wide(self.outputs(images).logits)
            grads = self.gradients(F.cross_entropy(logits, logits.argmax(dim=1)))
        if grads is None:
            raise InputError(
                "A batch of clean images gave a loss or a gradient that is not finite, so it is "
                "not known which parameters matter. Look for NaN or infinite pixels."
            )
        return grads

    def _is_new(self, logits: Tensor) -> Tensor:
        """Tell which samples ``[B]`` are predicted unlike the average before them."""
        average = self.memory.get(_AVERAGE)
        if average is None:
            return torch.ones(len(logits), dtype=torch.bool, device=logits.device)
        check_classes(self.memory, class_positions(logits, self.classes), "EATA")
        probabilities = wide(logits.detach()).softmax(dim=1)
        similarity = F.cosine_similarity(average[None], probabilities, dim=1)
        return similarity.abs() < self.d_margin

    def _penalty(self) -> Tensor | float:
        """Sum the weighted squared distances from the source model, times ``fisher_alpha``."""
        if self.fisher_alpha == 0:
            return 0.0
        assert self._source is not None
        total: Tensor | float = 0.0
        for name, importance in self.fisher.items():
            parameter = self._adapted[name]
            distance = parameter - self._source[f"network.{name}"].to(parameter)
            total = total + self.fisher_alpha * (importance * distance.square()).sum()
        return total

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move F along when the module changes device, but keep its precision."""
        super()._apply(fn, recurse)
        self.fisher = map_tensors(keep_float32(fn), self.fisher)
        return self


def _first(batches: Iterable[Tensor], count: int) -> Iterable[Tensor]:
    """Yield batches until `count` images are complete, the last one cut.

    Empty ones are skipped, and so is a single image after larger batches.
    """
    largest = 0
    for images in batches:
        part = images[:count]
        if len(part) >= max(1, min(largest, 2)):
            yield part
        largest = max(largest, len(part))
        count -= len(images)
        if count <= 0:
            return
