"""What a person looks at after a run: frames, figures, tables and the page."""

from tta_lightning.report.run import Run

__all__ = ["Run"]
