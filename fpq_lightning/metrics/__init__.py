"""Image-quality metrics as `torchmetrics.Metric` objects."""
