"""Test-time adaptation methods: one paper, one file."""

from tta_lightning.methods.bn import BNStats
from tta_lightning.methods.cotta import CoTTA
from tta_lightning.methods.deyo import DeYO
from tta_lightning.methods.eata import EATA
from tta_lightning.methods.lame import LAME
from tta_lightning.methods.memo import MEMO
from tta_lightning.methods.mgtta import MGTTA
from tta_lightning.methods.mt3 import MT3
from tta_lightning.methods.roid import ROID
from tta_lightning.methods.rotta import RoTTA
from tta_lightning.methods.sar import SAR
from tta_lightning.methods.source import Source
from tta_lightning.methods.t3a import T3A
from tta_lightning.methods.tent import Tent
from tta_lightning.methods.ttt import TTT

__all__ = [
    "EATA",
    "LAME",
    "MEMO",
    "MGTTA",
    "MT3",
    "ROID",
    "SAR",
    "T3A",
    "TTT",
    "BNStats",
    "CoTTA",
    "DeYO",
    "RoTTA",
    "Source",
    "Tent",
]
