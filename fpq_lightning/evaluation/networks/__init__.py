"""Feature networks, on which distributions of images are compared."""
