"""Lightning callbacks: finalising weights, judging images, progress, reports."""

from fpq_lightning.callbacks.checkpoint import RunCheckpoint
from fpq_lightning.callbacks.finalize import FinalizeQuantization
from fpq_lightning.callbacks.image_quality import ImageQuality
from fpq_lightning.callbacks.progress import CalibrationProgress
from fpq_lightning.callbacks.quality_report import QualityReport
from fpq_lightning.callbacks.report import RunReport

__all__ = ["CalibrationProgress", "FinalizeQuantization", "ImageQuality", "QualityReport", "RunCheckpoint", "RunReport"]
