"""ROID: certain and diverse samples, agreement over views, and a pull back to the source."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tta_lightning.adapter import Adapter
from tta_lightning.contract import CLASSES, Outputs, StepReport, check_classes, class_positions
from tta_lightning.errors import InputError
from tta_lightning.functional import entropy, wide
from tta_lightning.methods.augment import SEED_STRIDE, augment, generator_of_step
from tta_lightning.models.norms import batch_norm_layers, without_advice
from tta_lightning.rules import UpdateRule
from tta_lightning.rules.base import require_fraction, require_whole

_AVERAGE, _STEP = "probabilities", "step"  # in the memory: m [C], and a counter
_CLIP, _OFFSET = 0.99, 1e-5  # of the probabilities and of their ratios, as published


class ROID(Adapter):
    """Make sure and rare predictions surer and stable, and stay close to the source model.

    Marsden, Döbler, Yang, "Universal Test-time Adaptation through Weight Ensembling, Diversity
    Weighting, and Prior Correction", WACV 2024, https://arxiv.org/abs/2306.00650. For each batch
    of B images, with the logits ``o_i = f(theta, x_i)`` ``[C]`` and ``p_i = softmax(o_i)``::

        d_i    = minmax_i( 1 - cos(m, p_i) )             diversity, 0 to 1 over the batch
        c_i    = minmax_i( -H(p_i) )                     certainty, 0 to 1 over the batch
        S      = {i : d_i >= mean_j d_j}
        w_i    = exp( d_i * c_i / tau )
        SLR_i  = - sum_c q_ic * log( q_ic / (1 - q_ic) + 1e-5 ),   q = min(p, 0.99)
        SCE_i  = - 1/2 sum_c p_ic * log p'_ic  -  1/2 sum_c p'_ic * log p_ic
        L      = 1/B sum_{i in S} w_i * (SLR_i + SCE_i)
        theta <- one step of the rule along the gradient of L
        theta <- alpha * theta + (1 - alpha) * theta0
        m     <- beta * m + (1 - beta) * mean_{i <= B} p_i

    ``m`` ``[C]`` is the moving average of predictions, at first uniform; ``theta0`` are the weights
    of the source model; ``H`` is the entropy in nats; ``p'_i`` is the prediction of an augmented
    view of ``x_i``, made of the samples in S by a second forward pass. The gradient flows through
    both passes, and not through ``w_i``. tau = ``temperature``, alpha = ``momentum_src``, beta =
    ``momentum_probs``. S is never empty. Affine parameters of normalisation layers move. As in the
    published code, differences of any size are stretched to [0, 1], those of rounding included:
    where all predictions are one-hot and alike, it is rounding that chooses S.

    The prediction, made before the update, is corrected by the prior ``r [C]`` of the batch::

        r = mean_i p_i,   g = max(1/B, 1/C) / max_c r_c,   r' = (r + g) / (1 + g * C)
        returned: o_ic * r'_c

    As in the published code it is the logits that are scaled, not the probabilities. So what is
    returned depends on the other images of the batch, and on the zero of the logits.

    The three parts are switched by ``weighting`` (off: S is the batch, ``w_i = 1``, no ``m``),
    ``consistency`` (off: no SCE) and ``prior_correction`` (off: the logits as they are).

    A view is drawn by :func:`~tta_lightning.methods.augment.augment` with reflected edges, without
    blur and noise. Its random numbers come from ``seed`` and the number of steps since the last
    reset: a reset or a resumed run replays them on the same device, and no other random number is
    touched. With batch normalisation, the views are normalised by their own statistics, as
    published. Attached terms see the forward pass on the images themselves, and S.

    Departs from the published code in:

    * L is divided by the number of images in the batch; the published one by the configured batch
      size, also where the last batch is shorter.
    * Where all samples of a batch have the same diversity or certainty (as an image alone has), it
      counts as 0, so with the same diversity all are kept with ``w_i = 1``. The published code
      divides 0 by 0.
    * ``consistency`` works without ``weighting``, which fails in the published code.
    * A batch whose loss or gradient is not finite changes neither the weights nor ``m``, and counts
      as no step. Samples whose own prediction is not finite do not enter the prior either.
    * Affine parameters alone are averaged with those of the source model; all others are equal.
    * Layers are adapted, dropout is off and running statistics are kept unused as in
      :class:`Tent <tta_lightning.methods.Tent>`. :meth:`reset` also forgets ``m``.

    The authors' rules: ``Adam(lr=1e-3)`` at batch 200 for CIFAR-10-C;
    ``SGD(lr=2.5e-4, momentum=0.9, nesterov=True)`` at batch 64 for ImageNet-C with a ResNet-50; the
    default is that without Nesterov's.

    Args:
        network: Images ``[B, 3, H, W]`` in [0, 1] to logits ``[B, C]``; see :class:`Adapter`.
        rule: How gradients become updates.
        temperature: tau.
        momentum_src: alpha, what the weights keep of themselves in a step; 1 for no pull back.
        momentum_probs: beta, what ``m`` keeps of itself in a step.
        weighting: Weigh the samples, and drop the less diverse ones.
        consistency: Learn from an augmented view too.
        prior_correction: Scale the returned logits by the prior of the batch.
        seed: Of the views.

    Raises:
        InputError: A hyper-parameter is out of range, or (at a step) the number of classes changed
            without a reset.
    """

    def __init__(
        self,
        network: str | dict[str, Any] | nn.Module,
        rule: UpdateRule | None = None,
        temperature: float = 1 / 3,
        momentum_src: float = 0.99,
        momentum_probs: float = 0.9,
        weighting: bool = True,
        consistency: bool = True,
        prior_correction: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(network, rule)
        if not 0 < temperature < math.inf:
            raise InputError(
                f"temperature = {temperature} is out of range: expected 0 < temperature < inf."
            )
        self.temperature = temperature
        self.momentum_src = require_fraction("momentum_src", momentum_src)
        self.momentum_probs = require_fraction("momentum_probs", momentum_probs)
        self.weighting = weighting
        self.consistency = consistency
        self.prior_correction = prior_correction
        self.seed = require_whole("seed", seed, 0, SEED_STRIDE)

    def adapt_step(self, images: Tensor) -> Tensor:
        """Predict a batch, then learn from it.

        Args:
            images: ``[B, 3, H, W]`` in [0, 1].

        Returns:
            Logits ``[B, C]`` of the network as it was before the update, corrected by the prior of
            the batch, without graph.
        """
        with torch.inference_mode(False):
            return self._corrected(super().adapt_step(images))

    def forward(self, images: Tensor) -> Tensor:
        """Predict as the next :meth:`adapt_step` would, without learning.

        Args:
            images: ``[B, 3, H, W]`` in [0, 1].

        Returns:
            Logits ``[B, C]``, corrected by the prior of the batch.
        """
        return self._corrected(super().forward(images))

    def loss(self, out: Outputs, images: Tensor) -> Tensor | None:
        """Compute the weighted loss of the kept samples and of their views, a scalar.

        Returns:
            None for a batch without images.
        """
        if not len(images):
            return None
        logits = wide(out.logits)
        weights, out.selected = self._weigh(logits.detach())
        kept = logits[out.selected]
        losses = soft_likelihood_ratio(kept)
        if self.consistency:
            losses = losses + symmetric_cross_entropy(kept, self._of_views(images, out.selected))
        return (weights[out.selected] * losses).sum() / len(images)

    def learn(self, out: Outputs, images: Tensor) -> StepReport:
        """Take a step, and then one towards the source model; count it and the predictions."""
        report = super().learn(out, images)
        if report.updated:
            self._approach_source()
            step = torch.tensor(self._steps() + 1)
            self.memory = {_STEP: step, **self._next_average(out.logits.detach())}
        return report

    def _weigh(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Weigh the samples of a batch.

        Args:
            logits: ``[B, C]``, without graph.

        Returns:
            ``w [B]``, and which samples are kept, ``[B]`` bool.
        """
        if not self.weighting:
            return logits.new_ones(len(logits)), logits.new_ones(len(logits), dtype=torch.bool)
        probabilities = logits.softmax(dim=1)
        similarity = F.cosine_similarity(self._average(probabilities)[None], probabilities, dim=1)
        diversity = _from_0_to_1(1 - similarity)
        certainty = _from_0_to_1(-entropy(logits))
        dropped = diversity < diversity.mean()  # so a NaN is kept, and found in the loss
        return (diversity * certainty / self.temperature).exp(), ~dropped

    def _of_views(self, images: Tensor, kept: Tensor) -> Tensor:
        """Return the logits ``[K, C]`` of views of the K kept images, with their graph."""
        generator = generator_of_step(self.seed, self._steps(), images.device)
        views = augment(images[kept], generator, padding="reflect", blur_and_noise=False)
        # One image may be kept alone; of a batch of one, the pass on the images has warned already.
        with without_advice(batch_norm_layers(self.network).values()):
            return wide(self.outputs(views).logits)

    @torch.no_grad()
    def _approach_source(self) -> None:
        """Average the adapted parameters with those of the source model; equal ones stay."""
        assert self._source is not None
        for name, parameter in self._adapted.items():
            source = self._source[f"network.{name}"].to(parameter)
            parameter.lerp_(source, 1 - self.momentum_src)

    def _average(self, probabilities: Tensor) -> Tensor:
        """Return ``m [C]``, which is uniform before the first step.

        Args:
            probabilities: ``[B, C]``, of the batch at hand.
        """
        classes = probabilities.shape[1]
        average: Tensor | None = self.memory.get(_AVERAGE)
        if average is None:
            return probabilities.new_full((classes,), 1 / classes)
        check_classes(self.memory, class_positions(probabilities, self.classes), "ROID")
        return average

    def _next_average(self, logits: Tensor) -> dict[str, Tensor]:
        """Return ``m [C]`` by its name after a batch of logits ``[B, C]``; nothing if unused."""
        if not self.weighting:
            return {}
        probabilities = wide(logits).softmax(dim=1)
        before, batch = self._average(probabilities), probabilities.mean(dim=0)
        after = self.momentum_probs * before + (1 - self.momentum_probs) * batch
        return {_AVERAGE: after, CLASSES: class_positions(logits, self.classes)}

    def _corrected(self, logits: Tensor) -> Tensor:
        """Scale logits ``[B, C]`` by the smoothed prior of their batch, if that is asked for."""
        probabilities = wide(logits.detach()).softmax(dim=1)
        finite = probabilities[probabilities.isfinite().all(dim=1)]
        if not (self.prior_correction and len(finite)):
            return logits
        return (logits * smoothed_prior(finite)).to(logits.dtype)

    def _steps(self) -> int:
        return int(self.memory.get(_STEP, 0))


def soft_likelihood_ratio(logits: Tensor) -> Tensor:
    """Compute minus the mean log-odds of the classes under their own probabilities.

    Unlike the entropy's, its gradient does not fade as a prediction becomes sure; that of a class
    ends where its probability reaches 0.99.

    Args:
        logits: ``[B, C]``.

    Returns:
        ``[B]`` in nats, below 0 for sure predictions.
    """
    p = logits.softmax(dim=1).clamp(max=_CLIP)
    return -(p * (p / (1 - p) + _OFFSET).log()).sum(dim=1)


def symmetric_cross_entropy(one: Tensor, other: Tensor) -> Tensor:
    """Average the two cross-entropies between pairs of predictions.

    Args:
        one: Logits ``[B, C]``.
        other: Logits ``[B, C]``.

    Returns:
        ``[B]`` in nats, not negative; both arguments keep their gradient.
    """
    there = one.softmax(dim=1) * other.log_softmax(dim=1)
    back = other.softmax(dim=1) * one.log_softmax(dim=1)
    return -(there + back).sum(dim=1) / 2


def smoothed_prior(probabilities: Tensor) -> Tensor:
    """Estimate how frequent the classes of a batch are, the more evenly the smaller it is.

    Args:
        probabilities: ``[B, C]``, one image at least.

    Returns:
        ``[C]``, which sums to 1.
    """
    count, classes = probabilities.shape
    prior = probabilities.mean(dim=0)
    smooth = max(1 / count, 1 / classes) / prior.max()
    return (prior + smooth) / (1 + smooth * classes)


def _from_0_to_1(values: Tensor) -> Tensor:
    """Map values ``[B]`` linearly to [0, 1], the least to 0; equal ones to 0."""
    low, high = values.aminmax()
    width = high - low
    return (values - low) / torch.where(width > 0, width, 1)
