"""What a packed layer gives to whoever reads its weight."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_WRITES = re.compile(r"[a-z]\w*[a-z0-9]_|__setitem__|__i(add|sub|mul|truediv|floordiv|mod|pow|and|or|xor|[lr]shift)__")
_DATA: Any = Tensor.data
_JOINS = (torch.cat, torch.concat, torch.concatenate)
_HARMLESS = ("requires_grad_", "share_memory_")


class DecodedWeight(Tensor):
    """The weight of a packed layer, decoded for a reader. It is a copy, so it refuses writes, which would be lost.

    The names of operations tell which of them write. Two ways to ask torch instead were tried. Operator schemas in
    `__torch_dispatch__` also find writes to views, but such tensors cannot be printed or turned into lists and numpy
    arrays. Comparing the counts of writes before and after an operation takes 8 us instead of 5, fails in inference
    mode and under `torch.compile`, and refuses a write only after it happened.
    """

    _is_hf_initialized = True  # or transformers would fill it with random numbers

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _JOINS and sum(isinstance(x, cls) for x in (args[0] if args else kwargs["tensors"])) > 1:
            raise RuntimeError(
                "packed projections cannot be fused, as each has a quantizer of its own: call dequantize() of the "
                "model first, or leave fuse_qkv_projections out"
            )
        out = kwargs.get("out")
        written = [*out] if isinstance(out, (tuple, list)) else [out]
        if func == _DATA.__set__ or (_WRITES.fullmatch(func.__name__) and func.__name__ not in _HARMLESS):
            written.append(args[0] if args else next(iter(kwargs.values())))
        if any(isinstance(x, cls) and not isinstance(x, nn.Parameter) for x in written):
            raise RuntimeError(
                f"a packed weight cannot be written ({func.__name__}), so no adapter can be fused into it: call "
                "dequantize() of the model first"
            )
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        return result.as_subclass(cls) if func in (_DATA.__get__, Tensor.detach) else result

    def _plain(self) -> Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self._plain().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._plain().__reduce_ex__(protocol)
