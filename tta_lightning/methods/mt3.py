"""MT3: one self-supervised step on views of one image, a prediction, and all is forgotten."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tta_lightning.adapter import Adapter
from tta_lightning.contract import Outputs, StepReport, restricted
from tta_lightning.errors import unknown_name
from tta_lightning.functional import all_finite
from tta_lightning.inner_loop import InnerLoop, Parameters, Target, embed, inner_adapt
from tta_lightning.models.byol import Embedder
from tta_lightning.rules import SGD
from tta_lightning.rules.base import require
from tta_lightning.views import ViewOptions, generator, ssl_views

Episodes = Literal["auto", "loop", "vmap"]
_SERVED = "images"  # in the memory: how many were served since the last reset
_TRIED = 4  # images that the two ways are timed on
_WORTH = 1.2  # how much faster `vmap` must be to be chosen


class MT3(Adapter):
    """Adapt to each image by itself: step, predict, forget.

    Bartler, Bühler, Wiewel, Döbler, Yang, "MT3: Meta Test-Time Training for Self-Supervised
    Test-Time Adaption", AISTATS 2022, https://arxiv.org/abs/2103.16201. For each image x, with the
    meta-model theta and two views a, b of each of ``copies`` copies of x::

        phi = theta - lr * grad L_ssl(theta; a, b)        the prediction is that of phi on x itself

    with the BYOL loss of :mod:`tta_lightning.inner_loop`, plain SGD, no clipping, and
    the views of :func:`tta_lightning.views.ssl_views`. Everything moves but the classifier's head;
    nothing is carried over, so a batch of N images is N episodes, whatever its order. The views of
    an image depend on ``seed`` and on how many images came before it since the last reset, not on
    its batch. Unlike other methods this one predicts *after* its update.

    The network must have been trained for it: by :class:`tta_lightning.meta.MT3`, or by
    :class:`tta_lightning.meta.JointTraining`, with ``lr=0.01``, which is the paper's "TTT (ours)".
    ``Source`` on the same checkpoint is "MT" or "JT".

    Attached terms are added to the loss of each step; they see x under the parameters of the step.

    Departs from the published code in:

    * Both views go through the network once instead of four times: with ``steps=1`` the targets are
      the projections of that very pass.
    * An image whose loss or step is not finite is predicted by theta, and counted.

    Args:
        network: Has :class:`~tta_lightning.models.BYOLHeads`: a checkpoint of MT3 or JointTraining.
        steps: On the same views.
        copies: Views a and b of the image, each.
        lr: Of the steps.
        target: Whose projections the predictions of later steps aim at: ``meta``, those of theta,
            or ``self``, those of the step before.
        episodes: ``loop`` over images: the same result whatever the batch, bit for bit. ``vmap``
            runs ``in_flight`` images at once, equal to about 1e-5. ``auto`` times both on the first
            batch of several images, keeps to the faster one, and says so in the manifest; it
            falls back on the loop where ``vmap`` runs out of memory or cannot run the network.
        in_flight: Images at once; memory grows with them.
        crop: See :class:`~tta_lightning.views.ViewOptions`; as in training.
        flips: See there; as in training.
        seed: Of the views.

    Raises:
        InputError: A hyper-parameter is out of range; or, at the first step, the network has no
            BYOL heads.
    """

    predicts = "after update"

    def __init__(
        self,
        network: str | dict[str, Any] | nn.Module,
        steps: int = 1,
        copies: int = 32,
        lr: float = 0.1,
        target: Target = "meta",
        episodes: Episodes = "auto",
        in_flight: int = 16,
        crop: tuple[int, int] | None = None,
        flips: bool = True,
        seed: int = 0,
    ) -> None:
        require("lr", lr, 0)
        super().__init__(network, SGD(lr=lr))
        for name, value in (("steps", steps), ("copies", copies), ("in_flight", in_flight)):
            require(name, value, 1)
        require("seed", seed, 0)
        if target not in ("meta", "self"):
            raise unknown_name("target", target, ("meta", "self"))
        if episodes not in ("auto", "loop", "vmap"):
            raise unknown_name("episodes", episodes, ("auto", "loop", "vmap"))
        self.steps, self.copies, self.lr, self.target = steps, copies, lr, target
        self.episodes, self.in_flight, self.seed = episodes, in_flight, seed
        self.view_options = ViewOptions(None if crop is None else (crop[0], crop[1]), flips)
        self._way = episodes  # "auto" until it was timed
        self._timing = ""

    def configure(self) -> None:
        """Let everything move but the classifier's head, in copies that are forgotten."""
        self._embedder = [Embedder(self.network)]  # a list: the network is part of us already
        self._names = self._embedder[0].adapted()
        for name in self._names:
            self.get_parameter(name).requires_grad_(True)

    def moving_tensors(self) -> dict[str, Tensor]:
        """Name nothing: the network itself stays as it is."""
        return {}

    def adapt_step(self, images: Tensor) -> Tensor:
        """Predict each image with the network that a step on its views makes of theta.

        Args:
            images: ``[B, 3, H, W]`` in [0, 1].

        Returns:
            Logits ``[B, C]``, without graph.
        """
        self.ready()
        with torch.inference_mode(False), torch.enable_grad(), self.phase("update"):
            if images.is_inference():
                images = images.clone()
            served = int(self.memory.get(_SERVED, 0))
            numbers = range(served, served + len(images))
            if self._way == "auto" and len(images) > 1 and not self.terms:
                self._choose(images[:_TRIED], numbers[:_TRIED])
            logits, losses, finite = self._run(images, numbers)
            self.memory = {_SERVED: torch.tensor(served + len(images))}
            self.report = self._told(losses, finite)
        kept: Tensor = restricted(logits, self.classes)
        return kept

    def describe(self) -> dict[str, Any]:
        """Say what method this is, and how its episodes ran."""
        way = self._way if not self.terms else "loop"
        return {**super().describe(), "episodes": f"{way}{self._timing}"}

    def get_extra_state(self) -> dict[str, Any]:
        """Return the state, with the way that was chosen: another one rounds differently."""
        return {**super().get_extra_state(), "episodes": [self._way, self._timing]}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take what :meth:`get_extra_state` returned."""
        super().set_extra_state(state)
        self._way, self._timing = state["episodes"]

    # Episodes ------------------------------------------------------------------------------------

    def _views(self, image: Tensor, number: int) -> Tensor:
        """Draw the views ``[2, copies, 3, H, W]`` of an image ``[3, H, W]`` by its number."""
        draws = generator(self.seed, number)
        copied = image.expand(2 * self.copies, -1, -1, -1)
        views = ssl_views(copied, draws, self.view_options)
        # convolutions on a CPU are a tenth faster on this layout
        laid_out = views.contiguous(memory_format=torch.channels_last)
        return laid_out.reshape(2, self.copies, *image.shape)

    def _theta(self) -> dict[str, Tensor]:
        """Return the network's parameters, sharing their memory but not their graph."""
        moving = set(self._names)
        return {
            name: parameter.detach().requires_grad_(name in moving)
            for name, parameter in self._embedder[0].named_parameters()
        }

    def _loop(self, engine: Literal["autograd", "func"]) -> InnerLoop:
        return InnerLoop(self.steps, self.lr, None, True, self.target, engine)

    def _run(self, images: Tensor, numbers: range) -> tuple[Tensor, Tensor, Tensor]:
        """Adapt to images in the way that was chosen; see :meth:`_one_by_one`."""
        if self._way == "vmap" and not self.terms:
            try:
                return self._together(images, numbers)
            except torch.OutOfMemoryError:  # more are in flight than were timed
                if self.episodes != "auto":
                    raise
            self._way, self._timing = "loop", " (vmap ran out of memory)"
        return self._one_by_one(images, numbers)

    def _one_by_one(self, images: Tensor, numbers: range) -> tuple[Tensor, Tensor, Tensor]:
        """Adapt to one image after the other.

        Returns:
            Logits ``[B, C]`` of all classes, losses ``[B]``, and which of them were finite ``[B]``.
        """
        embedder, theta, loop = self._embedder[0], self._theta(), self._loop("autograd")
        rows = []
        for image, number in zip(images, numbers, strict=True):
            views, alone = self._views(image, number), image[None]

            def extra(parameters: Parameters, alone: Tensor = alone) -> Tensor:
                out = embed(embedder, parameters, alone)
                seen = Outputs(restricted(out.logits, self.classes), out.features)
                return self.with_terms(out.logits.new_zeros(()), seen)

            phi, loss = inner_adapt(embedder, theta, views, loop, extra if self.terms else None)
            assert loss is not None
            is_finite = all_finite(loss, *(phi[name] for name in self._names))
            with torch.no_grad():
                logits = embed(embedder, phi if is_finite else theta, alone).logits[0]
            rows.append((logits, loss, torch.tensor(is_finite)))
        logits, losses, finite = (torch.stack(parts) for parts in zip(*rows, strict=True))
        return logits, losses, finite

    @torch.no_grad()
    def _together(self, images: Tensor, numbers: range) -> tuple[Tensor, Tensor, Tensor]:
        """Adapt to several images at once; see :meth:`_one_by_one`."""
        embedder, theta, loop = self._embedder[0], self._theta(), self._loop("func")

        def episode(image: Tensor, views: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            phi, loss = inner_adapt(embedder, theta, views, loop)
            assert loss is not None
            moved = [phi[name] for name in self._names]
            finite = torch.stack([torch.isfinite(t).all() for t in (loss, *moved)]).all()
            kept = {n: torch.where(finite, phi[n], theta[n]) for n in self._names}
            return embed(embedder, {**theta, **kept}, image[None]).logits[0], loss, finite

        parts = []
        # Inside vmap a layer norm of bfloat16 inputs has no gradient on the CPU, and fused kernels
        # of attention run one image after the other.
        with torch.autocast("cpu", enabled=False), sdpa_kernel(SDPBackend.MATH):
            for start in range(0, len(images), self.in_flight):
                some = images[start : start + self.in_flight]
                drawn = [self._views(image, numbers[start + i]) for i, image in enumerate(some)]
                parts.append(torch.func.vmap(episode)(some, torch.stack(drawn)))
        logits, losses, finite = (torch.cat(part) for part in zip(*parts, strict=True))
        return logits, losses, finite

    def _choose(self, images: Tensor, numbers: range) -> None:
        """Time both ways on a few images, and keep to the faster one."""

        def seconds(run: Callable[[Tensor, range], object]) -> float:
            run(images, numbers)  # the first time is not typical
            start = _clock(images.device)
            run(images, numbers)
            return (_clock(images.device) - start) / len(images)

        loop = seconds(self._one_by_one)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*performance drop")  # it is measured here
                vmap = seconds(self._together)
        except RuntimeError:  # out of memory, or something in the network that vmap cannot do
            self._way, self._timing = "loop", " (vmap does not run here)"
            return
        self._way = "vmap" if loop > _WORTH * vmap else "loop"
        self._timing = f" (measured: {loop:.3g} s an image in a loop, {vmap:.3g} with vmap)"

    def _told(self, losses: Tensor, finite: Tensor) -> StepReport:
        """Report what happened; warn of images that no step could be taken for."""
        failed = len(finite) - int(finite.sum())
        loss = losses[finite].mean() if failed < len(finite) else losses.mean()
        if not failed:
            return StepReport(updated=True, loss=loss)
        reason = f"{failed} of {len(finite)} images gave a loss or a step that is not finite"
        warnings.warn(
            f"{reason}; they were predicted by the model as it is, without a step.", stacklevel=3
        )
        return StepReport(failed < len(finite), loss, finite=False, reason=reason, failed=failed)


def _clock(device: torch.device) -> float:
    """Return the time in seconds, once everything that was started on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
