"""Hashes of weights and of quantizations."""

from __future__ import annotations

import hashlib

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from fpq_lightning.nn.attention import packed_attention
from fpq_lightning.nn.calibrated import quantized_modules
from fpq_lightning.nn.packed_layer import packed_layers


def hash_weights(model: nn.Module) -> str:
    """A hash of the names, shapes and values of a model's weights."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in model.state_dict().items():
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def hash_quantization(model: nn.Module, mode: str) -> str:
    """A hash of everything that a variant of a model's layers and attention holds: formats, scales, codes, biases."""
    digest = hashlib.blake2b(digest_size=16)
    for name, layer in packed_layers(model).items():  # whose tensors are among the weights
        digest.update(f"{name}{layer.describe()}".encode())
    for name, attention in packed_attention(model).items():
        digest.update(f"{name}{attention.describe()}".encode())
    for name, module in quantized_modules(model).items():
        if mode in module.variants:
            digest.update(name.encode())
            for leaf in tree_leaves(module.variants[mode].to_state()):
                tensor = isinstance(leaf, torch.Tensor)
                digest.update(leaf.detach().cpu().numpy().tobytes() if tensor else repr(leaf).encode())
    return digest.hexdigest()
