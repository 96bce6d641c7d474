"""Test-time adaptation methods: one paper, one file."""

from tta_lightning.methods.bn import BNStats
from tta_lightning.methods.mgtta import MGTTA
from tta_lightning.methods.source import Source
from tta_lightning.methods.tent import Tent

__all__ = ["MGTTA", "BNStats", "Source", "Tent"]
