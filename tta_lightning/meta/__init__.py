"""What runs under ``fit``: training models, and training them to adapt."""

from tta_lightning.meta.mgg import MGGPretraining
from tta_lightning.meta.source import SourceTraining

__all__ = ["MGGPretraining", "SourceTraining"]
