"""Test-time adaptation methods: one paper, one file."""

from tta_lightning.methods.bn import BNStats
from tta_lightning.methods.cotta import CoTTA
from tta_lightning.methods.deyo import DeYO
from tta_lightning.methods.eata import EATA
from tta_lightning.methods.mgtta import MGTTA
from tta_lightning.methods.mt3 import MT3
from tta_lightning.methods.sar import SAR
from tta_lightning.methods.source import Source
from tta_lightning.methods.tent import Tent

__all__ = ["EATA", "MGTTA", "MT3", "SAR", "BNStats", "CoTTA", "DeYO", "Source", "Tent"]
