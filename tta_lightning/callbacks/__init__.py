"""Callbacks of the adaptation stage."""

from tta_lightning.callbacks.base import AdaptCallback
from tta_lightning.callbacks.checkpoint import AdaptationCheckpoint
from tta_lightning.callbacks.collapse import CollapseGuard
from tta_lightning.callbacks.cost import CostMonitor
from tta_lightning.callbacks.metrics import PredictionStatistics, StreamMetrics
from tta_lightning.callbacks.predictions import PredictionWriter
from tta_lightning.callbacks.progress import AdaptationProgress
from tta_lightning.callbacks.recorder import RunRecorder
from tta_lightning.callbacks.report import RunReport
from tta_lightning.callbacks.stag import STAG
from tta_lightning.callbacks.weights import AdaptedWeights

__all__ = [
    "STAG",
    "AdaptCallback",
    "AdaptationCheckpoint",
    "AdaptationProgress",
    "AdaptedWeights",
    "CollapseGuard",
    "CostMonitor",
    "PredictionStatistics",
    "PredictionWriter",
    "RunRecorder",
    "RunReport",
    "StreamMetrics",
]
