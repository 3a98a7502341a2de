"""Quantizing tensors: granularity, scales, search, learned rounding, and the recipe that chooses them."""
