"""Gradients of attention lie in memory as its output does."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.utils._python_dispatch import TorchDispatchMode

from fpq_lightning.reconstruction.attention_gradients import GradientsLikeOutputs


class Layouts(TorchDispatchMode):
    """Strides of the gradients that backward passes of attention are given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if "attention" in str(func) and "backward" in str(func):
            self.seen.add(tuple(args[0].stride()))
        return func(*args, **(kwargs or {}))


def gradients(concatenated: bool, like_outputs: bool) -> tuple[list[Tensor], set[tuple[int, ...]]]:
    """Of queries, keys and values, where the output goes on alone or beside another, as in a single block of FLUX."""
    torch.manual_seed(0)
    heads = [torch.randn(2, 5, 3, 8).transpose(1, 2).requires_grad_() for _ in range(3)]
    other, weight = torch.randn(2, 5, 40), torch.randn(2, 5, 64)
    with GradientsLikeOutputs() if like_outputs else nullcontext():
        out = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        loss = (torch.cat([out, other], 2) * weight if concatenated else out * weight[..., :24]).sum()
    with Layouts() as layouts:
        loss.backward()
    return [h.grad for h in heads], layouts.seen  # type: ignore[misc]


def test_gradients_have_one_layout_whatever_follows() -> None:
    seen = [gradients(concatenated, like_outputs=True)[1] for concatenated in (False, True)]
    assert seen[0] == seen[1]
    assert len(seen[0]) == 1
    assert gradients(True, like_outputs=False)[1] != seen[1]  # or there is nothing to mend


@pytest.mark.parametrize("concatenated", [False, True])
def test_gradients_have_the_same_values(concatenated: bool) -> None:
    plain, like_outputs = (gradients(concatenated, like)[0] for like in (False, True))
    for a, b in zip(plain, like_outputs, strict=True):
        assert torch.equal(a, b)
