"""Loops: how an adapter meets a stream."""

from tta_lightning.loops.adaptation import AdaptationLoop

__all__ = ["AdaptationLoop"]
