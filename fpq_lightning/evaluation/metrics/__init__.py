"""Metrics of image quality: each module here registers one, and importing this package imports them all.

To add a metric, put a file here or call `METRICS.register` from elsewhere. Reports and studies then show it.
"""

from importlib import import_module
from pkgutil import iter_modules

from fpq_lightning.evaluation.metrics.registry import METRICS, Column, ImageMetric, table_columns

for _module in iter_modules(__path__):  # in alphabetical order, which is that of the columns of tables
    import_module(f"{__name__}.{_module.name}")

__all__ = ["METRICS", "Column", "ImageMetric", "table_columns"]
