"""Files, processes, memory and resources: what every room may use."""
