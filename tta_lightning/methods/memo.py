"""MEMO: one step towards agreement over views of one image, a prediction, and all is forgotten."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn

from tta_lightning.adapter import Adapter
from tta_lightning.contract import Outputs, StepReport, writable
from tta_lightning.errors import unknown_name
from tta_lightning.functional import all_finite, wide, without_cast_cache
from tta_lightning.methods.augmix import Crop, augmix
from tta_lightning.methods.mt3 import check_images, report_episodes
from tta_lightning.models.norms import batch_norm_layers
from tta_lightning.rules import SGD, UpdateRule
from tta_lightning.rules.base import require, require_whole

_SERVED = "images"  # in the memory: how many were served since the last reset
_SEEDS = 2**32  # the seed is one of two words that the random numbers of an image come from


class MEMO(Adapter):
    """Minimise the entropy of the prediction that is averaged over views, image by image.

    Zhang, Levine, Finn, "MEMO: Test Time Robustness via Adaptation and Augmentation", NeurIPS 2022,
    https://arxiv.org/abs/2110.09506 (equations 2 and 3). For each image x by itself, with B views
    ``a_b(x)`` and the source model theta::

        pbar   = 1/B sum_b softmax(f(theta, a_b(x)))
        L      = - sum_c pbar_c log pbar_c
        theta' = theta + one step of the rule along the gradient of L
        the prediction is f(theta', x)

    B = ``n_augmentations``. All parameters move; the state of the rule is fresh for each image;
    nothing is carried over, so a batch of N images is N episodes. The views of an image are those
    of :func:`~tta_lightning.methods.augmix.augmix`; they depend on ``seed`` and on how many images
    came before it since the last reset, not on its batch. Predicts *after* its update.

    Batch normalisation, in every forward pass, uses ``mean = (N mean_source + mean_batch)/(N + 1)``
    and the variance alike, N = ``prior_strength``; the batch are the B views or the single image,
    and its variance is the unbiased one. The statistics are constants of the gradient, as
    published. A layer that gets one value a channel uses its source statistics.

    Attached terms are added to the loss of each step; they see x under the parameters of the step.

    Departs from the published code in:

    * The state of the rule: published, that of AdamW goes on from image to image.
    * The views have the size of the image: published, 32 px padded by 4, or 224 px. Edges that come
      in are grey; published, (128, 0, 0), which is what Pillow makes of 128.
    * An image whose loss, step or prediction is not finite is predicted by theta, and counted.

    The paper's settings: the default ones for CIFAR-10 and a ResNet-26 with group normalisation;
    ``SGD(lr=2.5e-4)``, ``n_augmentations=64``, ``crop="resized"`` for ImageNet and a ResNet-50;
    there, for a transformer, AdamW with a rate of 1e-5 and a decay of 0.01, which in one step takes
    1e-7 of a weight: ``Adam(lr=1e-5)``.

    Args:
        network: Images ``[B, 3, H, W]`` in [0, 1] to logits ``[B, C]``; see :class:`Adapter`.
        rule: How gradients become updates; None for ``SGD(lr=0.005)``, without momentum.
        n_augmentations: B.
        steps: Of the rule, each on new views.
        prior_strength: N; 0 for statistics of the batch alone, None for those of the source.
        crop: Of the views: ``pad`` for small images, ``resized`` as in trainings on ImageNet.
        seed: Of the views.

    Raises:
        InputError: A hyper-parameter is out of range.
    """

    predicts = "after update"
    episodic = True

    def __init__(
        self,
        network: str | dict[str, Any] | nn.Module,
        rule: UpdateRule | None = None,
        n_augmentations: int = 32,
        steps: int = 1,
        prior_strength: float | None = 16.0,
        crop: Crop = "pad",
        seed: int = 0,
    ) -> None:
        super().__init__(network, SGD(lr=0.005) if rule is None else rule)
        self.n_augmentations = require_whole("n_augmentations", n_augmentations, 1)
        self.steps = require_whole("steps", steps, 1)
        self.seed = require_whole("seed", seed, 0, _SEEDS)
        if prior_strength is not None:
            require("prior_strength", prior_strength, 0)
        self.prior_strength = prior_strength
        if crop not in get_args(Crop):
            raise unknown_name("crop", crop, get_args(Crop))
        self.crop: Crop = crop

    def configure(self) -> None:
        """Let every parameter move, in copies that are forgotten."""
        for parameter in self.network.parameters():
            parameter.requires_grad_(parameter.is_floating_point())

    def moving_tensors(self) -> dict[str, Tensor]:
        """Name nothing: between batches the network is as it was."""
        return {}

    def adapt_step(self, images: Tensor) -> Tensor:
        """Predict each image with the network that a step on its views makes of theta.

        Args:
            images: ``[B, 3, H, W]`` in [0, 1].

        Returns:
            Logits ``[B, C]``, without graph.
        """
        self.ready()
        check_images(type(self).__name__, images)
        if not len(images):
            self.report = StepReport(reason="there is no image")
            return self.outputs(images).logits.detach()
        with self.phase("update"):
            logits, losses, finite = self._episodes(images)
        self.memory = {_SERVED: torch.tensor(self._served() + len(images))}
        self.report = report_episodes(losses, finite)
        return logits

    def forward(self, images: Tensor) -> Tensor:
        """Predict as the next :meth:`adapt_step` would, and forget that too.

        Args:
            images: ``[B, 3, H, W]`` in [0, 1].

        Returns:
            Logits ``[B, C]``, without graph.
        """
        self.ready()
        check_images(type(self).__name__, images)
        if not len(images):
            return self.outputs(images).logits.detach()
        return self._episodes(images)[0]

    def outputs(self, images: Tensor) -> Outputs:
        """Run the network once, its statistics blended with those of these images."""
        with self._blended_statistics():
            return super().outputs(images)

    def loss(self, out: Outputs, images: Tensor) -> Tensor:
        """Compute the entropy of the mean prediction in nats.

        Args:
            out: The forward pass on ``images``.
            images: ``[B, 3, H, W]``, views of one image.

        Returns:
            A scalar between 0 and ``ln C``.
        """
        log_p = wide(out.logits).log_softmax(dim=1)
        log_mean = log_p.logsumexp(dim=0) - math.log(len(log_p))
        return -(log_mean.exp() * log_mean).sum()

    # Episodes ------------------------------------------------------------------------------------

    def _served(self) -> int:
        return int(self.memory.get(_SERVED, 0))

    def _episodes(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Adapt to one image after the other, and predict each.

        Returns:
            Logits ``[B, C]``, losses ``[B]`` of the first steps, and ``[B]`` bool, false where the
            prediction is that of theta; all without graph.
        """
        with torch.inference_mode(False), torch.enable_grad(), without_cast_cache():
            images = writable(images)
            first = self._served()
            rows = [self._episode(image, first + place) for place, image in enumerate(images)]
            logits, losses, finite = zip(*rows, strict=True)
            are_finite = torch.tensor(finite, device=images.device)
            return torch.stack(logits), torch.stack(losses), are_finite

    def _episode(self, image: Tensor, number: int) -> tuple[Tensor, Tensor, bool]:
        """Adapt to an image ``[3, H, W]``: logits ``[C]``, a loss, whether all went well."""
        with self._forgetting():
            loss, stepped = self._take_steps(image, number)
            if stepped:
                row = self._predict(image)
                if all_finite(row, *self._adapted.values()):
                    return row, loss, True
        return self._predict(image), loss, False

    def _take_steps(self, image: Tensor, number: int) -> tuple[Tensor, bool]:
        """Move the weights: the loss of the first step, and whether all steps were taken."""
        if not all_finite(image):  # which no view would show: they are made of 8 bits
            return image.new_full((), torch.nan), False
        draws = np.random.default_rng([self.seed, number])
        losses: list[Tensor] = []
        for _ in range(self.steps):
            views = augmix(image, self.n_augmentations, draws, self.crop)
            loss = self.loss(self.outputs(views), views)
            if self.terms:
                loss = self.with_terms(loss, self.outputs(image[None]))
            losses.append(loss.detach())
            grads = self.gradients(loss)
            if grads is None or not self.move(grads):
                return losses[0], False
        return losses[0], True

    @torch.no_grad()
    def _predict(self, image: Tensor) -> Tensor:
        return self.outputs(image[None]).logits[0]

    @contextmanager
    def _forgetting(self) -> Iterator[None]:
        """Let the parameters move in copies while the block runs, and the state of the rule too."""
        own = {name: parameter.data for name, parameter in self._adapted.items()}
        fresh = self.rule_state
        try:
            for parameter in self._adapted.values():
                parameter.data = parameter.data.clone()
            yield
        finally:
            for name, parameter in self._adapted.items():
                parameter.data = own[name]
            self.rule_state = fresh

    @contextmanager
    def _blended_statistics(self) -> Iterator[None]:
        """Let batch normalisation use other running statistics while the block runs."""
        if self.prior_strength is None:
            yield
            return
        share = 1 / (self.prior_strength + 1)
        source: list[tuple[Any, Tensor, Tensor]] = []
        hooks = []
        for layer in batch_norm_layers(self.network).values():
            if layer.running_mean is not None and layer.running_var is not None:
                own = (layer.running_mean, layer.running_var)
                source.append((layer, *own))
                hooks.append(layer.register_forward_pre_hook(partial(_blend, *own, share)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for layer, mean, var in source:
                layer.running_mean, layer.running_var = mean, var


@torch.no_grad()
def _blend(
    source_mean: Tensor, source_var: Tensor, share: float, layer: Any, args: tuple[Any, ...]
) -> None:
    """Forward pre-hook: give a layer new tensors of statistics; the old ones stay as they are."""
    inputs: Tensor = wide(args[0])
    if inputs.numel() <= inputs.shape[1]:
        return
    dims = [d for d in range(inputs.dim()) if d != 1]
    var, mean = torch.var_mean(inputs, dim=dims, correction=1)
    layer.running_mean = source_mean.lerp(mean.to(source_mean.dtype), share)
    layer.running_var = source_var.lerp(var.to(source_var.dtype), share)
