"""Quantized layers and attention: calibrated, packed, and how they run."""
