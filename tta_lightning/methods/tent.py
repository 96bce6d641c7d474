"""Tent: fully test-time adaptation by entropy minimisation."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tta_lightning.adapter import Adapter
from tta_lightning.contract import Outputs
from tta_lightning.functional import entropy
from tta_lightning.rules import UpdateRule


class Tent(Adapter):
    """Minimise the mean entropy of the predictions over the affine normalisation parameters.

    Wang, Shelhamer, Liu, Olshausen, Darrell, "Tent: Fully Test-Time Adaptation by Entropy
    Minimization", ICLR 2021, https://arxiv.org/abs/2006.10726.

    ``L(x) = mean_i H(softmax(f(x_i)))``, ``H`` in nats (paper, section 3.1). Batch normalisation
    uses the statistics of the test batch; its affine parameters descend the loss, one step a batch.
    The prediction of a batch is made before its update.

    Departs from the published code in:

    * Layer, group and instance normalisation are adapted too, as SAR introduced it; the published
      code knows ``BatchNorm2d`` alone.
    * The network stays in evaluation mode but for batch normalisation, so dropout and stochastic
      depth do not disturb predictions; the published code puts everything in training mode.
    * Running statistics are kept unused rather than discarded, so the source model can come back.

    The paper's rules: ``Adam(lr=1e-3)`` for CIFAR-10-C at batch 200;
    ``SGD(lr=2.5e-4, momentum=0.9)`` for ImageNet-C at batch 64, which is the default.

    Args:
        network: Images ``[B, 3, H, W]`` in [0, 1] to logits ``[B, C]``; see :class:`Adapter`.
        rule: How gradients become updates.
    """

    def __init__(
        self, network: str | dict[str, Any] | nn.Module, rule: UpdateRule | None = None
    ) -> None:
        super().__init__(network, rule)

    def loss(self, out: Outputs, images: Tensor) -> Tensor:
        """Compute the mean entropy of the batch in nats."""
        return entropy(out.logits).mean()
