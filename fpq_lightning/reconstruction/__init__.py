"""Reconstruction of a quantized network, a unit at a time."""
