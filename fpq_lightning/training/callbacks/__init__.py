"""Lightning callbacks: finalising weights, judging images, progress, reports."""

from fpq_lightning.training.callbacks.checkpoint import RunCheckpoint
from fpq_lightning.training.callbacks.finalize import FinalizeQuantization
from fpq_lightning.training.callbacks.image_progress import ImageProgress
from fpq_lightning.training.callbacks.image_quality import ImageQuality
from fpq_lightning.training.callbacks.progress import CalibrationProgress
from fpq_lightning.training.callbacks.quality_report import QualityReport
from fpq_lightning.training.callbacks.report import RunReport

__all__ = [
    "CalibrationProgress",
    "FinalizeQuantization",
    "ImageProgress",
    "ImageQuality",
    "QualityReport",
    "RunCheckpoint",
    "RunReport",
]
