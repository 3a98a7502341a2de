"""How much of a network is quantized, and what is not."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from fpq_lightning.nn.calibrated import is_quantizable
from fpq_lightning.nn.packed_layer import PackedLayer

_SHOWN = 3  # names of a kind in a line
_LAYERS = "Linear and Conv layers left out by choice"
_TRANSPOSED = "transposed convolutions"
_OVERRIDDEN = "layers with a forward or a weight of their own making"
_STACKS = "matrices stacked in one parameter, such as experts"
_MATRICES = "matrices outside of layers"
_EMBEDDINGS = "embeddings"
_VECTORS = "norms and other vectors"


@dataclass(frozen=True)
class Kept:
    """Parameters of one kind that stay in full precision.

    Attributes:
        kind: what they are, or why they stay.
        parameters: how many.
        names: of the layers, or of the parameters where no layer of a known kind holds them.
        expected: whether they are no weights of products, or left out by choice.
    """

    kind: str
    parameters: int
    names: list[str]
    expected: bool

    def __str__(self) -> str:
        more = len(self.names) - _SHOWN
        return f"{self.kind} ({', '.join(self.names[:_SHOWN])}{f' and {more} more' if more > 0 else ''})"


@dataclass(frozen=True)
class Coverage:
    """The parameters of a network; biases of Linear and Conv layers are left out of all counts.

    Attributes:
        parameters: in all.
        quantized: of these.
        kept: the others, the largest kinds first.
    """

    parameters: int
    quantized: int
    kept: list[Kept]

    @property
    def share(self) -> float:
        """The quantized part of all parameters."""
        return self.quantized / self.parameters if self.parameters else 0.0

    @property
    def kept_phrase(self) -> str:
        """What stays in full precision, in words; empty if nothing does."""
        return ", ".join(f"{kept.parameters / self.parameters:.2%} {kept}" for kept in self.kept)

    def lines(self) -> list[str]:
        """For the terminal."""
        kept = [f"in full precision: {self.kept_phrase}"] if self.kept else []
        return [f"quantized: {self.share:.2%} of the denoiser's parameters", *kept]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Coverage:
        """The inverse of `dataclasses.asdict`."""
        return cls(values["parameters"], values["quantized"], [Kept(**kept) for kept in values["kept"]])


def total(networks: Mapping[str, Coverage]) -> Coverage:
    """What several networks come to together; the names of one that stay begin with its name."""
    kept: dict[tuple[str, bool], list[Kept]] = {}
    for network, found in networks.items():
        for one in found.kept:
            named = replace(one, names=[f"{network}.{name}" for name in one.names])
            kept.setdefault((one.kind, one.expected), []).append(named)
    kinds = [
        Kept(kind, sum(one.parameters for one in some), [name for one in some for name in one.names], expected)
        for (kind, expected), some in kept.items()
    ]
    return Coverage(
        sum(found.parameters for found in networks.values()),
        sum(found.quantized for found in networks.values()),
        sorted(kinds, key=lambda k: -k.parameters),
    )


def coverage(model: nn.Module, quantized: Collection[str], reasons: Mapping[str, str] | None = None) -> Coverage:
    """Counts what is quantized, and sorts the rest by kind.

    Args:
        model: the network, before, while or after it is calibrated.
        quantized: names of the layers whose weights are quantized.
        reasons: why further layers are not, by name; the remaining ones were left out by choice.
    """
    modules = dict(model.named_modules())
    packed = [math.prod(m.shape) for m in modules.values() if isinstance(m, PackedLayer) and len(m.weights)]
    total = done = sum(packed)  # whose weights are no parameters
    found: dict[tuple[str, bool], dict[str, int]] = {}
    for name, parameter in model.named_parameters():
        holder, _, own = name.rpartition(".")
        holder = holder.partition(".parametrizations.")[0]  # of a layer whose weight torch computes
        if ".variants." in f".{name}":
            continue
        module = modules[holder]
        is_layer = is_quantizable(module) or isinstance(module, PackedLayer)
        if is_layer and own == "bias":
            continue
        total += parameter.numel()
        if is_layer and own == "weight" and holder in quantized:
            done += parameter.numel()
            continue
        kind = _kind(module, parameter, is_layer, (reasons or {}).get(holder))
        shown = holder if isinstance(module, (nn.Linear, _ConvNd)) else name
        sizes = found.setdefault(kind, {})
        sizes[shown] = sizes.get(shown, 0) + parameter.numel()
    kept = [
        Kept(kind, sum(sizes.values()), sorted(sizes, key=lambda name: -sizes[name]), expected)
        for (kind, expected), sizes in found.items()
    ]
    return Coverage(total, done, sorted(kept, key=lambda k: -k.parameters))


def _kind(module: nn.Module, parameter: Tensor, is_layer: bool, reason: str | None) -> tuple[str, bool]:
    """What a parameter in full precision is, and whether that is to be expected."""
    if is_layer:
        return reason or _LAYERS, reason is None
    if isinstance(module, _ConvTransposeNd):
        return _TRANSPOSED, False
    if isinstance(module, (nn.Linear, _ConvNd)):
        return _OVERRIDDEN, False
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return _EMBEDDINGS, True
    dimensions = sum(size > 1 for size in parameter.shape)
    return (_VECTORS, True) if dimensions < 2 else (_MATRICES, True) if dimensions == 2 else (_STACKS, False)
