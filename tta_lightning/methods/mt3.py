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
from tta_lightning.contract import Outputs, StepReport, restricted, writable
from tta_lightning.errors import InputError, unknown_name
from tta_lightning.functional import all_finite, without_cast_cache
from tta_lightning.inner_loop import InnerLoop, Parameters, Target, embed, inner_adapt
from tta_lightning.models.byol import Embedder
from tta_lightning.rules import SGD
from tta_lightning.rules.base import require, require_whole
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
    episodic = True

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
        for name, value in {"steps": steps, "copies": copies, "in_flight": in_flight}.items():
            require_whole(name, value, 1)
        require_whole("seed", seed, 0)
        if target not in ("meta", "self"):
            raise unknown_name("target", target, ("meta", "self"))
        if episodes not in ("auto", "loop", "vmap"):
            raise unknown_name("episodes", episodes, ("auto", "loop", "vmap"))
        self.steps, self.copies, self.lr, self.target = steps, copies, lr, target
        self.episodes, self.in_flight, self.seed = episodes, in_flight, seed
        self.view_options = ViewOptions(crop, flips)
        self.crop, self.flips = self.view_options.crop, flips
        self._way = episodes  # "auto" until it was timed
        self._ran: str = episodes  # how the last batch ran, and why

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
        check_images(type(self).__name__, images)
        if not len(images):
            self.report = StepReport(reason="there is no image")
            predicted: Tensor = self(images).detach()
            return predicted
        with torch.inference_mode(False), torch.enable_grad(), without_cast_cache():
            images = writable(images)
            served = int(self.memory.get(_SERVED, 0))
            numbers = range(served, served + len(images))
            if self._way == "auto" and len(images) > 1 and not self.terms:
                self._choose(images[:_TRIED], numbers[:_TRIED])
            with self.phase("update"):
                logits, losses, finite = self._run(images, numbers)
        kept: Tensor = restricted(logits, self.classes)
        self.memory = {_SERVED: torch.tensor(served + len(images))}
        self.report = report_episodes(losses, finite)
        return kept

    def describe(self) -> dict[str, Any]:
        """Say what method this is, and how its episodes ran."""
        return {**super().describe(), "episodes": self._ran}

    def get_extra_state(self) -> dict[str, Any]:
        """Return the state, with the way that was chosen: another one rounds differently."""
        return {**super().get_extra_state(), "episodes": [self._way, self._ran]}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take what :meth:`get_extra_state` returned; an explicit ``episodes`` stays."""
        super().set_extra_state(state)
        if self.episodes == "auto":
            self._way, self._ran = state["episodes"]

    # Episodes ------------------------------------------------------------------------------------

    def _views(self, image: Tensor, number: int) -> Tensor:
        """Draw the views ``[2, copies, 3, H, W]`` of an image ``[3, H, W]`` by its number."""
        draws = generator(self.seed, number)
        copied = image.expand(2 * self.copies, -1, -1, -1)
        views = ssl_views(copied, draws, self.view_options)
        return views.view(2, self.copies, *image.shape)

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
        """Adapt to images in the way that was chosen, and predict them.

        Returns:
            Logits ``[B, C]`` of all classes, losses ``[B]``, and ``[B]`` bool, false where a loss,
            a step or a prediction was not finite; there the logits are those of theta.
        """
        if self._way == "vmap" and not self.terms:
            logits, losses, finite = self._tried_together(images, numbers)
        else:
            logits, losses, finite = self._one_by_one(images, numbers)
            if self.episodes != "loop" and not self._ran.startswith("loop"):
                self._ran = "loop (attached terms, or single images)"
        finite = finite & torch.isfinite(logits).all(dim=1)
        if not finite.all():
            failed = ~finite
            with torch.no_grad():
                logits[failed] = embed(self._embedder[0], {}, images[failed]).logits
        return logits, losses, finite

    def _one_by_one(self, images: Tensor, numbers: range) -> tuple[Tensor, Tensor, Tensor]:
        """Adapt to one image after the other; as :meth:`_run`, but nothing is mended."""
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
            finite = all_finite(loss, *(phi[name] for name in self._names))
            with torch.no_grad():
                row = embed(embedder, phi, alone).logits[0]
            rows.append((row, loss, torch.tensor(finite, device=row.device)))
        logits, losses, are_finite = (torch.stack(parts) for parts in zip(*rows, strict=True))
        return logits, losses, are_finite

    def _tried_together(self, images: Tensor, numbers: range) -> tuple[Tensor, Tensor, Tensor]:
        """Adapt to several images at once; where it was not asked for, fall back on the loop."""
        try:
            return self._together(images, numbers)
        except RuntimeError as error:
            if self.episodes == "vmap":
                raise InputError(
                    f"episodes = vmap cannot run this network on {len(images)} images, "
                    f"{self.in_flight} at once: {str(error).strip().splitlines()[0]} Lower "
                    "in_flight, or set episodes: loop."
                ) from error
        self._way, self._ran = "loop", "loop (vmap failed on a larger batch)"
        return self._one_by_one(images, numbers)

    @torch.no_grad()
    def _together(self, images: Tensor, numbers: range) -> tuple[Tensor, Tensor, Tensor]:
        """Adapt to several images at once; as :meth:`_run`, but nothing is mended."""
        embedder, theta, loop = self._embedder[0], self._theta(), self._loop("func")

        def episode(image: Tensor, views: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            phi, loss = inner_adapt(embedder, theta, views, loop)
            assert loss is not None
            moved = [phi[name] for name in self._names]
            finite = torch.stack([torch.isfinite(t).all() for t in (loss, *moved)]).all()
            return embed(embedder, phi, image[None]).logits[0], loss, finite

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

        if images.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            self._way, self._ran = "loop", "loop (vmap would not use autocast on a CPU)"
            return
        loop = seconds(self._one_by_one)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*performance drop")  # it is measured here
                vmap = seconds(self._together)
        except RuntimeError:  # out of memory, or something in the network that vmap cannot do
            self._way, self._ran = "loop", "loop (vmap does not run here)"
            return
        self._way = "vmap" if loop > _WORTH * vmap else "loop"
        measured = f"measured: {loop:.3g} s an image in a loop, {vmap:.3g} with vmap"
        self._ran = f"{self._way} ({measured})"


def check_images(method: str, images: Any) -> None:
    """Refuse what is no batch of images, in the name of a method."""
    if not isinstance(images, Tensor):
        got = type(images).__name__
    elif images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
        got = f"images of shape {list(images.shape)} and type {images.dtype}"
    elif 0 in images.shape[2:]:
        got = f"images of shape {list(images.shape)}, without a pixel"
    elif images.is_meta:
        got = "images on the device 'meta', where tensors hold no values"
    else:
        return
    raise InputError(
        f"{method} got {got}; it expects floating-point images [B, 3, H, W] in [0, 1]."
    )


def report_episodes(losses: Tensor, finite: Tensor) -> StepReport:
    """Report what happened to each image; warn of those that no step could be taken for.

    Args:
        losses: ``[B]``.
        finite: ``[B]`` bool, whether the step was taken.
    """
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
