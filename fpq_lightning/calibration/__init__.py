"""Calibration sets, and the activations that units see along them."""
