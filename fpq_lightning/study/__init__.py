"""Studies: a grid of recipes on one model, one table."""
