"""Reconstruction of one unit: search, learned rounding, and the choice between them."""
