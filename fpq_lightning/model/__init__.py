"""Model structure: which layers, in which units, in which order. Knows `nn.Module`, nothing of training."""
