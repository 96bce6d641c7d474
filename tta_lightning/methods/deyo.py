"""DeYO: entropy minimisation on samples whose prediction falls with the object's shape."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tta_lightning.adapter import Adapter
from tta_lightning.contract import Outputs, StepReport
from tta_lightning.errors import InputError, unknown_name
from tta_lightning.functional import RELIABLE, entropy, entropy_margin, wide
from tta_lightning.methods.selection import logits_of_kept
from tta_lightning.models.norms import batch_norm_layers, fix_upper_norms, without_advice
from tta_lightning.rules import UpdateRule
from tta_lightning.rules.base import require, require_whole

Destruction = Literal["patch", "occ", "pixel"]

SURE = 0.5  # the filter's margin as a fraction of ln C, the largest possible entropy
_DRAWS = "draws"  # name in the memory: how many batches have drawn random numbers


class DeYO(Adapter):
    """Minimise the weighted entropy of samples that are sure, and unsure once destroyed.

    Lee, Jung, Lee, Park, Shin, Hwang, Yoon, "Entropy is not Enough for Test-Time Adaptation: From
    the Perspective of Disentangled Factors", ICLR 2024, https://arxiv.org/abs/2403.07366::

        L(x)   = mean_{i in S} ( exp(E0 - H_i) + exp(PLPD_i) ) * H_i
        S      = {i : H_i < tau  and  PLPD_i > theta}
        PLPD_i = p_y(x_i) - p_y(x'_i),   y = argmax_c p_c(x_i)

    with ``H_i`` the entropy in nats, tau = ``deyo_margin``, theta = ``plpd_threshold``, E0 =
    ``margin_e0``. ``x'`` is ``x`` with the shape of its object destroyed and its colours kept; the
    network sees the ``x'`` of the samples with ``H_i < tau`` in a second forward pass, without
    gradient. The weights are not differentiated. Affine parameters of normalisation layers move.
    Where S is empty nothing does. Without batch normalisation the backward pass runs over S alone;
    see :func:`~tta_lightning.methods.selection.logits_of_kept`.

    How images are destroyed (``aug_type``):

    * ``patch``: cut into ``patch_len`` x ``patch_len`` patches, which are shuffled, for each image
      anew. Where a side does not divide, the image is first resized to the next smaller size that
      does, and back.
    * ``occ``: a window of ``occlusion_size`` x ``occlusion_size`` pixels is filled with the image's
      mean of each channel.
    * ``pixel``: all pixels are shuffled, those of a batch in one order.

    With batch normalisation, the second pass is normalised by the statistics of its own images
    alone, as published, also where only one sample of the batch was sure.

    Departs from the published code in:

    * The layers that stay fixed are found by depth, not by timm's names, so a vision transformer of
      torchvision has them too; see :func:`~tta_lightning.models.norms.upper_norm_layers`.
    * Random orders come from ``seed`` and the number of batches that drew some, not from the
      process: :meth:`reset` replays them, and a ``state_dict`` continues them.
    * Images need not be square, and are destroyed in [0, 1] before the network normalises them,
      which gives the same: all three commute with an affine map of each channel.
    * Layers are adapted, dropout is off and running statistics are kept unused as in
      :class:`Tent <tta_lightning.methods.Tent>`.

    The paper's ``plpd_threshold``: 0.2 for the wild scenarios of ImageNet-C, 0.3 for the mild one,
    0.5 for Waterbirds, which is occluded.

    Args:
        network: Images ``[B, 3, H, W]`` in [0, 1] to logits ``[B, C]``; see :class:`Adapter`.
        rule: How gradients become updates.
        deyo_margin: tau in nats; None for ``0.5 ln C``.
        margin_e0: E0 in nats; None for ``0.4 ln C``.
        plpd_threshold: theta, a difference of probabilities; -1 lets every sample pass.
        aug_type: ``patch``, ``occ`` or ``pixel``.
        patch_len: Number of patches along each side.
        occlusion_size: Side of the window in pixels; the default is for images of 224 x 224.
        row_start: First row of the window.
        column_start: First column of the window.
        skip_top: Leave the normalisation layers in the top of the network fixed.
        seed: Of the random orders.

    Raises:
        InputError: A hyper-parameter is out of range, or (at the first batch) the images are too
            small for the patches or the window.
    """

    def __init__(
        self,
        network: str | dict[str, Any] | nn.Module,
        rule: UpdateRule | None = None,
        deyo_margin: float | None = None,
        margin_e0: float | None = None,
        plpd_threshold: float = 0.2,
        aug_type: Destruction = "patch",
        patch_len: int = 4,
        occlusion_size: int = 112,
        row_start: int = 56,
        column_start: int = 56,
        skip_top: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(network, rule)
        if aug_type not in get_args(Destruction):
            raise unknown_name("aug_type of DeYO", aug_type, get_args(Destruction))
        self.deyo_margin = None if deyo_margin is None else require("deyo_margin", deyo_margin, 0.0)
        self.margin_e0 = None if margin_e0 is None else require("margin_e0", margin_e0, 0.0)
        self.plpd_threshold = require("plpd_threshold", plpd_threshold, -1.0, 1.0)
        self.aug_type = aug_type
        self.patch_len = require_whole("patch_len", patch_len, 2)
        self.occlusion_size = require_whole("occlusion_size", occlusion_size, 1)
        self.row_start = require_whole("row_start", row_start, 0)
        self.column_start = require_whole("column_start", column_start, 0)
        self.seed = require_whole("seed", seed, 0)
        self.skip_top = skip_top

    def configure(self) -> None:
        """Let affine normalisation parameters move, but not those in the top of the network."""
        super().configure()
        if self.skip_top:
            fix_upper_norms(self.network)

    def loss(self, out: Outputs, images: Tensor) -> Tensor | None:
        """Compute the weighted entropy of the kept samples, a scalar.

        Returns:
            None where no sample is kept.
        """
        classes = out.logits.shape[1]
        margin = entropy_margin(self.deyo_margin, SURE, classes)
        reference = entropy_margin(self.margin_e0, RELIABLE, classes)
        entropies = entropy(out.logits.detach())
        out.selected = entropies < margin
        if not out.selected.any():
            return None
        plpd = self._plpd(out.logits.detach(), images, out.selected)
        out.selected = plpd > self.plpd_threshold
        if not out.selected.any():
            return None
        kept = entropy(logits_of_kept(self, out, images))
        weights = (reference - entropies[out.selected]).exp() + plpd[out.selected].exp()
        return (weights * kept).mean()

    def learn(self, out: Outputs, images: Tensor) -> StepReport:
        """Take a step; one that fails or is not finite does not count as a draw either."""
        before, counts = self.memory, False
        try:
            report = super().learn(out, images)
            counts = report.finite
        finally:
            if not counts:
                self.memory = before
        return report

    def _plpd(self, logits: Tensor, images: Tensor, sure: Tensor) -> Tensor:
        """Measure what destroying takes off the probability of the predicted class.

        Args:
            logits: ``[B, C]``, without graph.
            images: ``[B, 3, H, W]``.
            sure: ``[B]`` bool, the samples to measure.

        Returns:
            ``[B]``, between -1 and 1; minus infinity where it was not measured.
        """
        destroyed_images = self._destroy(images[sure])
        layers = batch_norm_layers(self.network).values()
        is_alone = len(destroyed_images) == 1 < len(images)  # no fault of the user's batch size
        with torch.no_grad(), without_advice(layers) if is_alone else nullcontext():
            destroyed = self.outputs(destroyed_images).logits
        label = logits[sure].argmax(dim=1, keepdim=True)
        intact, broken = (
            wide(each).softmax(dim=1).gather(1, label) for each in (logits[sure], destroyed)
        )
        plpd = intact.new_full((len(logits),), -math.inf)
        plpd[sure] = (intact - broken).squeeze(1)
        return plpd

    def _destroy(self, images: Tensor) -> Tensor:
        """Destroy the shape of the objects in images ``[B, 3, H, W]``."""
        if self.aug_type == "occ":
            return occlude(images, self.row_start, self.column_start, self.occlusion_size)
        rng = self._next_random()
        if self.aug_type == "pixel":
            order = rng.permutation(images[0, 0].numel())
            return shuffle_pixels(images, torch.from_numpy(order).to(images.device))
        orders = rng.random((len(images), self.patch_len**2)).argsort(axis=1)
        return shuffle_patches(images, torch.from_numpy(orders).to(images.device))

    def _next_random(self) -> np.random.Generator:
        """Make the generator of this batch, the same on every device."""
        drawn = int(self.memory.get(_DRAWS, 0))
        self.memory = {_DRAWS: torch.tensor(drawn + 1)}
        return np.random.default_rng([self.seed, drawn])


def shuffle_patches(images: Tensor, orders: Tensor) -> Tensor:
    """Cut images into ``n`` x ``n`` patches and put them together in another order.

    Args:
        images: ``[B, 3, H, W]``; resized to multiples of ``n`` and back where it does not divide.
        orders: ``[B, n * n]``, for each place, row by row, the patch that comes there.

    Returns:
        ``[B, 3, H, W]``.

    Raises:
        InputError: A side has fewer than ``n`` pixels.
    """
    count, channels, height, width = images.shape
    n = math.isqrt(orders.shape[1])
    rows, columns = height // n, width // n
    if min(rows, columns) == 0:
        raise InputError(
            f"patch_len = {n} cuts images of {height} x {width} pixels into patches of less than "
            "one pixel. Choose a smaller one."
        )
    grid = _resize(images, n * rows, n * columns).reshape(count, channels, n, rows, n, columns)
    patches = grid.permute(0, 2, 4, 1, 3, 5).reshape(count, n * n, channels, rows, columns)
    shuffled = patches[torch.arange(count, device=orders.device)[:, None], orders]
    grid = shuffled.reshape(count, n, n, channels, rows, columns).permute(0, 3, 1, 4, 2, 5)
    return _resize(grid.reshape(count, channels, n * rows, n * columns), height, width)


def shuffle_pixels(images: Tensor, order: Tensor) -> Tensor:
    """Put the pixels of all images in one other order.

    Args:
        images: ``[B, 3, H, W]``.
        order: ``[H * W]``, for each place, row by row, the pixel that comes there.

    Returns:
        ``[B, 3, H, W]``.
    """
    return images.flatten(2)[:, :, order].reshape(images.shape)


def occlude(images: Tensor, top: int, left: int, size: int) -> Tensor:
    """Fill a square window of each image with the image's mean of each channel.

    Args:
        images: ``[B, 3, H, W]``.
        top: First row.
        left: First column.
        size: Side in pixels.

    Returns:
        ``[B, 3, H, W]``, a copy.

    Raises:
        InputError: The window does not lie within the images.
    """
    height, width = images.shape[2:]
    if top + size > height or left + size > width:
        raise InputError(
            f"An occlusion window of {size} x {size} pixels from row {top} and column {left} does "
            f"not lie within images of {height} x {width}. Choose a smaller occlusion_size, "
            "row_start or column_start."
        )
    occluded = images.clone()
    occluded[:, :, top : top + size, left : left + size] = images.mean(dim=(2, 3), keepdim=True)
    return occluded


def _resize(images: Tensor, height: int, width: int) -> Tensor:
    if images.shape[2:] == (height, width):
        return images
    resized = F.interpolate(wide(images), (height, width), mode="bilinear", antialias=True)
    return resized.to(images.dtype)  # torch has no such kernel in half precision on the CPU
