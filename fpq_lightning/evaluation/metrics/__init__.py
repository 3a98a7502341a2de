"""Metrics of image quality: each module here registers its own, and importing this package imports them all."""

from importlib import import_module
from pkgutil import iter_modules

from fpq_lightning.evaluation.metrics.registry import METRICS, Column, ImageMetric, find_weights, table_columns

for _module in iter_modules(__path__):  # in alphabetical order, which is that of the columns of tables
    import_module(f"{__name__}.{_module.name}")

__all__ = ["METRICS", "Column", "ImageMetric", "find_weights", "table_columns"]
