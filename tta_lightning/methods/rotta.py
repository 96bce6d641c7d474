"""RoTTA: a student that learns from a balanced memory of the stream, for correlated streams."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from tta_lightning.adapter import Adapter
from tta_lightning.contract import (
    CLASSES,
    Outputs,
    StepReport,
    check_classes,
    class_positions,
    not_finite,
    writable,
)
from tta_lightning.errors import InputError
from tta_lightning.functional import all_finite, wide, without_cast_cache
from tta_lightning.methods.augment import SEED_STRIDE, augment, generator_of_step
from tta_lightning.methods.memory_bank import MemoryBank, kept_images
from tta_lightning.models.norms import BatchNorm, batch_norm_layers, use_source_statistics
from tta_lightning.rules import UpdateRule
from tta_lightning.rules.base import require, require_fraction, require_whole

# In the memory: tensors by name, tensors of the bank by name, and two counters.
_TEACHER, _BANK, _COUNT, _STEPS = "teacher", "bank", "count", "steps"
_TINY = 1e-6  # inside the logarithm of the published entropy


@dataclass
class BankOutputs(Outputs):
    """A forward pass of the student on a view of the bank, with what it is compared with.

    Attributes:
        teacher: Logits ``[B, C]`` of the teacher on the images themselves, without graph.
        weights: ``[B]``, the younger the larger.
    """

    teacher: Tensor | None = None
    weights: Tensor | None = None


class RoTTA(Adapter):
    """Follow a slowly averaged teacher on a memory that is balanced over the classes.

    Yuan, Xie, Li, "Robust Test-Time Adaptation in Dynamic Scenarios", CVPR 2023,
    https://arxiv.org/abs/2303.13899 (sections 3.2 to 3.4). The teacher ``theta'`` predicts a batch,
    and its prediction is what is returned, made before any update. Then each image is offered, with
    the predicted class and its entropy ``- sum_c p_c log(p_c + 1e-6)``, to a
    :class:`~tta_lightning.methods.memory_bank.MemoryBank` of N images. After every
    ``update_frequency`` images, also in the middle of a batch, the student ``theta`` learns from
    the n images in the bank, each x_i of age A_i::

        w_i     = exp(-A_i / N) / (1 + exp(-A_i / N))
        p_i     = softmax(f(theta', x_i)),    q_i = softmax(f(theta, aug(x_i)))
        L       = - 1/n sum_i w_i sum_c p_ic * log q_ic
        theta  <- one step of the rule along the gradient of L
        theta' <- (1 - nu) * theta' + nu * theta

    N = ``memory_size``; a view is drawn by :func:`~tta_lightning.methods.augment.augment`, with the
    same numbers for all images of the bank. Affine parameters of normalisation layers move.

    Robust batch normalisation: student and teacher carry running statistics of their own, which
    start at those of the source and which predictions are made with. In the passes of an update::

        mu <- (1 - alpha) * mu + alpha * mean(x),     var <- (1 - alpha) * var + alpha * var(x)

    with the biased variance, and each layer normalises by the new ones; the gradient passes through
    ``mean(x)`` and ``var(x)``. So with a learning rate of 0 a network with batch normalisation
    still changes. Group and layer normalisation have no such statistics.

    Student and teacher share one network. It holds the student, statistics included; what the
    teacher has of its own is kept in float32 at least, as half precision would lose steps of nu.
    The N images are kept in the memory, on their device. Attached terms see the student's forward
    pass on the view. Random numbers come from ``seed`` and the number of updates since the last
    reset, so a reset or a resumed run replays them on the same device, and no other random number
    is touched.

    Departs from the published code in:

    * Layer, group and instance normalisation are adapted too; the published code knows
      ``BatchNorm1d`` and ``BatchNorm2d``. Batch normalisation without running statistics uses
      those of each batch.
    * Dropout and stochastic depth are off; the published code has them on in updates.
    * An image whose logits are not finite is neither offered to the bank nor counted. An update
      whose loss, gradient or statistics are not finite moves nothing, and the bank stays.
    * :meth:`reset` empties the bank; the published code has no reset.

    The paper's rule: ``Adam(lr=1e-3)`` at batch 64 for CIFAR-10-C and CIFAR-100-C, with the default
    hyper-parameters. Public benchmarks take the same for ImageNet-C.

    Args:
        network: Images ``[B, 3, H, W]`` in [0, 1] to logits ``[B, C]``; see :class:`Adapter`.
        rule: How gradients become updates.
        memory_size: N.
        update_frequency: How many images there are from an update to the next.
        nu: What the teacher takes over from the student in an update.
        alpha: What running statistics take over from a pass.
        lambda_t: Weight of the age when images compete for a place in the bank.
        lambda_u: Weight of the uncertainty there.
        seed: Of the views.

    Raises:
        InputError: A hyper-parameter is out of range; or, in a step, images or classes are other
            ones than those of the bank.
    """

    def __init__(
        self,
        network: str | dict[str, Any] | nn.Module,
        rule: UpdateRule | None = None,
        memory_size: int = 64,
        update_frequency: int = 64,
        nu: float = 0.001,
        alpha: float = 0.05,
        lambda_t: float = 1.0,
        lambda_u: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__(network, rule)
        self.memory_size = require_whole("memory_size", memory_size, 1)
        self.update_frequency = require_whole("update_frequency", update_frequency, 1)
        self.seed = require_whole("seed", seed, 0, SEED_STRIDE)
        self.nu = require_fraction("nu", nu)
        self.alpha = require_fraction("alpha", alpha)
        self.lambda_t = require("lambda_t", lambda_t, 0.0)
        self.lambda_u = require("lambda_u", lambda_u, 0.0)

    def configure(self) -> None:
        """Let affine normalisation parameters move; predict with running statistics."""
        super().configure()
        use_source_statistics(batch_norm_layers(self.network).values())

    def moving_tensors(self) -> dict[str, Tensor]:
        """Name the parameters and the running statistics of the student."""
        moving = super().moving_tensors()
        for name, layer in self._layers().items():
            for key, statistic in zip(_statistics(name), _running(layer), strict=True):
                moving[key] = statistic
        return moving

    def adapt_step(self, images: Tensor) -> Tensor:
        """Predict a batch with the teacher, remember it, and learn whenever an update is due.

        Args:
            images: ``[B, 3, H, W]`` in [0, 1].

        Returns:
            Logits ``[B, C]`` of the teacher as it was before the batch, without graph.
        """
        self.ready()
        with torch.inference_mode(False), torch.enable_grad(), without_cast_cache():
            images = writable(images)
            with self.phase("inference"):
                logits = self._ask_teacher(images)
            with self.phase("update"):
                self.report = self._remember(images.detach(), logits)
        return logits

    def loss(self, out: Outputs, images: Tensor) -> Tensor:
        """Compute the weighted mean cross-entropy of the student to the teacher in nats."""
        assert isinstance(out, BankOutputs)
        assert out.teacher is not None
        assert out.weights is not None
        targets = wide(out.teacher).softmax(dim=1)
        cross_entropies = -(targets * wide(out.logits).log_softmax(dim=1)).sum(dim=1)
        return (out.weights * cross_entropies).mean()

    def forward(self, images: Tensor) -> Tensor:
        """Predict as the next :meth:`adapt_step` would, without learning.

        Args:
            images: ``[B, 3, H, W]`` in [0, 1].

        Returns:
            Logits ``[B, C]`` of the teacher, without graph.
        """
        self.ready()
        with torch.inference_mode(False), without_cast_cache():
            return self._ask_teacher(writable(images))

    @torch.no_grad()
    def _ask_teacher(self, images: Tensor) -> Tensor:
        """Return the teacher's logits ``[B, C]``, made with its running statistics."""
        with self._holding(self._teacher()):
            return self.outputs(images).logits

    def _remember(self, images: Tensor, logits: Tensor) -> StepReport:
        """Offer a batch to the bank, image by image, and learn whenever an update is due."""
        classes = class_positions(logits, self.classes)
        bank, count = self._bank(images, classes), int(self.memory.get(_COUNT, 0))
        p = wide(logits).softmax(dim=1)
        entropies = -(p * (p + _TINY).log()).sum(dim=1)
        entropies = entropies.where(torch.isfinite(logits).all(dim=1), torch.nan)
        rows = zip(images, p.argmax(dim=1).tolist(), entropies.tolist(), strict=True)
        known = [row for row in rows if math.isfinite(row[2])]
        reports = []
        for image, label, uncertainty in known:
            bank.add(image, label, uncertainty)
            count += 1
            if count % self.update_frequency == 0:
                reports.append(self._update(bank))
        if known:
            held = {_BANK: bank.state(entropies.dtype), CLASSES: classes}
            self.memory = {**self.memory, **held, _COUNT: torch.tensor(count)}
        return _summary(reports, left_out=len(images) - len(known), size=len(images))

    def _update(self, bank: MemoryBank) -> StepReport:
        """Move student and teacher by what the bank holds, their statistics included."""
        kept, teacher, student = bank.by_class(), self._teacher(), self.moving_tensors()
        images = torch.stack([each.image for each in kept])
        view = augment(images, generator_of_step(self.seed, self._steps(), images.device))
        with torch.no_grad(), self._holding(teacher), self._robust(teacher) as of_teacher:
            targets = self.outputs(images).logits
        with self._robust(student) as of_student:
            seen = self.outputs(view)
        ages = wide(targets).new_tensor([each.age / bank.capacity for each in kept])
        out = BankOutputs(seen.logits, seen.features, teacher=targets, weights=(-ages).sigmoid())
        loss = self.with_terms(self.loss(out, view), out)
        grads = self.gradients(loss)
        new_student, new_teacher = _carried(of_student), _carried(of_teacher)
        if grads is None or not all_finite(*new_student.values(), *new_teacher.values()):
            return not_finite(loss)
        if not self.move(grads):
            return not_finite(loss)
        with torch.no_grad():
            for name, statistic in new_student.items():
                student[name].copy_(statistic)
            for name, parameter in self._adapted.items():
                fast, slow = wide(parameter.detach()), teacher[f"network.{name}"]
                new_teacher[f"network.{name}"] = torch.lerp(slow.to(fast), fast, self.nu)
        steps = torch.tensor(self._steps() + 1)
        self.memory = {**self.memory, _TEACHER: new_teacher, _STEPS: steps}
        return StepReport(updated=True, loss=loss.detach())

    def _bank(self, images: Tensor, classes: Tensor) -> MemoryBank:
        """Return the bank as it stands, if images and classes are like those that it holds."""
        state, kept = self.memory.get(_BANK), []
        if state is not None:
            before, now = list(state["images"].shape[1:]), list(images.shape[1:])
            if before != now:
                raise InputError(
                    f"RoTTA learns from images that it keeps, and those are {before} while the new "
                    f"ones are {now}. Bring all images to one size, or call reset()."
                )
            check_classes(self.memory, classes, "RoTTA")
            kept = list(kept_images(state))
        return MemoryBank(self.memory_size, len(classes), self.lambda_t, self.lambda_u, kept)

    @contextmanager
    def _holding(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Exchange the student for other parameters and statistics while the block runs."""
        moving = self.moving_tensors()
        own = {name: tensor.data for name, tensor in moving.items()}
        try:
            for name, tensor in moving.items():
                tensor.data = tensors[name].to(tensor)
            yield
        finally:
            for name, tensor in moving.items():
                tensor.data = own[name]

    @contextmanager
    def _robust(self, statistics: Mapping[str, Tensor]) -> Iterator[dict[str, _RobustNorm]]:
        """Normalise robustly while the block runs, from these running statistics on."""
        layers = self._layers()
        norms, hooks, own = {}, [], {name: _running(layer) for name, layer in layers.items()}
        try:
            for name, layer in layers.items():
                mean, var = (statistics[key] for key in _statistics(name))
                norms[name] = _RobustNorm(mean, var, self.alpha)
                hooks.append(layer.register_forward_pre_hook(norms[name]))
                # The hook normalises: what is left to the layer is its affine map.
                layer.running_mean = torch.zeros_like(own[name][0])
                layer.running_var = torch.full_like(own[name][1], 1 - layer.eps)
            yield norms
        finally:
            for hook in hooks:
                hook.remove()
            for name, layer in layers.items():
                layer.running_mean, layer.running_var = own[name]

    def _layers(self) -> dict[str, BatchNorm]:
        layers = batch_norm_layers(self.network)
        return {name: layer for name, layer in layers.items() if layer.running_mean is not None}

    def _teacher(self) -> Mapping[str, Tensor]:
        """Return what the teacher has of its own; before the first update that is the source's."""
        assert self._source is not None
        teacher: Mapping[str, Tensor] = self.memory.get(_TEACHER, self._source)
        return teacher

    def _steps(self) -> int:
        return int(self.memory.get(_STEPS, 0))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Give the images of the bank the precision of the network that will see them."""
        before = self.memory.get(_BANK)
        super()._apply(fn, recurse)
        if before is not None:
            self.memory[_BANK]["images"] = fn(before["images"])
        return self


class _RobustNorm:
    """Forward pre-hook: normalise by running statistics that have just met the batch's.

    Attributes:
        mean: ``[C]``, running, of the last pass.
        var: ``[C]``, alike.
    """

    def __init__(self, mean: Tensor, var: Tensor, alpha: float) -> None:
        self.mean, self.var, self.alpha = wide(mean), wide(var), alpha

    def __call__(self, layer: BatchNorm, args: tuple[Any, ...]) -> Tensor:
        inputs: Tensor = args[0]
        x = wide(inputs)
        batch_var, batch_mean = torch.var_mean(
            x, dim=[d for d in range(x.dim()) if d != 1], correction=0
        )
        mean = (1 - self.alpha) * self.mean + self.alpha * batch_mean
        var = (1 - self.alpha) * self.var + self.alpha * batch_var
        self.mean, self.var = mean.detach(), var.detach()
        shape = (1, -1, *[1] * (x.dim() - 2))
        return ((x - mean.view(shape)) / (var.view(shape) + layer.eps).sqrt()).to(inputs.dtype)


def _carried(norms: Mapping[str, _RobustNorm]) -> dict[str, Tensor]:
    """Return the running statistics after a pass, by their name in the ``state_dict``."""
    carried = {}
    for name, norm in norms.items():
        mean, var = _statistics(name)
        carried.update({mean: norm.mean, var: norm.var})
    return carried


def _statistics(layer: str) -> tuple[str, str]:
    """Name the running mean and variance of a layer as the ``state_dict`` does."""
    return f"network.{layer}.running_mean", f"network.{layer}.running_var"


def _running(layer: BatchNorm) -> tuple[Tensor, Tensor]:
    assert layer.running_mean is not None
    assert layer.running_var is not None
    return layer.running_mean, layer.running_var


def _summary(reports: list[StepReport], left_out: int, size: int) -> StepReport:
    """Report a batch with any number of updates; warn of images that were left out."""
    reasons = [] if reports or left_out else ["no update is due"]
    reasons += [report.reason for report in reports if report.reason]
    if left_out:
        reasons.insert(0, f"{left_out} of {size} images gave logits that are not finite")
        warnings.warn(f"{reasons[0]}; they were predicted, but not remembered.", stacklevel=4)
    updated = any(report.updated for report in reports)
    return StepReport(
        updated=updated,
        loss=reports[-1].loss if reports else None,
        finite=not left_out and all(report.finite for report in reports),
        reason="" if updated and not left_out else "; ".join(dict.fromkeys(reasons)),
        failed=left_out,
    )
