"""Train models to adapt, and adapt them online."""

from tta_lightning.adapter import Adapter
from tta_lightning.contract import Outputs, Term
from tta_lightning.data.stream import Stream
from tta_lightning.errors import InputError
from tta_lightning.models.loading import load_model
from tta_lightning.serving import OnlineClassifier
from tta_lightning.trainer import Trainer

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "InputError",
    "OnlineClassifier",
    "Outputs",
    "Stream",
    "Term",
    "Trainer",
    "load_model",
]
