"""Metrics of image quality, each a `torchmetrics.Metric`."""
