"""The arithmetic of packed layers, one file for each path."""
