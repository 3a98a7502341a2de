"""Kernels, and the same arithmetic in plain torch; `ops` chooses between them."""
