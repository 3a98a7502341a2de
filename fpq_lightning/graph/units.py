"""Units of reconstruction, found from the module tree alone.

BRECQ (Li et al. 2021) and Q-Diffusion (Li et al. 2023) reconstruct a residual block at a time. Which modules those
are follows from the structure: a *stage* holds a list of composite modules (UNet down blocks hold ResNets, a
transformer holds its blocks; a list of one between projections makes no stage), a *block* is a composite below the
stages, and a layer that stands alone is a unit of its own. Forward passes correct this (`trace_units`): a layer that
reads a block's output joins it, and what is not called once with whole samples, such as an expert, joins what is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import nn

from fpq_lightning.nn.calibrated import is_quantizable


@dataclass
class Unit:
    """A part of the network that is reconstructed as a whole.

    Attributes:
        name: of the module in the network; two of them joined by ``+``.
        module: it, or a `Chain` of the two.
        layers: its layers that are to be quantized, by full name, in the order in which they first run.
        sources: earlier units whose outputs its inputs are made from, without another unit between.
        attention: its modules whose attention is to be quantized, by full name.
        left: why it is no unit after all, but left to the network in full precision; empty if it is one.
    """

    name: str
    module: nn.Module
    layers: dict[str, nn.Module]
    sources: list[int] = field(default_factory=list)
    attention: dict[str, nn.Module] = field(default_factory=dict)
    left: str = ""

    @property
    def parameters(self) -> int:
        """Number of weights and biases of its quantized layers."""
        return sum(p.numel() for layer in self.layers.values() for p in layer.parameters(recurse=False))


def layer_count(module: nn.Module) -> int:
    """Number of quantizable layers in a module."""
    return sum(is_quantizable(m) for m in module.modules())


def _is_stage(module: nn.Module, experts: Collection[nn.Module]) -> bool:
    """Whether a module holds a list of blocks; one around a single block, with layers of its own, is a block itself."""
    lists = [m for m in module.modules() if isinstance(m, nn.ModuleList) and m not in experts]
    blocks = [e for m in lists for e in m if e is not None and layer_count(e) > 1]
    listed = {layer for m in lists for layer in m.modules()}
    has_own_layers = any(is_quantizable(layer) and layer not in listed for layer in module.modules())
    return len(blocks) > 1 or (len(blocks) == 1 and not has_own_layers)


def walk(model: nn.Module, experts: Collection[nn.Module] = ()) -> Iterator[tuple[str, nn.Module]]:
    """The candidates for units, by name.

    Args:
        model: the network.
        experts: lists whose members are no blocks.
    """
    return _walk(model, "", experts, is_root=True)


def _walk(
    module: nn.Module, name: str, experts: Collection[nn.Module], is_root: bool = False
) -> Iterator[tuple[str, nn.Module]]:
    if not layer_count(module):
        return
    is_container = isinstance(module, (nn.ModuleList, nn.ModuleDict))
    if is_root or is_container or (not is_quantizable(module) and _is_stage(module, experts)):
        for child_name, child in module.named_children():
            yield from _walk(child, f"{name}.{child_name}" if name else child_name, experts)
    else:
        yield name, module


def is_selected(name: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    """Whether a name matches a pattern of `include` and none of `exclude`."""
    return any(fnmatchcase(name, p) for p in include) and not any(fnmatchcase(name, p) for p in exclude)


def select_layers(names: Sequence[str], include: Sequence[str], exclude: Sequence[str]) -> set[str]:
    """The layers that glob patterns choose.

    Args:
        names: names of all quantizable layers.
        include: patterns, of which a layer must match one.
        exclude: patterns, of which it may match none.

    Raises:
        ValueError: if a pattern matches no layer, or no layer is left.
    """
    for pattern in [*include, *exclude]:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"pattern {pattern!r} matches none of the {len(names)} layers, such as {names[0]!r}")
    chosen = {name for name in names if is_selected(name, include, exclude)}
    if not chosen:
        raise ValueError(f"include {list(include)} and exclude {list(exclude)} leave no layer to quantize")
    return chosen


def discover_units(
    model: nn.Module, include: Sequence[str] = ("*",), exclude: Sequence[str] = (), by_layer: bool = False
) -> list[Unit]:
    """Finds the units of a network, in the order of the module tree.

    Every quantizable layer is in exactly one unit. A unit none of whose layers is chosen is listed all the same, so
    that its output can be carried along.

    Args:
        model: the network.
        include: patterns of `select_layers`.
        exclude: likewise.
        by_layer: make every layer a unit of its own, as AdaRound does.

    Raises:
        ValueError: if a pattern matches nothing or the network has no quantizable layer.
    """
    names = [name for name, module in model.named_modules() if is_quantizable(module)]
    if not names:
        raise ValueError(f"{type(model).__name__} has no Linear or Conv layer to quantize")
    chosen = select_layers(names, include, exclude)
    units: list[Unit] = []
    layers_alone = ((name, module) for name, module in model.named_modules() if is_quantizable(module))
    for name, module in layers_alone if by_layer else walk(model):
        if any(module is unit.module for unit in units):
            continue  # a module may have several names
        layers = {
            full: layer
            for sub, layer in module.named_modules()
            if is_quantizable(layer) and (full := f"{name}.{sub}" if sub else name) in chosen
        }
        units.append(Unit(name, module, layers))
    return units
