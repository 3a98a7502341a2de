"""Networks are traced with shapes alone where they allow it, and the network is afterwards what it was before."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from fpq_lightning.graph.offload import Offload
from fpq_lightning.graph.trace import trace_units
from fpq_lightning.graph.units import discover_units


@functools.lru_cache
def _positions(n: int) -> Tensor:
    return torch.arange(n).float()


class Remembers(nn.Module):
    """A block that keeps what it computes, in itself and in the cache of a function."""

    def __init__(self, inspect: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.inspect, self.last = inspect, torch.zeros(1)
        self.register_buffer("scale", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        self.inspect(x)
        self.scale = self.scale.to(torch.float64).to(torch.float32)
        self.last = self.second(self.first(x) + _positions(x.shape[-1])) * self.scale
        return self.last


def _network(inspect: Callable[[Tensor], Any]) -> nn.Module:
    return nn.Sequential(Remembers(inspect), Remembers(inspect))


def _names(network: nn.Module) -> list[tuple[str, list[str], list[int]]]:
    others = [(2, {"input": torch.randn(2, 4)}), (3, {"input": torch.randn(3, 4)})]
    units, _ = trace_units(network, discover_units(network), {"input": torch.randn(1, 4)}, others)
    return [(unit.name, list(unit.layers), unit.sources) for unit in units]


def test_a_network_is_traced_without_values_and_stays_as_it_was() -> None:
    seen: list[bool] = []
    network = _network(lambda x: seen.append(isinstance(x, FakeTensor)))
    _positions.cache_clear()
    before = {name: (value, value.clone()) for name, value in network.state_dict(keep_vars=True).items()}
    assert [name for name, _, _ in _names(network)] == ["0", "1"]
    assert seen
    assert all(seen)
    assert all(value is before[name][0] for name, value in network.state_dict(keep_vars=True).items())
    assert all(torch.equal(value, copy) for value, copy in before.values())
    assert all(torch.equal(block.last, torch.zeros(1)) for block in network)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    output = network(torch.ones(2, 4))  # what a cache held of shapes alone would end this
    assert not isinstance(output, FakeTensor)
    assert output.isfinite().all()


@pytest.mark.parametrize("needs", [lambda x: x.sum().item(), lambda x: bool((x > 0).any()), lambda x: x.numpy()])
def test_a_network_that_needs_values_gives_the_same_units(needs: Callable[[Tensor], Any]) -> None:
    seen: list[bool] = []

    def inspect(x: Tensor) -> None:
        needs(x)
        seen.append(isinstance(x, FakeTensor))

    assert _names(_network(inspect)) == _names(_network(lambda x: None))
    assert seen
    assert not any(seen)


def test_an_error_of_the_network_itself_is_its_own() -> None:
    def fail(x: Tensor) -> None:
        raise ZeroDivisionError("of the network")

    with pytest.raises(ZeroDivisionError, match="of the network"):
        _names(_network(fail))


def test_blocks_in_host_memory_are_not_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    network = _network(lambda x: None)
    offload = Offload(network, list(network))
    offload.place(torch.device("cpu"))
    fetched: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "to", lambda self, *args: fetched.append(self))
    pointers = [p.data_ptr() for p in network.parameters()]
    assert [name for name, _, _ in _names(network)] == ["0", "1"]
    assert not fetched
    assert [p.data_ptr() for p in network.parameters()] == pointers


def test_hooks_of_others_are_called_and_stay() -> None:
    network, called = _network(lambda x: None), []
    handle = network[0].register_forward_hook(lambda module, args, output: called.append(output.shape))
    _names(network)
    assert called
    assert list(network[0]._forward_hooks) == [handle.id]
