"""Units found in networks of diffusers and in small ones made so that the right answer is known by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from fpq_lightning.graph.trace import trace_units
from fpq_lightning.graph.units import Unit, discover_units, select_layers
from fpq_lightning.graph.whole import PARTS_OF_SAMPLES, RUN_AGAIN
from fpq_lightning.nn.calibrated import Granularity, is_quantizable
from fpq_lightning.nn.convert import make_quantized

MakeNetwork = Callable[..., tuple[nn.Module, dict[str, Any]]]  # the fixture of conftest.py

# --- networks ------------------------------------------------------------------------------------------------------


class ResBlock(nn.Module):
    """Norm, activation, convolution, twice, with a shortcut."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(2, inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time = nn.Linear(4, outputs)
        self.norm2 = nn.GroupNorm(2, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time(F.silu(emb))[:, :, None, None]
        return self.conv2(F.silu(self.norm2(h))) + self.shortcut(x)


class TinyUNet(nn.Module):
    """A UNet whose modules are declared in another order than they run."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Conv2d(4, 3, 3, padding=1)
        self.ups = nn.ModuleList([ResBlock(12, 4), ResBlock(8, 4)])
        self.middle = ResBlock(4, 8)
        self.downs = nn.ModuleList([ResBlock(4, 4)])
        self.conv_in = nn.Conv2d(3, 4, 3, padding=1)
        self.embedding = nn.Sequential(nn.Linear(4, 4), nn.SiLU(), nn.Linear(4, 4))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angles = t[:, None] * torch.tensor([1.0, 0.1])
        emb = self.embedding(torch.cat([angles.sin(), angles.cos()], dim=-1))
        first = self.conv_in(x)
        second = self.downs[0](first, emb)
        h = self.middle(F.avg_pool2d(second, 2), emb)
        h = F.interpolate(h, scale_factor=2.0)
        h = self.ups[0](torch.cat([h, second], dim=1), emb)
        h = self.ups[1](torch.cat([h, first], dim=1), emb)
        return self.out(F.silu(h))


def tiny_inputs(n: int = 1) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {"x": torch.randn(n, 3, 8, 8), "t": torch.rand(n)}


def make_tiny() -> TinyUNet:
    torch.manual_seed(0)
    return TinyUNet().requires_grad_(False)


@pytest.fixture
def tiny() -> TinyUNet:
    return make_tiny()


@pytest.fixture(params=["unet", "conditional_unet", "dit", "flux", "tiny"])
def network(request: pytest.FixtureRequest, make_network: MakeNetwork) -> tuple[nn.Module, dict[str, Any]]:
    return (make_tiny(), tiny_inputs()) if request.param == "tiny" else make_network(request.param)


# --- which units ---------------------------------------------------------------------------------------------------


def test_every_layer_is_in_exactly_one_unit(network: tuple[nn.Module, dict]) -> None:
    model, inputs = network
    expected = {name: m for name, m in model.named_modules() if type(m) in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)}
    units = discover_units(model)
    found = [(name, layer) for unit in units for name, layer in unit.layers.items()]
    assert len(found) == len(expected)
    assert dict(found) == expected
    assert len({unit.name for unit in units}) == len(units)
    for unit in units:
        assert model.get_submodule(unit.name) is unit.module
    # Tracing orders them and loses none, since all of these networks run every layer.
    traced, _ = trace_units(model, units, inputs)
    assert sorted(name for unit in traced for name in unit.layers) == sorted(expected)


def test_units_do_not_lie_within_each_other(network: tuple[nn.Module, dict]) -> None:
    units = discover_units(network[0])
    for unit in units:
        below = set(unit.module.modules())
        assert not any(other.module in below for other in units if other is not unit)


def test_units_of_a_unet_are_its_resnets_and_attentions(make_network: MakeNetwork) -> None:
    unet, _ = make_network("unet")
    kinds = {unit.name: type(unit.module).__name__ for unit in discover_units(unet)}
    expected = {
        "conv_in": "Conv2d",
        "time_embedding": "TimestepEmbedding",
        "down_blocks.0.resnets.0": "ResnetBlock2D",
        "down_blocks.0.downsamplers.0": "Downsample2D",
        "down_blocks.1.resnets.0": "ResnetBlock2D",
        "down_blocks.1.attentions.0": "Attention",
        "mid_block.resnets.0": "ResnetBlock2D",
        "mid_block.attentions.0": "Attention",
        "mid_block.resnets.1": "ResnetBlock2D",
        "up_blocks.0.resnets.0": "ResnetBlock2D",
        "up_blocks.0.attentions.0": "Attention",
        "up_blocks.0.resnets.1": "ResnetBlock2D",
        "up_blocks.0.attentions.1": "Attention",
        "up_blocks.0.upsamplers.0": "Upsample2D",
        "up_blocks.1.resnets.0": "ResnetBlock2D",
        "up_blocks.1.resnets.1": "ResnetBlock2D",
        "conv_out": "Conv2d",
    }
    assert kinds == expected


def test_units_of_a_conditional_unet_are_resnets_and_whole_transformers(
    make_network: MakeNetwork,
) -> None:
    unet, _ = make_network("conditional_unet")
    kinds = {unit.name: type(unit.module).__name__ for unit in discover_units(unet)}
    transformers = ["down_blocks.1.attentions.0", "mid_block.attentions.0", "up_blocks.0.attentions.0"]
    transformers += ["up_blocks.0.attentions.1"]
    for name in transformers:
        assert kinds.pop(name) == "Transformer2DModel"
    assert not any("attentions" in name for name in kinds)
    resnets = [name for name, kind in kinds.items() if kind == "ResnetBlock2D"]
    assert len(resnets) == 8
    assert sorted(set(kinds) - set(resnets)) == [
        "conv_in",
        "conv_out",
        "down_blocks.0.downsamplers.0",
        "time_embedding",
        "up_blocks.0.upsamplers.0",
    ]


def test_a_list_of_one_block_between_layers_is_no_stage_and_one_of_two_is() -> None:
    class Wrapped(nn.Module):
        def __init__(self, depth: int, projected: bool) -> None:
            super().__init__()
            self.enter = nn.Linear(4, 4) if projected else nn.Identity()
            self.blocks = nn.ModuleList([ResBlock(4, 4) for _ in range(depth)])

    def names(depth: int, projected: bool) -> list[str]:
        return [unit.name for unit in discover_units(nn.Sequential(Wrapped(depth, projected)))]

    assert names(1, projected=True) == ["0"]
    assert names(2, projected=True) == ["0.enter", "0.blocks.0", "0.blocks.1"]
    assert names(1, projected=False) == ["0.blocks.0"]  # where a skip may be read between the blocks of two stages


def test_an_entry_of_a_list_may_be_none() -> None:
    # What diffusers puts where a middle block goes without attention.
    middle = nn.Module()
    middle.resnets, middle.attentions = nn.ModuleList([ResBlock(4, 4), ResBlock(4, 4)]), nn.ModuleList([None])
    assert [unit.name for unit in discover_units(nn.ModuleList([middle]))] == ["0.resnets.0", "0.resnets.1"]


def test_units_of_transformers_are_their_blocks(make_network: MakeNetwork) -> None:
    kinds = {unit.name: type(unit.module).__name__ for unit in discover_units(make_network("dit")[0])}
    assert {k: v for k, v in kinds.items() if "blocks" in k} == {
        f"transformer_blocks.{i}": "BasicTransformerBlock" for i in range(3)
    }
    kinds = {unit.name: type(unit.module).__name__ for unit in discover_units(make_network("flux")[0])}
    assert {k: v for k, v in kinds.items() if "blocks" in k} == {
        **{f"transformer_blocks.{i}": "FluxTransformerBlock" for i in range(2)},
        **{f"single_transformer_blocks.{i}": "FluxSingleTransformerBlock" for i in range(2)},
    }
    assert kinds["time_text_embed"] == "CombinedTimestepTextProjEmbeddings"
    assert {"x_embedder", "context_embedder", "proj_out"} < set(kinds)


def test_units_of_a_made_up_network_follow_from_its_tree() -> None:
    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([ResBlock(4, 4), ResBlock(4, 4)])
            self.resize = nn.Conv2d(4, 4, 3, stride=2)

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pairs = nn.ModuleList([nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)) for _ in range(2)])

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stages = nn.ModuleDict({"one": Stage(), "two": Stage()})
            self.head = nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 3, 1), nn.Conv2d(3, 3, 1))
            self.fan = nn.ModuleList([nn.Linear(2, 2), nn.Identity(), nn.Linear(2, 2)])
            self.heads = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
            self.decoder = Decoder()
            self.norm = nn.LayerNorm(3)

    units = discover_units(Network())
    names = {unit.name: list(unit.layers) for unit in units}
    block = ["conv1", "time", "conv2", "shortcut"]
    assert names == {
        **{
            f"stages.{s}.blocks.{i}": [f"stages.{s}.blocks.{i}.{x}" for x in block]
            for s in ("one", "two")
            for i in (0, 1)
        },
        "stages.one.resize": ["stages.one.resize"],
        "stages.two.resize": ["stages.two.resize"],
        "head": ["head.2", "head.3"],
        "fan.0": ["fan.0"],
        "fan.2": ["fan.2"],
        "heads.a": ["heads.a"],
        "heads.b": ["heads.b"],
        "decoder.pairs.0": ["decoder.pairs.0.0", "decoder.pairs.0.2"],
        "decoder.pairs.1": ["decoder.pairs.1.0", "decoder.pairs.1.2"],
    }


def test_layer_shared_by_two_blocks_is_quantized_once() -> None:
    blocks = nn.ModuleList([ResBlock(4, 4), ResBlock(4, 4)])
    blocks[1].conv1 = blocks[0].conv1
    units = discover_units(nn.ModuleDict({"blocks": blocks}))
    owners = [unit.name for unit in units for layer in unit.layers.values() if layer is blocks[0].conv1]
    assert owners == ["blocks.0"]


def test_block_with_two_names_is_one_unit() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([ResBlock(4, 4), ResBlock(4, 4)])
            self.last = self.blocks[1]

    network = Network()
    units = discover_units(network)
    assert [unit.module for unit in units] == list(network.blocks)
    assert sum(len(unit.layers) for unit in units) == 8


def test_parameters_are_the_weights_and_biases_of_chosen_layers(tiny: TinyUNet) -> None:
    sizes = {unit.name: unit.parameters for unit in discover_units(tiny)}
    assert sizes["conv_in"] == 3 * 4 * 9 + 4
    assert sizes["downs.0"] == 2 * (4 * 4 * 9 + 4) + (4 * 4 + 4) * 2
    without = {unit.name: unit.parameters for unit in discover_units(tiny, exclude=["downs.0.conv*"])}
    assert without["downs.0"] == (4 * 4 + 4) * 2
    assert without["conv_in"] == sizes["conv_in"]


# --- include and exclude -------------------------------------------------------------------------------------------


def test_patterns_choose_layers_by_their_full_name(tiny: TinyUNet) -> None:
    units = discover_units(tiny, include=["downs.*", "ups.0.*"], exclude=["*.time", "ups.*.shortcut"])
    chosen = [name for unit in units for name in unit.layers]
    assert sorted(chosen) == ["downs.0.conv1", "downs.0.conv2", "downs.0.shortcut", "ups.0.conv1", "ups.0.conv2"]
    # Units without a chosen layer stay in the list, as their outputs are carried along.
    assert [u.name for u in units] == [u.name for u in discover_units(tiny)]


@pytest.mark.parametrize("patterns", [{"include": ["attentions*"]}, {"exclude": ["conv_in", "convin"]}])
def test_pattern_that_matches_nothing_is_refused(tiny: TinyUNet, patterns: dict) -> None:
    with pytest.raises(ValueError, match=r"'(attentions[*]|convin)' matches none of the 20 layers"):
        discover_units(tiny, **patterns)


def test_choosing_no_layer_is_refused(tiny: TinyUNet) -> None:
    with pytest.raises(ValueError, match="leave no layer"):
        discover_units(tiny, exclude=["*"])
    with pytest.raises(ValueError, match="leave no layer"):
        select_layers(["a.b", "a.c"], ["a.b"], ["*b"])


def test_patterns_are_case_sensitive_globs() -> None:
    names = ["a.To_Q", "a.to_q", "b.0.to_k"]
    assert select_layers(names, ["*to_?"], ["b.[0-9].*"]) == {"a.to_q"}


def test_network_without_a_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="Sequential has no Linear or Conv layer"):
        discover_units(nn.Sequential(nn.ReLU(), nn.LayerNorm(3)))


# --- order and sources ---------------------------------------------------------------------------------------------


def actual_calls(model: nn.Module, modules: dict[str, nn.Module], inputs: dict[str, Any]) -> list[str]:
    calls: list[str] = []
    hooks = [m.register_forward_pre_hook(lambda *_, name=name: calls.append(name)) for name, m in modules.items()]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    return calls


def test_units_and_their_layers_come_in_the_order_of_calls(network: tuple[nn.Module, dict]) -> None:
    model, inputs = network
    units, _ = trace_units(model, discover_units(model), inputs)
    names = [name for unit in units for name in unit.name.split("+")]
    assert names == actual_calls(model, {name: model.get_submodule(name) for name in names}, inputs)
    for unit in units:
        first_calls = list(dict.fromkeys(actual_calls(model, unit.layers, inputs)))
        assert list(unit.layers) == first_calls


def test_tracing_changes_neither_the_output_nor_the_network(network: tuple[nn.Module, dict]) -> None:
    model, inputs = network

    def run() -> Tensor:
        with torch.no_grad():
            out = model(**inputs)
        return out if isinstance(out, Tensor) else out[0]

    before = run()
    trace_units(model, discover_units(model), inputs)
    assert torch.equal(run(), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_sources_of_a_unet_are_its_predecessors_and_skips(tiny: TinyUNet) -> None:
    units, _ = trace_units(tiny, discover_units(tiny), tiny_inputs())
    names = [unit.name for unit in units]
    assert names == ["embedding", "conv_in", "downs.0", "middle", "ups.0", "ups.1", "out"]
    sources = {unit.name: [names[i] for i in unit.sources] for unit in units}
    assert sources == {
        "embedding": [],
        "conv_in": [],
        "downs.0": ["embedding", "conv_in"],
        "middle": ["embedding", "downs.0"],
        "ups.0": ["embedding", "downs.0", "middle"],
        "ups.1": ["embedding", "conv_in", "ups.0"],
        "out": ["ups.1"],
    }


def test_sources_of_a_diffusers_unet_are_its_predecessors_and_skips(make_network: MakeNetwork) -> None:
    unet, inputs = make_network("unet")
    units, _ = trace_units(unet, discover_units(unet), inputs)
    names = [unit.name for unit in units]
    sources = {unit.name: {names[i] for i in unit.sources} for unit in units}
    resampled = "down_blocks.0.resnets.0+down_blocks.0.downsamplers.0"
    assert sources["up_blocks.0.resnets.0"] == {"time_embedding", "mid_block.resnets.1", "down_blocks.1.attentions.0"}
    assert sources["up_blocks.0.resnets.1"] == {"time_embedding", "up_blocks.0.attentions.0", resampled}
    assert sources["up_blocks.1.resnets.1"] == {"time_embedding", "up_blocks.1.resnets.0", "conv_in"}
    assert sources["mid_block.attentions.0"] >= {"mid_block.resnets.0"}
    assert sources["conv_out"] == {"up_blocks.1.resnets.1"}


def functional_network(forward: Callable[[nn.Module, Tensor], Tensor], units: int) -> tuple[nn.Module, list[Unit]]:
    """A network of linear units `u0`, `u1`, ... put together by `forward`."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for i in range(units):
                self.add_module(f"u{i}", nn.Linear(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return forward(self, x)

    network = Network()
    return network, trace_units(network, discover_units(network), {"x": torch.randn(2, 4)})[0]


def in_place_addition(net: Any, x: Tensor) -> Tensor:
    h = x.clone()
    h += net.u0(x)
    return net.u1(h)


def written_slice(net: Any, x: Tensor) -> Tensor:
    h = torch.zeros(2, 4)
    h[:, :2] = net.u0(x)[:, :2]
    return net.u1(h)


def out_argument(net: Any, x: Tensor) -> Tensor:
    h = torch.empty(2, 4)
    torch.add(x, net.u0(x), out=h)
    return net.u1(h)


def chunks_and_stack(net: Any, x: Tensor) -> Tensor:
    a, b = net.u0(x).chunk(2, dim=-1)
    return net.u1(torch.stack([a, b], dim=1).flatten(1))


def inside_containers(net: Any, x: Tensor) -> Tensor:
    state = {"h": [net.u0(x), None]}
    return net.u1(sum(t for t in state["h"] if t is not None))


@pytest.mark.parametrize(
    "forward",
    [in_place_addition, written_slice, out_argument, chunks_and_stack, inside_containers],
    ids=lambda f: f.__name__,
)
def test_source_is_found_however_its_output_gets_into_the_input(forward: Callable) -> None:
    _, units = functional_network(forward, units=2)
    assert [(u.name, u.sources) for u in units] == [("u0", []), ("u1", [0])]


def test_unit_between_hides_what_lies_before_it() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        a = net.u0(x)
        b = net.u1(a)
        return net.u3(net.u2(b) + b.sigmoid() * 2)

    _, units = functional_network(forward, units=4)
    assert [u.sources for u in units] == [[], [0], [1], [1, 2]]


def test_units_and_layers_that_do_not_run_are_left_out() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        return net.u2(net.u0(x))

    network, units = functional_network(forward, units=3)
    assert [(u.name, u.sources) for u in units] == [("u0", []), ("u2", [0])]

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused, self.used, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.used(x))

    network.u0 = Block()
    units, _ = trace_units(network, discover_units(network), {"x": torch.randn(2, 4)})
    assert list(units[0].layers) == ["u0.used", "u2"]  # which u2 follows


# --- what can be a unit --------------------------------------------------------------------------------------------


def _two_layers(width: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))


def traced(
    network: nn.Module, exclude: Sequence[str] = (), by_layer: bool = False
) -> tuple[list[Unit], dict[str, str]]:
    """The units that batches of one, two, three and two other samples show, and why layers are left to the network."""
    torch.manual_seed(0)
    found = discover_units(network, exclude=exclude, by_layer=by_layer)
    planned = {name: unit for unit in found for name in unit.layers}
    others = [(n, {"x": torch.randn(n, 8, 4)}) for n in (2, 3, 2)]
    units, _ = trace_units(network, found, {"x": torch.randn(1, 8, 4)}, others)
    ran = {name for unit in units for name in unit.layers}
    return units, {name: unit.left for name, unit in planned.items() if name not in ran}


class Twice(nn.Module):
    """Uses its embedding twice."""

    def __init__(self, stage: bool) -> None:
        super().__init__()
        self.embed = _two_layers()
        self.blocks = nn.ModuleList([_two_layers() for _ in range(1 + stage)])
        self.mix = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(x + self.embed(x[:, :1]) + self.embed(torch.zeros(len(x), 1, 4)))
        for block in self.blocks:
            x = block(x)
        return x


def test_a_unit_that_runs_twice_is_left_to_the_network_by_name() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        return net.u0(net.u1(net.u0(x)))

    _, units = functional_network(forward, units=2)
    assert [(unit.name, list(unit.layers), unit.sources) for unit in units] == [("u1", ["u1"], [])]
    units, left = traced(Twice(stage=True))
    assert [unit.name for unit in units] == ["mix", "blocks.0", "blocks.1"]
    assert left == dict.fromkeys(("embed.0", "embed.2"), RUN_AGAIN)


def test_what_is_excluded_may_run_as_often_as_it_likes() -> None:
    units, left = traced(Twice(stage=True), exclude=["embed.*"])
    assert [unit.name for unit in units] == ["mix", "blocks.0", "blocks.1"]
    assert not left


def test_what_runs_twice_joins_the_smallest_module_around_its_calls() -> None:
    network = nn.Sequential(Twice(stage=True), _two_layers())
    network.forward = lambda x: network[1](network[0](x))
    units, left = traced(network)
    assert not left
    assert [unit.name for unit in units] == ["0", "1"]
    assert sorted(units[0].layers) == sorted(f"0.{n}" for n, m in network[0].named_modules() if is_quantizable(m))
    assert [unit.sources for unit in units] == [[], [0]]


def test_a_stage_whose_blocks_run_twice_is_one_unit() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([_two_layers(), _two_layers()])

        def forward(self, x: Tensor) -> Tensor:
            for block in [*self.blocks, *self.blocks]:
                x = block(x)
            return x

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.loop = nn.Linear(4, 4), Loop()

        def forward(self, x: Tensor) -> Tensor:
            return self.loop(self.enter(x))

    units, left = traced(Network())
    assert [(unit.name, len(unit.layers)) for unit in units] == [("enter", 1), ("loop", 4)]
    assert not left


class Experts(nn.Module):
    """Sends each token to one of its experts, the last of which is never chosen."""

    def __init__(self, called_without_tokens: bool = False) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 3)
        self.experts = nn.ModuleList([_two_layers() for _ in range(3)])
        self.called_without_tokens = called_without_tokens
        with torch.no_grad():
            self.gate.bias[2] = -1e4

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        chosen, out = self.gate(tokens).argmax(-1), torch.zeros_like(tokens)
        for i, expert in enumerate(self.experts):
            if self.called_without_tokens or (chosen == i).any():
                out[chosen == i] = expert(tokens[chosen == i])
        return out.view_as(x)


class ExpertBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend, self.feed_forward = _two_layers(), Experts()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.feed_forward(x + self.attend(x))


class Blocks(nn.Module):
    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.enter, self.blocks = nn.Linear(4, 4), nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = block["moe"](block["mix"](x)) if isinstance(block, nn.ModuleDict) else block(x)
        return x


def _expert_layers(name: str) -> set[str]:
    return {f"{name}.gate", *(f"{name}.experts.{i}.{k}" for i in range(3) for k in (0, 2))}


def test_a_block_with_experts_is_one_unit_and_holds_those_that_no_token_went_to() -> None:
    units, left = traced(Blocks([ExpertBlock(), ExpertBlock()]))
    assert [unit.name for unit in units] == ["enter", "blocks.0", "blocks.1"]
    expected = _expert_layers("blocks.1.feed_forward") | {"blocks.1.attend.0", "blocks.1.attend.2"}
    assert set(units[2].layers) == expected
    assert not left


@pytest.mark.parametrize("called_without_tokens", [False, True])
def test_experts_in_a_block_that_is_never_called_itself_are_one_unit(called_without_tokens: bool) -> None:
    blocks = [nn.ModuleDict({"mix": nn.Linear(4, 4), "moe": Experts(called_without_tokens)}) for _ in range(2)]
    units, left = traced(Blocks(blocks))
    names = [unit.name for unit in units]
    assert names == ["enter", "blocks.0.mix", "blocks.0.moe+blocks.1.mix", "blocks.1.moe"]
    assert set(units[3].layers) == _expert_layers("blocks.1.moe")
    assert not left


def test_experts_of_the_network_itself_are_left_to_it() -> None:
    units, left = traced(Experts())
    assert [unit.name for unit in units] == ["gate"]
    called = {f"experts.{i}.{k}" for i in (0, 1) for k in (0, 2)}
    assert {name for name, reason in left.items() if reason == PARTS_OF_SAMPLES} == called


def test_experts_where_every_layer_is_a_unit_are_one_unit_all_the_same() -> None:
    units, left = traced(Blocks([ExpertBlock(), ExpertBlock()]), by_layer=True)
    assert [unit.name for unit in units if unit.name.startswith("blocks.0")] == [
        "blocks.0.attend.0", "blocks.0.attend.2", "blocks.0.feed_forward",
    ]  # fmt: skip
    assert set(units[3].layers) == _expert_layers("blocks.0.feed_forward")
    assert not left


def test_blocks_whose_batch_is_no_leading_dimension_stay_units() -> None:
    class TokensFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([_two_layers(), _two_layers()])

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x.transpose(0, 1)).transpose(0, 1)
            return x

    units, left = traced(TokensFirst())
    assert [unit.name for unit in units] == ["blocks.0", "blocks.1"]
    assert not left


def test_hooks_are_removed_when_tracing_fails() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(5, 4))
    units = discover_units(network)
    with pytest.raises(RuntimeError, match="shapes"):
        trace_units(network, units, {"input": torch.zeros(1, 4)})
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


# --- chains --------------------------------------------------------------------------------------------------------


class Pair(nn.Module):
    """A block of two layers with two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"first": self.a(x).relu(), "second": self.b(x)}


class Scaled(nn.Module):
    """A lone layer that takes more than a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, size: int | None, *, x: Tensor, factor: float = 1.0) -> Tensor:
        return self.layer(x) * factor


def chained_network(forward: Callable[[Any, Tensor], Tensor]) -> tuple[nn.Module, list[Unit]]:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair, self.scaled, self.last = Pair(), Scaled(), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return forward(self, x)

    network = Network()
    return network, trace_units(network, discover_units(network), {"x": torch.randn(1, 4)})[0]


def test_a_lone_layer_joins_the_block_whose_output_it_reads() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        out = net.pair(x)
        return net.last(net.scaled(None, x=out["second"], factor=2.0) + out["first"])

    network, units = chained_network(forward)
    assert [unit.name for unit in units] == ["pair+scaled", "last"]
    assert list(units[0].layers) == ["pair.a", "pair.b", "scaled.layer"]
    assert units[1].sources == [0]
    x = torch.randn(3, 4)
    block, lone = units[0].module(x)
    expected = network.pair(x)
    assert torch.equal(block["first"], expected["first"])
    assert torch.equal(lone, network.scaled.layer(expected["second"]) * 2)


def another_tensor_too(net: Any, x: Tensor) -> Tensor:
    net.pair(x)
    return net.last(net.scaled(None, x=x))


def changed_in_between(net: Any, x: Tensor) -> Tensor:
    return net.last(net.scaled(None, x=net.pair(x)["second"].add_(1)))


def computed_in_between(net: Any, x: Tensor) -> Tensor:
    return net.last(net.scaled(None, x=net.pair(x)["second"] * 2))


def not_only_it(net: Any, x: Tensor) -> Tensor:
    return net.last(net.scaled(x, x=net.pair(x)["second"]))


def after_another_layer(net: Any, x: Tensor) -> Tensor:
    out = net.pair(x)
    return net.scaled(None, x=net.last(x) + out["first"]) + net.pair.a.weight.sum()


@pytest.mark.parametrize(
    "forward",
    [another_tensor_too, changed_in_between, computed_in_between, not_only_it, after_another_layer],
    ids=lambda f: f.__name__,
)
def test_a_layer_that_reads_anything_else_stays_alone(forward: Callable) -> None:
    assert all("+" not in unit.name for unit in chained_network(forward)[1])


def test_only_one_layer_joins_a_block_and_none_where_every_layer_is_a_unit() -> None:
    network = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 4), nn.Linear(4, 4))
    inputs = {"input": torch.randn(1, 4)}
    assert [u.name for u in trace_units(network, discover_units(network), inputs)[0]] == ["0+1", "2"]
    alone = trace_units(network, discover_units(network, by_layer=True), inputs)[0]
    assert [u.name for u in alone] == ["0.0", "0.1", "1", "2"]


# --- splits --------------------------------------------------------------------------------------------------------


def test_layers_that_read_a_skip_are_split_at_the_concatenation(tiny: TinyUNet) -> None:
    _, splits = trace_units(tiny, discover_units(tiny), tiny_inputs())
    assert splits == {
        "ups.0.conv1": (8, 4),  # through norm and activation
        "ups.0.shortcut": (8, 4),
        "ups.1.conv1": (4, 4),
        "ups.1.shortcut": (4, 4),
    }


@pytest.mark.parametrize("name", ["unet", "conditional_unet"])
def test_splits_of_a_diffusers_unet(name: str, make_network: MakeNetwork) -> None:
    model, inputs = make_network(name)
    _, splits = trace_units(model, discover_units(model), inputs)
    pieces = {"0.resnets.0": (16, 16), "0.resnets.1": (16, 8), "1.resnets.0": (16, 8), "1.resnets.1": (8, 8)}
    assert splits == {
        f"up_blocks.{block}.{layer}": sizes for block, sizes in pieces.items() for layer in ("conv1", "conv_shortcut")
    }
    for layer, sizes in splits.items():
        make_quantized(model.get_submodule(layer), Granularity(), sizes)


@pytest.mark.parametrize("name", ["dit", "flux"])
def test_transformers_without_skips_are_not_split(name: str, make_network: MakeNetwork) -> None:
    model, inputs = make_network(name)
    assert trace_units(model, discover_units(model), inputs)[1] == {}


def splits_of(forward: Callable, features: int = 8) -> dict[str, tuple]:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.d = (nn.Linear(4, 4) for _ in range(3))
            self.c = nn.Linear(features, 4)
            self.norm = nn.LayerNorm(features)

        def forward(self, x: Tensor) -> Tensor:
            return forward(self, x)

    network = Network()
    return trace_units(network, discover_units(network), {"x": torch.randn(1, 3, 4)})[1]


def test_elementwise_operations_and_norms_keep_the_pieces() -> None:
    def through_many(n: Any, x: Tensor) -> Tensor:
        h = torch.cat([n.a(x), n.b(x)], dim=-1)
        return n.c(F.gelu(n.norm(h) * 1.5 + 0.1).contiguous())

    assert splits_of(through_many) == {"c": (4, 4)}
    three = splits_of(lambda n, x: n.c(torch.concat(tensors=(n.a(x), n.b(x)[..., :2], n.d(x)), dim=2)), features=10)
    assert three == {"c": (4, 2, 4)}


def _square(n: Any, x: Tensor) -> Tensor:
    """A skip of as many tokens as channels, whose shape a transposition leaves as it is."""
    x = x[:, :1].expand(1, 8, 4)
    return torch.cat([n.a(x), n.b(x)], dim=-1)


@pytest.mark.parametrize(
    ("why", "forward"),
    [
        ("along tokens", lambda n, x: n.d(torch.cat([n.a(x), n.b(x)], dim=1))),
        ("cut to some of its channels", lambda n, x: n.c(torch.cat([n.a(x), n.b(x), n.d(x)], dim=-1)[..., 2:10])),
        ("of one unit's output with itself", lambda n, x: n.c(torch.cat([n.a(x)] * 2, dim=-1)) + n.b(x).sum()),
        ("with the input", lambda n, x: n.c(torch.cat([n.a(x), x], dim=-1)) + n.b(x).sum()),
        ("of sinusoids", lambda n, x: n.c(torch.cat([x.sin(), x.cos()], dim=-1)) + n.a(x).sum() + n.b(x).sum()),
        ("mixed by a permutation", lambda n, x: n.c(torch.cat([n.a(x), n.b(x)], dim=-1).flip(-1))),
        ("shuffled", lambda n, x: n.c(torch.cat([n.a(x), n.b(x)], -1).reshape(1, 3, 2, 4).mT.reshape(1, 3, 8))),
        ("transposed", lambda n, x: n.c(_square(n, x).transpose(1, 2))),
        ("permuted", lambda n, x: n.c(_square(n, x).permute(0, 2, 1))),
        ("multiplied by a matrix", lambda n, x: n.c(torch.cat([n.a(x), n.b(x)], dim=-1) @ torch.ones(8, 8))),
    ],
    ids=lambda v: v.replace(" ", "_") if isinstance(v, str) else "",
)
def test_concatenation_that_is_no_skip_does_not_split(why: str, forward: Callable) -> None:
    assert splits_of(forward) == {}


def test_concatenation_of_a_units_own_parts_does_not_split() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.cat([self.a(x), self.b(x)], dim=-1))

    network = nn.Sequential(nn.Linear(4, 4), Block())
    units = discover_units(network)
    assert [u.name for u in units] == ["0", "1"]
    assert trace_units(network, units, {"input": torch.randn(1, 4)})[1] == {}


def test_quantized_layers_are_still_found(tiny: TinyUNet) -> None:
    """A network whose layers are quantized classes already has the same units, order and splits."""
    before = trace_units(tiny, discover_units(tiny), tiny_inputs())
    for module in list(tiny.modules()):
        if is_quantizable(module):
            make_quantized(module, Granularity())
    after = trace_units(tiny, discover_units(tiny), tiny_inputs())
    described = [[(u.name, u.sources, list(u.layers)) for u in units] for units, _ in (before, after)]
    assert described[0] == described[1]
    assert after[1] == before[1]
