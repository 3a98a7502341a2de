"""Quantized pipelines on disk."""
