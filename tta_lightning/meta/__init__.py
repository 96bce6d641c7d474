"""What runs under ``fit``: training models, and training them to adapt."""

from tta_lightning.meta.joint import JointTraining
from tta_lightning.meta.mgg import MGGPretraining
from tta_lightning.meta.mt3 import MT3
from tta_lightning.meta.source import SourceTraining

__all__ = ["MT3", "JointTraining", "MGGPretraining", "SourceTraining"]
