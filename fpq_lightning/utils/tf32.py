"""TensorFloat-32 products."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def using_tf32(allowed: bool) -> Iterator[None]:
    """Within the block float32 products on a GPU may use TF32, or may not.

    Evaluation does not: the error of TF32 is as large as that of FP8 activations.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
