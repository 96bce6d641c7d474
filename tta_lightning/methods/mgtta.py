"""MGTTA: entropy and the gap to the statistics of clean features, under a learned rule."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tta_lightning.adapter import Adapter
from tta_lightning.contract import Outputs
from tta_lightning.errors import InputError
from tta_lightning.functional import HALF, entropy
from tta_lightning.models.blocks import BlockFeatures
from tta_lightning.models.classifier import describe, weights_hash
from tta_lightning.models.statistics import FeatureStatistics
from tta_lightning.rules import MGG, UpdateRule
from tta_lightning.rules.checkpoints import LearnedRule, read_statistics

_CLEAN = "clean images"
STRENGTH = 64  # the divisor of the gap in the published code: a constant, not the batch size


@dataclass
class BlockOutputs(Outputs):
    """A forward pass with the features after each block.

    Attributes:
        blocks: ``[B, F]``, of all blocks one after the other.
    """

    blocks: Tensor | None = None


class MGTTA(Adapter):
    """Minimise entropy and the gap between feature statistics, with a rule that was learned for it.

    Deng et al., "Learning to Generate Gradients for Test-Time Adaptation via Test-Time Training
    Layers", AAAI 2025, https://arxiv.org/abs/2412.16901. The published code is followed where the
    paper leaves room::

        L(x) = mean_i H(softmax(f(x_i)))
               + lambda / 64 * ( sum_j (std_j - std_S,j)^2 + sum_j (mean_j - mean_S,j)^2 )

    with ``H`` in nats, ``std`` (unbiased) and ``mean`` of F block features over the batch, their
    source values ``std_S`` and ``mean_S`` from clean, unlabelled images, and lambda =
    ``statistics_weight``. All affine parameters of normalisation layers move, one step of the rule
    a batch; the prediction is made before.

    Which features: :class:`~tta_lightning.models.blocks.BlockFeatures`. For vision transformers
    these are the published ones, F = 9,216 for ViT-B. For other networks it is the mean over
    positions of what leaves each block, after its non-linearity: batch normalisation fixes the
    batch mean of its own output, so statistics taken right after it would say nothing. The
    published lambda of 0.4 belongs to F = 9,216; with other F, ``0.4 * 9216 / F`` keeps the share.

    Departs from the published code in:

    * A batch of one image has no standard deviation, and the published code then gives NaN for
      good. Here the gap of the means remains, beside the entropy.
    * With :class:`~tta_lightning.rules.MGG`, coordinates whose gradient is exactly zero stay; see
      ``mask_zero_gradients`` there.
    * Batch normalisation uses the statistics of the batch, and dropout is off, as in
      :class:`Tent <tta_lightning.methods.Tent>`.

    Args:
        network: Images ``[B, 3, H, W]`` in [0, 1] to logits ``[B, C]``; see :class:`Adapter`.
        rule: How gradients become updates: ``MGG(checkpoint=...)``, or another one to compare with.
        statistics_weight: lambda.
        statistics: File with the statistics of clean features: a pair (std, mean) as the paper's
            code stores it, or a checkpoint of MGGPretraining. None takes them from the checkpoint
            of the rule where that was trained on this network, else from clean images. An exchanged
            pair is noticed by negative numbers, of which features after a ReLU have none.

    Raises:
        InputError: ``statistics_weight`` is negative, or the file holds no statistics.
    """

    def __init__(
        self,
        network: str | dict[str, Any] | nn.Module,
        rule: UpdateRule,
        statistics_weight: float = 0.4,
        statistics: str | None = None,
    ) -> None:
        super().__init__(network, rule)
        if not 0 <= statistics_weight < float("inf"):
            raise InputError(f"statistics_weight = {statistics_weight}: expected 0 or more.")
        self.statistics_weight = statistics_weight
        self.statistics = statistics
        self.source = FeatureStatistics()
        self._origin: str | None = statistics
        if statistics is not None:
            self.source.set(*read_statistics(statistics), statistics)

    def configure(self) -> None:
        """Let all affine normalisation parameters move, and find the blocks."""
        super().configure()
        self._blocks = BlockFeatures(self.network)
        is_first = self._source is None  # later the network may have moved
        if is_first and isinstance(self.rule, MGG) and self.rule.learned is not None:
            self._compare(self.rule.learned)

    def outputs(self, images: Tensor) -> BlockOutputs:
        """Run the network once; see :class:`Adapter`."""
        with self._blocks.capture() as found:
            out = super().outputs(images)
        wide = [f.float() if f.dtype in HALF else f for f in found]
        blocks = torch.cat(wide, dim=1)
        return BlockOutputs(out.logits, out.features, blocks=blocks)

    def prepare(self, clean: Iterable[Tensor]) -> None:
        """Measure the statistics of clean features, unless a file holds them.

        They are those of the network as it is now: call it before the stream or after a reset.

        Args:
            clean: Batches of unlabelled images ``[B, 3, H, W]`` in [0, 1], any number, read once.

        Raises:
            InputError: There are fewer than two images.
        """
        self.ready()
        if self._origin not in (None, _CLEAN):
            return
        with torch.no_grad():
            self.source.measure(self._features(self.outputs(images)) for images in clean)
        self._origin = _CLEAN

    def loss(self, out: Outputs, images: Tensor) -> Tensor:
        """Compute entropy plus weighted gap, a scalar."""
        gap = self._gap(self._features(out))
        return entropy(out.logits).mean() + self.statistics_weight / STRENGTH * gap

    def get_extra_state(self) -> dict[str, Any]:
        """Return the state of the rule and where the statistics come from."""
        return {**super().get_extra_state(), "statistics": self._origin}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take what :meth:`get_extra_state` returned."""
        super().set_extra_state(state)
        self._origin = state["statistics"]

    def describe(self) -> dict[str, Any]:
        """Say what method this is, and where its statistics come from."""
        described = super().describe()
        described["hyper_parameters"]["statistics"] = self._origin
        return described

    def _features(self, out: Outputs) -> Tensor:
        assert isinstance(out, BlockOutputs)
        assert out.blocks is not None
        return out.blocks

    def _compare(self, learned: LearnedRule) -> None:
        """Say it where the rule was trained on another network; else take its statistics over."""
        if not learned.backbone:  # the published file does not say
            return
        dtype = next(self.network.parameters()).dtype
        name = describe(self.network).name + ("" if dtype == torch.float32 else f" in {dtype}")
        ours = {"name": name, "weights_sha256": weights_hash(self.network)}
        theirs = dict(learned.backbone)
        if ours["weights_sha256"] == theirs["weights_sha256"]:
            if self._origin is None and learned.statistics is not None:
                self._origin = f"the checkpoint of the rule, {learned.origin}"
                self.source.set(*learned.statistics, self._origin)
            return
        warnings.warn(
            f"The rule of {learned.origin} was trained on {_in_words(theirs)}, and this network is "
            f"{_in_words(ours)}. The rule fits any network, but the statistics stored with it are "
            "not used.",
            stacklevel=2,
        )

    def _gap(self, features: Tensor) -> Tensor:
        """Sum the squared differences of both statistics over all features."""
        if not self.source.known:
            raise InputError(
                "MGTTA compares features with those of clean images, and has seen none. Call "
                "prepare(clean) with batches of clean images first, set `clean` of the stream, or "
                "give a file as `statistics`."
            )
        if len(self.source.std) != features.shape[1]:
            raise InputError(
                f"The statistics from {self._origin} are those of {len(self.source.std)} features, "
                f"but {describe(self.network).name} gives {features.shape[1]}. Use statistics of "
                "this network, or leave them out and give clean images."
            )
        gap = (features.mean(dim=0) - self.source.mean).square().sum()
        if len(features) == 1:
            return gap
        return gap + (features.std(dim=0) - self.source.std).square().sum()


def _in_words(backbone: dict[str, str]) -> str:
    return f"{backbone['name']} with the weights {backbone['weights_sha256'][:12]}"
