"""The source model as it is: what every method is compared with."""

from __future__ import annotations

from typing import Any

from torch import nn

from tta_lightning.adapter import Adapter


class Source(Adapter):
    """Predict with the source model and learn nothing.

    Batch normalisation uses the running statistics of the source data; no parameter moves.

    Args:
        network: Images ``[B, 3, H, W]`` in [0, 1] to logits ``[B, C]``; see :class:`Adapter`.
    """

    def __init__(self, network: str | dict[str, Any] | nn.Module) -> None:
        super().__init__(network)

    def configure(self) -> None:
        """Let nothing move and keep the source statistics."""
