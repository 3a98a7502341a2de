"""Triton kernels of packed weights, run by Triton's interpreter on the CPU, against plain torch and float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton: pip install triton")

from fpq_lightning.formats.numbers import Format, parse_format
from fpq_lightning.formats.packing import pack
from fpq_lightning.kernels import ops
from fpq_lightning.kernels.codes import four_bit_assembly
from fpq_lightning.kernels.conv import Tiling as ConvTiling
from fpq_lightning.kernels.conv import conv
from fpq_lightning.kernels.decode import decode, translate
from fpq_lightning.kernels.quantize import quantize, quantize_pixels
from fpq_lightning.kernels.weight_gemm import Tiling, weight_gemm
from fpq_lightning.nn.backends.hardware import Hardware
from fpq_lightning.nn.convert import make_packed
from fpq_lightning.nn.packed_layer import PackedLayer
from fpq_lightning.nn.packed_weight import PackedWeight
from fpq_lightning.quantization.quantizer import Quantizer

FORMATS = ["e2m1", "e3m0", "e3m2", "e4m1", "e4m3", "e5m2", "e2m5", "e7m0", "float8_e4m3fn", "float8_e5m2", "ue4m4"]
FORMATS += ["e2m2", "e4m2", "int3", "int4", "uint4", "int8", "uint8"]


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("FPQ_KERNELS", "0")  # what the kernels are compared with is plain torch


def random_codes(fmt: Format, *shape: int) -> Tensor:
    codes = torch.randint(0, 2**fmt.bits, shape).to(torch.uint8)
    codes[fmt.values.isnan()[codes.long()]] = 0
    return codes


@pytest.mark.parametrize(
    ("shape", "groups", "offset"), [((5, 13), 1, False), ((3, 7, 3, 3), 1, True), ((4, 30), 3, True)]
)
@pytest.mark.parametrize("name", FORMATS)
def test_decoding_is_bit_equal_to_plain_torch(name: str, shape: tuple[int, ...], groups: int, offset: bool) -> None:
    torch.manual_seed(0)
    fmt, n = parse_format(name), torch.Size(shape[1:]).numel()
    packed = pack(random_codes(fmt, shape[0], n), fmt.bits)
    for rows in {1, shape[0]} if groups == 1 else {shape[0]}:
        scale = torch.rand(rows, groups) + 0.1
        start = torch.randn(rows, groups) if offset else None
        weight = PackedWeight(fmt, shape, packed, scale, start)
        # The interpreter rounds to bfloat16 otherwise than GPUs do, so float16 stands for both.
        for dtype, bits in ((torch.float32, torch.int32), (torch.float16, torch.int16)):
            found = decode(packed, fmt, shape, scale, start, dtype)
            assert torch.equal(found.view(bits), weight(dtype).view(bits))


@pytest.mark.parametrize("width", [2, 3, 4, 5, 6, 7, 8])
def test_codes_are_translated_one_by_one(width: int) -> None:
    torch.manual_seed(0)
    codes = torch.randint(0, 2**width, (3, 29)).to(torch.uint8)
    table = torch.randperm(256)[: 2**width].to(torch.uint8)
    assert torch.equal(translate(pack(codes, width), width, table, 29), table[codes.long()])


@pytest.mark.parametrize("start", range(4))
@pytest.mark.parametrize("width", [4, 8])
def test_codes_are_translated_wherever_they_begin(width: int, start: int) -> None:
    torch.manual_seed(0)
    codes = torch.randint(0, 2**width, (3, 32)).to(torch.uint8)
    table = torch.randperm(256)[: 2**width].to(torch.uint8) if width == 4 else None
    packed = pack(codes, width)
    memory = np.zeros(packed.numel() + 8, dtype=np.uint8)  # torch's own begins at a multiple of 64
    begin = (start - memory.ctypes.data) % 4
    for offset in range(4):
        storage = torch.from_numpy(memory[begin:])
        moved = storage[offset : offset + packed.numel()].view_as(packed).copy_(packed)
        expected = codes if table is None else table[codes.long()]
        assert torch.equal(translate(moved, width, table, 32), expected)


@pytest.mark.parametrize("channels", [70, 80])
@pytest.mark.parametrize("taps", [(1, 1), (3, 2), (3, 3)])
@pytest.mark.parametrize("width", [4, 6, 8])
def test_codes_of_filters_are_translated_place_by_place(width: int, taps: tuple[int, int], channels: int) -> None:
    torch.manual_seed(0)
    codes = torch.randint(0, 2**width, (3, channels, *taps)).to(torch.uint8)
    table = torch.randperm(256)[: 2**width].to(torch.uint8)
    packed, expected = pack(codes.flatten(1), width), codes.permute(0, 2, 3, 1).reshape(3, -1)
    places = taps[0] * taps[1]
    assert torch.equal(translate(packed, width, table, channels, places), table[expected.int()])
    assert torch.equal(translate(packed, width, None, channels, places), expected)


CONVOLUTIONS = [  # pixels, channels, outputs, filter, stride, padding
    ((2, 8, 8), 32, 24, (3, 3), 1, (1, 1)),
    ((1, 10, 12), 96, 40, (3, 3), 2, (1, 1)),
    ((2, 9, 20), 48, 70, (3, 5), 1, (0, 2)),
    ((1, 12, 6), 80, 16, (1, 1), 1, (0, 0)),
    ((1, 12, 12), 32, 16, (3, 3), 3, (1, 0)),
    ((2, 8, 8), 32, 16, (4, 4), 2, (1, 1)),
]


@pytest.mark.parametrize("one_scale", [False, True])
@pytest.mark.parametrize("tiling", [None, ConvTiling(4, 8, 64, 32, 4, 2)])
@pytest.mark.parametrize(("pixels", "c", "n", "taps", "stride", "padding"), CONVOLUTIONS)
def test_convolutions_are_those_of_torch(
    pixels: tuple[int, int, int], c: int, n: int, taps: tuple[int, int], stride: int, padding: tuple[int, int],
    tiling: ConvTiling | None, one_scale: bool,
) -> None:  # fmt: skip
    torch.manual_seed(0)
    x, weight = torch.randn(*pixels, c).to(torch.float8_e4m3fn), torch.randn(n, *taps, c).to(torch.float8_e4m3fn)
    scale, factor, bias = torch.rand(1 if one_scale else n, 1) + 0.1, torch.tensor(0.7), torch.randn(n)
    out = conv(x, weight, scale, factor, bias, stride, padding, torch.float32, tiling=tiling)
    inputs, filters = x.double().permute(0, 3, 1, 2), weight.double().permute(0, 3, 1, 2)
    sums = torch.nn.functional.conv2d(inputs, filters, stride=stride, padding=padding).permute(0, 2, 3, 1)
    largest = torch.nn.functional.conv2d(inputs.abs(), filters.abs(), stride=stride, padding=padding).max()
    assert out.shape == sums.shape
    assert ((out - sums * scale[:, 0] * factor - bias).abs() <= 2**-20 * largest).all()
    other = conv(x, weight, scale, factor, bias, stride, padding, torch.float32, channels_last=False, tiling=tiling)
    assert other.is_contiguous()
    assert torch.equal(other.permute(0, 2, 3, 1), out)
    with torch._subclasses.FakeTensorMode() as fake:
        operands = (fake.from_tensor(t) for t in (x, weight, scale, factor, bias))
        assert torch.ops.fpq.conv(*operands, stride, padding, torch.float32).shape == out.shape


def packed_conv(fmt: str, splits: tuple[int, ...], layer: torch.nn.Conv2d) -> PackedLayer:
    weights, inputs = [], []
    for i, n in enumerate(splits):
        rows = torch.randn(layer.out_channels, n * layer.weight[0, 0].numel())
        quantizer = Quantizer(parse_format(fmt), rows.abs().amax(1, keepdim=True) / parse_format(fmt).max)
        shape = (layer.out_channels, n, *layer.kernel_size)
        weights.append(PackedWeight.of(quantizer, quantizer.encode(rows), shape))
        inputs.append(Quantizer(parse_format("float8_e4m3fn"), torch.tensor(0.01 * (i + 1))))
    return make_packed(layer.bfloat16(), splits, weights, inputs).requires_grad_(False)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("options", "splits", "size", "outputs"),
    [
        ({"kernel_size": 1}, (32, 16), (6, 7), 32),
        ({"kernel_size": 1, "stride": 2}, (32,), (6, 7), 32),
        ({"padding": 1}, (48,), (6, 7), 24),
        ({"padding": 1}, (32, 16), (6, 7), 24),
        ({"stride": 2}, (64,), (7, 9), 24),  # as of a downsampler that pads before
        ({"stride": 2, "padding": 1}, (32, 64), (7, 8), 24),
        ({"kernel_size": 2, "stride": 2}, (32,), (9, 9), 24),
    ],
)
@pytest.mark.parametrize("fmt", ["float8_e4m3fn", "e2m1"])
def test_packed_convolutions_are_products_of_the_quantized_operands(
    fmt: str, options: dict, splits: tuple[int, ...], size: tuple[int, int], outputs: int,
    memory_format: torch.memory_format, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    torch.manual_seed(0)
    monkeypatch.delenv("FPQ_KERNELS")
    monkeypatch.setattr("fpq_lightning.nn.backends.paths.hardware_of", lambda device: Hardware((9, 0), kernels=True))
    layer = packed_conv(fmt, splits, torch.nn.Conv2d(sum(splits), outputs, **{"kernel_size": 3, **options}))
    x = torch.randn(2, sum(splits), *size).bfloat16().to(memory_format=memory_format)
    calls = []
    with monkeypatch.context() as patch:
        patch.setattr(ops, "conv", lambda *args: calls.append(1) or conv(*args))
        out = layer(x)
    columns = [part.column for part in layer.weights]
    layer(x)
    assert all(part.column is column for part, column in zip(layer.weights, columns, strict=True))  # kept
    is_product = options == {"kernel_size": 1} and outputs % 16 == 0  # of pixels, by torch
    assert len(calls) == (0 if is_product and memory_format == torch.channels_last else len(splits))
    assert out.is_contiguous(memory_format=memory_format)
    inputs, weight = layer.quantize_input(x.float(), layer.inputs).double(), layer.decode_weight().double()
    expected = layer.operate(inputs, weight, layer.bias.double())
    magnitudes = layer.operate(inputs.abs(), weight.abs(), layer.bias.double().abs())
    assert out.shape == expected.shape
    assert ((out.double() - expected).abs() <= 2**-7 * magnitudes).all()
    assert torch.equal(layer(x[0]), layer.simulate(x[0]))  # without its batch it is decoded
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    assert ((compiled.double() - expected).abs() <= 2**-7 * magnitudes).all()
    assert is_product or torch.equal(compiled, out)


@pytest.mark.parametrize("tiling", [Tiling(16, 32, 1, 4, 2), Tiling(32, 64, 3, 4, 2)])
@pytest.mark.parametrize(("n_out", "n_in", "m"), [(5, 12, 3), (70, 130, 17), (64, 37, 1)])
@pytest.mark.parametrize("name", ["e2m1", "e1m2", "e3m0", "ue2m2", "int4", "uint4"])
def test_products_are_those_of_the_decoded_weight(name: str, n_out: int, n_in: int, m: int, tiling: Tiling) -> None:
    torch.manual_seed(0)
    fmt = parse_format(name)
    codes, scale = random_codes(fmt, n_out, n_in), torch.rand(n_out, 1) + 0.1
    x, bias = torch.randn(m, n_in).half(), torch.randn(n_out).half()
    weight = fmt.values[codes.long()].double() * scale.double()
    out = weight_gemm(x, pack(codes, fmt.bits), fmt, scale, bias, tiling)
    magnitudes = x.double().abs() @ weight.abs().T + bias.double().abs()
    # Sums in float32, the result rounded to float16.
    assert ((out.double() - x.double() @ weight.T - bias.double()).abs() <= 2**-10 * magnitudes).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_activations_become_what_a_cast_of_torch_makes_of_them(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 448 * 0.37, 464 * 0.37, 1e-42])
    x = torch.cat([torch.randn(5000) * torch.logspace(-6, 4, 5000), special]).to(dtype)
    scale = torch.tensor(0.37)
    expected = (x.float() * (1 / scale)).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(quantize(x, scale).view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("shape", [(2, 70, 9, 15), (1, 64, 8, 8), (3, 5, 1, 1), (0, 16, 4, 4)])
@pytest.mark.parametrize("part", ["whole", "channels", "pixels", "turned"])
def test_images_become_codes_with_their_channels_as_neighbours(shape: tuple[int, ...], part: str) -> None:
    torch.manual_seed(0)
    x, scale = 1000 * torch.randn(shape).half(), torch.tensor(0.37)
    x = {"whole": x, "channels": x[:, 1:-1], "pixels": x[:, :, :-1, ::2], "turned": x.transpose(2, 3)}[part]
    found = quantize_pixels(x, scale)
    assert found.is_contiguous()
    assert torch.equal(found.view(torch.uint8), quantize(x, scale).permute(0, 2, 3, 1).view(torch.uint8))


def run_assembly(assembly: str, word: int) -> list[int]:
    """What a GPU makes of a 32-bit word, by the PTX manual: the four results."""
    registers = {"$4": word}

    def value(name: str) -> int:
        return registers[name] if name in registers else int(name, 0)

    for line in assembly.splitlines():
        operation, _, operands = line.strip().rstrip(";").partition(" ")
        if operation in ("{", "}", ".reg"):
            continue
        to, *names = [name.strip() for name in operands.split(",")]
        a, b, *rest = [value(name) for name in names]
        if operation == "and.b32":
            found = a & b
        elif operation == "shr.u32":
            found = a >> b
        elif operation == "shl.b32":
            found = a << b & 0xFFFFFFFF
        elif operation == "lop3.b32":
            assert rest[1] == (0xF0 & 0xCC) | 0xAA  # (a & b) | c
            found = a & b | rest[0]
        else:
            assert operation == "prmt.b32"
            found, eight = 0, b << 32 | a
            for i in range(4):
                pick = rest[0] >> 4 * i & 15
                byte = eight >> 8 * (pick & 7) & 255
                found |= (255 * (byte >> 7) if pick & 8 else byte) << 8 * i
        registers[to] = found
    return [registers[f"${i}"] for i in range(4)]


@pytest.mark.parametrize("name", ["e2m1", "e1m2", "e3m0", "float4_e2m1fn"])
def test_the_assembly_decodes_four_bit_codes(name: str) -> None:
    fmt = parse_format(name)
    codes = torch.randint(0, 16, (200, 8))
    codes[:2] = torch.arange(16).reshape(2, 8)
    for row in codes:
        word = sum(int(code) << 4 * i for i, code in enumerate(row))
        low, high = row[0::2], row[1::2]  # of the bytes
        out = torch.tensor(run_assembly(four_bit_assembly(fmt), word)).to(torch.uint32).view(torch.bfloat16).float()
        expected = torch.cat([fmt.values[low], fmt.values[high]])
        assert torch.equal(out, expected)
        assert torch.equal(out.signbit(), expected.signbit())


@pytest.mark.parametrize("name", ["int4", "uint4", "e4m3", "ue2m2"])
def test_other_codes_have_no_assembly(name: str) -> None:
    assert four_bit_assembly(parse_format(name)) == ""
