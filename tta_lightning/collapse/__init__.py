"""Telling when an adapting model collapses, and taking it back."""

from tta_lightning.collapse.detector import CollapseDetector
from tta_lightning.collapse.evidence import Concentration, Detection

__all__ = ["CollapseDetector", "Concentration", "Detection"]
