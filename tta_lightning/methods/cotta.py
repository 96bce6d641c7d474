"""CoTTA: a student that learns from its slow average, and now and then from its source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tta_lightning.adapter import Adapter
from tta_lightning.contract import Outputs, writable
from tta_lightning.functional import wide, without_cast_cache
from tta_lightning.methods.augment import SEED_STRIDE, augment, generator_of_step
from tta_lightning.models.norms import batch_norm_layers, use_batch_statistics
from tta_lightning.rules import UpdateRule
from tta_lightning.rules.base import require_fraction, require_whole

_TEACHER, _STEP = "teacher", "step"  # in the memory: parameters by name, and a counter


@dataclass
class TaughtOutputs(Outputs):
    """A forward pass of the student with what the teacher says of the same images.

    Attributes:
        teacher: Logits ``[B, C]``, without graph.
    """

    teacher: Tensor | None = None


class CoTTA(Adapter):
    """Follow the predictions of a slowly averaged teacher over augmented views of each image.

    Wang, Fink, Van Gool, Dai, "Continual Test-Time Domain Adaptation", CVPR 2022,
    https://arxiv.org/abs/2203.13591 (equations 1 to 8). For each batch, with the student
    ``theta``, the teacher ``theta'`` and the source model ``theta0``::

        y'     = f(theta', x),                     if mean_i max_c softmax(f(theta0, x_i))_c >= p_th
                 1/N sum_n f(theta', aug_n(x)),    otherwise
        L      = - mean_i sum_c softmax(y'_i)_c * log softmax(f(theta, x_i))_c
        theta  <- one step of the rule along the gradient of L
        theta' <- alpha * theta' + (1 - alpha) * theta
        theta  <- M * theta0 + (1 - M) * theta,    each entry of M being 1 with probability p

    ``y'`` ``[B, C]``, the teacher's logits, is the prediction, made before the update. alpha =
    ``mt``, p = ``rst``, p_th = ``ap``, N = ``n_augmentations``; a view is drawn by
    :func:`~tta_lightning.methods.augment.augment`. Every parameter moves. Student, teacher and
    source model share one network, whose weights are exchanged, so three sets of weights are held;
    the teacher's are in float32 at least, as half precision would lose steps of 1 - alpha. Attached
    terms see the student's forward pass.

    All random numbers come from ``seed`` and the number of steps since the last reset: a reset or a
    resumed run replays them on the same device, and no other random number is touched.

    Departs from the published code in:

    * Dropout and stochastic depth are off; the published code puts student, teacher and source
      model in training mode. Batch normalisation uses the statistics of each batch, and of each
      view, in all three; the running ones are kept unused.
    * So as long as no batch falls below ``ap``, student and teacher agree, the gradient of L is
      zero but for rounding, and nothing is learnt: SGD hardly moves, and Adam, which divides by the
      size of the gradient, follows the rounding. In the published code dropout, where the network
      has any, breaks the tie.
    * All floating-point parameters move and are restored; the published code takes those named
      ``weight`` and ``bias``, that is, all of a convolutional network, but of a transformer
      neither tokens nor position embeddings.
    * The views are made only where they are used.
    * A batch whose loss or gradient is not finite changes neither student nor teacher.

    As in the published code, the numbers of a view are drawn once for the whole batch (all of its
    images are flipped, or none), the noise excepted.

    The paper's rules: ``Adam(lr=1e-3)`` at batch 200 for CIFAR-10-C, with ``ap=0.92`` (0.72 for
    CIFAR-100-C); ``SGD(lr=0.01, momentum=0.9)`` at batch 64 for ImageNet-C, with ``ap=0.1``,
    ``rst=0.001``.

    Args:
        network: Images ``[B, 3, H, W]`` in [0, 1] to logits ``[B, C]``; see :class:`Adapter`.
        rule: How gradients become updates.
        mt: alpha, what the teacher keeps of itself in a step.
        rst: p, the fraction of entries that a step restores.
        ap: p_th, a mean confidence.
        n_augmentations: N.
        seed: Of the views and of the restored entries.

    Raises:
        InputError: A hyper-parameter is out of range.
    """

    def __init__(
        self,
        network: str | dict[str, Any] | nn.Module,
        rule: UpdateRule | None = None,
        mt: float = 0.999,
        rst: float = 0.01,
        ap: float = 0.92,
        n_augmentations: int = 32,
        seed: int = 0,
    ) -> None:
        super().__init__(network, rule)
        self.mt = require_fraction("mt", mt)
        self.rst = require_fraction("rst", rst)
        self.ap = require_fraction("ap", ap)
        self.n_augmentations = require_whole("n_augmentations", n_augmentations, 1)
        self.seed = require_whole("seed", seed, 0, SEED_STRIDE)

    def configure(self) -> None:
        """Let every parameter move; batch normalisation uses the statistics of the batch."""
        for parameter in self.network.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        use_batch_statistics(batch_norm_layers(self.network).values())

    def adapt_step(self, images: Tensor) -> Tensor:
        """Predict a batch with the teacher, then move student and teacher.

        Args:
            images: ``[B, 3, H, W]`` in [0, 1].

        Returns:
            Logits ``[B, C]`` of the teacher as it was before the update, without graph.
        """
        self.ready()
        with torch.inference_mode(False), torch.enable_grad(), without_cast_cache():
            images = writable(images)
            generator = self._generator(images.device)
            with self.phase("inference"):
                teacher = self._ask_teacher(images, generator)
            with self.phase("update"):
                student = self.outputs(images)
                out = TaughtOutputs(student.logits, student.features, teacher=teacher)
                self.report = self.learn(out, images)
                if self.report.updated:
                    self._teach()
                    self._restore(generator)
        return teacher

    def loss(self, out: Outputs, images: Tensor) -> Tensor:
        """Compute the mean cross-entropy of the student to the teacher in nats."""
        assert isinstance(out, TaughtOutputs)
        assert out.teacher is not None
        targets = wide(out.teacher).softmax(dim=1)
        return -(targets * wide(out.logits).log_softmax(dim=1)).sum(dim=1).mean()

    def forward(self, images: Tensor) -> Tensor:
        """Predict as the next :meth:`adapt_step` would, without learning.

        Args:
            images: ``[B, 3, H, W]`` in [0, 1].

        Returns:
            Logits ``[B, C]`` of the teacher, without graph.
        """
        self.ready()
        with torch.inference_mode(False), without_cast_cache():
            return self._ask_teacher(images, self._generator(images.device))

    @torch.no_grad()
    def _ask_teacher(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return the teacher's logits ``[B, C]``, averaged over views where the source is unsure.

        A batch with a NaN is not augmented: its confidence is below nothing.
        """
        with self._weights(self._source_weights()):
            source = wide(self.outputs(images).logits)
        confidence = source.softmax(dim=1).amax(dim=1).mean()
        with self._weights(self._teacher_weights()):
            if not confidence < self.ap:
                return self.outputs(images).logits
            views = (augment(images, generator) for _ in range(self.n_augmentations))
            return torch.stack([self.outputs(view).logits for view in views]).mean(dim=0)

    @torch.no_grad()
    def _teach(self) -> None:
        """Move the teacher towards the student."""
        before = self._teacher_weights()
        teacher = {
            name: torch.lerp(before[name].to(student), student, 1 - self.mt)
            for name, student in ((name, wide(p)) for name, p in self._adapted.items())
        }
        self.memory = {_TEACHER: teacher, _STEP: torch.tensor(self._steps() + 1)}

    @torch.no_grad()
    def _restore(self, generator: torch.Generator) -> None:
        """Return some entries of the student, drawn at random, to the source model."""
        for name, source in self._source_weights().items():
            student = self._adapted[name]
            drawn = torch.rand(student.shape, generator=generator, device=generator.device)
            student.copy_(torch.where(drawn < self.rst, source.to(student), student))

    @contextmanager
    def _weights(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Exchange the network's parameters while the block runs; only half precision is copied."""
        own = {name: parameter.data for name, parameter in self._adapted.items()}
        try:
            for name, parameter in self._adapted.items():
                parameter.data = weights[name].to(parameter)
            yield
        finally:
            for name, parameter in self._adapted.items():
                parameter.data = own[name]

    def _source_weights(self) -> dict[str, Tensor]:
        assert self._source is not None
        return {name: self._source[f"network.{name}"] for name in self._adapted}

    def _teacher_weights(self) -> Mapping[str, Tensor]:
        """Return the teacher's parameters; before the first step they are those of the source."""
        weights: Mapping[str, Tensor] = self.memory.get(_TEACHER) or self._source_weights()
        return weights

    def _steps(self) -> int:
        return int(self.memory.get(_STEP, 0))

    def _generator(self, device: torch.device) -> torch.Generator:
        return generator_of_step(self.seed, self._steps(), device)
