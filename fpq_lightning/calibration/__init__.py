"""Calibration data: trajectories of a sampler, and the activations that units see along them."""
