"""Image quality: sampling, metrics and reports."""
