"""Serving: a classifier that answers many threads and learns from what it predicts."""

from tta_lightning.serving.classifier import OnlineClassifier
from tta_lightning.serving.contract import Answer, Guard, ServingStatistics

__all__ = ["Answer", "Guard", "OnlineClassifier", "ServingStatistics"]
