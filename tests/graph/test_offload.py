"""Blocks in host memory: which are on the device, when, and that nothing changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeNetwork
from models import fit_arguments, quantized_files, run_fpq, save_tiny, tiny_text_to_image, tiny_unet
from torch import Tensor, nn

from fpq_lightning.graph import offload as offload_module
from fpq_lightning.graph.offload import Offload
from fpq_lightning.graph.trace import _Tracer
from fpq_lightning.graph.units import discover_units, layer_count
from fpq_lightning.nn.calibrated import LayerQuantization
from fpq_lightning.utils.staging import Staging


class Elsewhere:
    """Where blocks lie, on a machine with a single device: what was moved to `there` and has not come back."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.present: list[nn.Module] = []
        self.most = 0
        self.blocks: list[nn.Module] = []
        make, unload = Offload.__init__, Offload._unload
        to = nn.Module.to

        def making(offload: Offload, *args: Any) -> None:
            make(offload, *args)
            self.blocks = offload.blocks
            for block in offload.blocks:
                block.register_forward_pre_hook(self._check)

        def moving(module: nn.Module, device: Any, *args: Any, **kwargs: Any) -> nn.Module:
            if module in self.blocks and isinstance(device, torch.device) and module not in self.present:
                self.present.append(module)
                self.most = max(self.most, len(self.present))
            return to(module, device, *args, **kwargs)

        def unloading(offload: Offload, block: nn.Module) -> None:
            unload(offload, block)
            self.present.remove(block)

        monkeypatch.setattr(Offload, "__init__", making)
        monkeypatch.setattr(Offload, "_unload", unloading)
        monkeypatch.setattr(nn.Module, "to", moving)

    def _check(self, block: nn.Module, args: Any) -> None:
        assert block in self.present or "forward" in vars(block), "a block ran in host memory"


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Elsewhere:
    return Elsewhere(monkeypatch)


@pytest.mark.parametrize("kind", ["unconditional", "text"])
def test_a_run_with_blocks_in_host_memory_ends_the_same_and_has_few_on_the_device(
    kind: str, tmp_path: Path, elsewhere: Elsewhere, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_tiny(tmp_path / "tiny") if kind == "unconditional" else tiny_text_to_image(tmp_path / "tiny")
    prompts = ["--sampler.prompts=['a cat','b']", "--sampler.guidance_scale=3"] if kind == "text" else []
    for offload in (False, True):
        arguments = fit_arguments(model, tmp_path / str(offload), iterations=4, n_images=2)
        outcome = run_fpq(capsys, [*arguments, *prompts, f"--offload={offload}"])
        assert outcome.code == 0, outcome.err
    assert quantized_files(tmp_path / "True") == quantized_files(tmp_path / "False")
    images = [sorted((tmp_path / str(offload) / "images").rglob("*.png")) for offload in (False, True)]
    assert [file.read_bytes() for file in images[0]] == [file.read_bytes() for file in images[1]]
    assert len(elsewhere.blocks) >= 5
    assert 1 <= elsewhere.most <= 2  # a unit and, while it goes, the next
    assert not elsewhere.present


def test_a_run_that_was_stopped_goes_on_with_blocks_in_host_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_tiny(tmp_path / "tiny")

    def fit(name: str, *more: str) -> Any:
        return run_fpq(capsys, [*fit_arguments(model, tmp_path / name, iterations=4), "--offload=true", *more])

    with monkeypatch.context() as patch:
        harden = offload_module.Offload.hold

        def stop(offload: Offload, blocks: Any) -> None:
            stop.calls += 1  # type: ignore[attr-defined]
            if stop.calls == 6:  # type: ignore[attr-defined]
                raise OSError(5, "the disk is gone", "somewhere")
            harden(offload, blocks)

        stop.calls = 0  # type: ignore[attr-defined]
        patch.setattr(Offload, "hold", stop)
        assert fit("stopped").code != 0
    assert fit("stopped", "--ckpt_path=last").code == 0
    assert fit("whole").code == 0
    assert quantized_files(tmp_path / "stopped") == quantized_files(tmp_path / "whole")


def test_weights_come_back_to_the_memory_they_left() -> None:
    unet = tiny_unet()
    before = {name: value.data_ptr() for name, value in unet.named_parameters()}
    inputs = {"sample": torch.randn(1, 3, 8, 8), "timestep": torch.tensor([3])}
    with torch.no_grad():
        expected = unet(**inputs).sample
    offload = Offload(unet, [unit.module for unit in discover_units(unet)])
    assert all(layer_count(block) > 1 for block in offload.blocks)
    offload.place(torch.device("cpu"))

    def copying(block: nn.Module, args: Any) -> None:
        for parameter in block.parameters():  # as another device would hold a copy
            parameter.data = parameter.data.clone()

    for block in offload.blocks:
        block.register_forward_pre_hook(copying)
    with torch.no_grad():
        assert torch.equal(unet(**inputs).sample, expected)
    assert {name: value.data_ptr() for name, value in unet.named_parameters()} == before


def test_as_many_blocks_stay_as_fit_until_others_are_held() -> None:
    blocks = [nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(4)]
    offload = Offload(nn.Sequential(*blocks), blocks)
    for size, there in ((47, 0), (48, 1), (143, 2), (150, 3), (1000, 4)):
        offload.keep(size)
        offload.keep(size)
        assert [offload._is_there(block) for block in blocks] == [True] * there + [False] * (4 - there)
    offload.hold([blocks[2]])
    assert [offload._is_there(block) for block in blocks] == [False, False, True, False]
    offload.keep(100)
    assert [offload._is_there(block) for block in blocks] == [True, False, True, False]


def test_staged_copies_are_equal_and_stay_so() -> None:
    staging = Staging(torch.device("cpu"))
    shapes = [(3, 5), (), (0, 2), (1000,), (2, 3, 4)]
    types = [torch.bfloat16, torch.float32, torch.uint8, torch.float64, torch.float16]
    made = []
    for turn in range(4):
        tensors = [(torch.rand(shape) * 9 + turn).to(dtype) for shape, dtype in zip(shapes, types, strict=True)]
        made.append((tensors, staging.copies(tensors)))
    for tensors, copies in made:
        for x, copied in zip(tensors, copies, strict=True):
            assert copied.dtype == x.dtype
            assert torch.equal(copied, x)
            assert copied.data_ptr() % 64 == 0
    staging.close()


def test_codes_move_with_their_layer_and_keep_their_type() -> None:
    quantization = LayerQuantization()
    codes = torch.tensor([[1, 2]], dtype=torch.uint8)
    quantization.codes = [codes]
    quantization.set_bias(torch.ones(2))
    moved = quantization.to("meta", torch.float64)
    assert moved.codes is not None
    assert [(c.device.type, c.dtype) for c in moved.codes] == [("meta", torch.uint8)]
    bias: Tensor | None = moved.bias
    assert bias is not None
    assert bias.dtype == torch.float64


def test_a_part_of_a_block_that_runs_without_it_is_there_while_it_runs(
    make_network: MakeNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = make_network("dit", n=2)  # its end embeds the timestep with the first block's layers
    with torch.no_grad():
        expected = model(**inputs)[0]
    offload = Offload(model, [unit.module for unit in discover_units(model)])
    offload.device = torch.device("cpu", 0)  # one that can be told from host memory
    home = {id(p): p.data_ptr() for p in model.parameters()}
    moved: list[bool] = []
    embedding = model.transformer_blocks[0].norm1.emb.timestep_embedder.linear_1

    def running(layer: nn.Module, args: Any) -> None:
        moved.append(layer.weight.data_ptr() != home[id(layer.weight)])

    to = nn.Module.to

    def copying(module: nn.Module, device: Any) -> nn.Module:
        result = to(module, device)
        for p in module.parameters() if device is offload.device else ():
            p.data = p.data.clone()  # as another device would hold one
        return result

    monkeypatch.setattr(nn.Module, "to", copying)
    embedding.register_forward_pre_hook(running)
    with torch.no_grad():
        found = model(**inputs)[0]
    assert torch.equal(found, expected)
    assert moved == [True, True]  # within its block, and without
    assert {id(p): p.data_ptr() for p in model.parameters()} == home


def test_hooks_go_and_weights_stay_when_the_blocks_are_no_longer_offloaded() -> None:
    unet = tiny_unet()
    offload = Offload(unet, [unit.module for unit in discover_units(unet)])
    offload.place(torch.device("cpu"))
    offload.hold([offload.blocks[0]])
    offload.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in unet.modules())
    weights = unet.to(torch.bfloat16).state_dict()
    with torch.no_grad():
        unet(torch.randn(1, 3, 8, 8).bfloat16(), torch.tensor([1]))
    assert {value.dtype for value in unet.state_dict().values()} == {torch.bfloat16}
    assert weights.keys() == unet.state_dict().keys()


def test_to_hold_a_larger_module_is_to_hold_the_blocks_in_it() -> None:
    def block() -> nn.Sequential:
        return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))

    inside = nn.Sequential(block(), nn.ReLU(), block())
    blocks = [inside[0], inside[2], block()]
    offload = Offload(nn.Sequential(inside, blocks[2]), blocks)
    offload.hold([inside])
    assert [offload._is_there(block) for block in blocks] == [True, True, False]
    offload.hold([])
    assert not any(offload._is_there(block) for block in blocks)


def test_tracing_keeps_no_weights() -> None:
    tracer = _Tracer()
    with tracer:
        moved = nn.Linear(2, 2).to(torch.float64)
    assert moved.weight.dtype == torch.float64
    assert not tracer._alive
