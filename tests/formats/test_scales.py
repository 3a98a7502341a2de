"""Block scales: their numbers against ml_dtypes, and the search against trying every one of them."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from diffusers.quantizers.bfl.utils import dequantize_nvfp4, quantize_nvfp4
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

import fpq_lightning as fpq
from fpq_lightning.formats.numbers import parse_format, parse_formats
from fpq_lightning.formats.scales import SCALE_FORMATS, ScaleFormat, parse_scale_format
from fpq_lightning.nn.packed_weight import BlockScaledWeight, PackedWeight
from fpq_lightning.quantization.quantizer import Granularity, Quantizer
from fpq_lightning.quantization.search import search_output_error, search_tensor_error

E4M3, E8M0 = SCALE_FORMATS["float8_e4m3fn"], SCALE_FORMATS["float8_e8m0fnu"]
E2M1 = parse_format("float4_e2m1fn")
every_scale_format = pytest.mark.parametrize("scale_format", SCALE_FORMATS, ids=SCALE_FORMATS.names)
seeds = st.integers(0, 2**31 - 1)


def is_in_e4m3(scale: Tensor) -> bool:
    """Whether one power of two makes E4M3 numbers, as ml_dtypes has them, of all scales."""
    x = scale.double().numpy()
    for exponent in range(-60, 60):
        y = x * 2.0**exponent
        if y.max() <= 448 and (y > 0).all() and (y.astype(ml_dtypes.float8_e4m3fn).astype(np.float64) == y).all():
            return True
    return False


def is_in_e8m0(scale: Tensor) -> bool:
    x = scale.numpy()
    return bool((x.astype(ml_dtypes.float8_e8m0fnu).astype(np.float32) == x).all())


IS_IN = {"float8_e4m3fn": is_in_e4m3, "float8_e8m0fnu": is_in_e8m0}


def rows_of(seed: int, n_rows: int = 6, n: int = 16, spread: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.empty(n_rows, 1).log_normal_(-4, spread, generator=generator)
    return torch.randn(n_rows, n, generator=generator) * sizes


# --- the numbers -----------------------------------------------------------------------------------------------


@every_scale_format
def test_values_are_those_of_ml_dtypes(scale_format: ScaleFormat) -> None:
    low, high = scale_format.codes
    codes = np.arange(low, high + 1, dtype=np.uint8)
    expected = codes.view(getattr(ml_dtypes, scale_format.name)).astype(np.float32)
    assert np.array_equal(scale_format.decode(torch.from_numpy(codes)).numpy(), expected)
    assert (np.diff(expected) > 0).all()
    assert expected[0] > 0


@given(seeds, st.sampled_from([0.0, 1.0, 3.0]))
def test_codes_of_scales_are_exact_and_others_are_refused(seed: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    for fmt in SCALE_FORMATS:
        low, high = (100, 150) if fmt is E8M0 else fmt.codes
        codes = torch.randint(low, high + 1, (4, 3), generator=generator)
        scale = fmt.decode(codes) * (2.0 ** torch.randint(-30, 30, (), generator=generator) if fmt.relative else 1.0)
        stored, tensor_scale = fmt.encode(scale)
        assert stored.dtype is fmt.dtype
        assert torch.equal(fmt.decode(stored.view(torch.uint8)) * tensor_scale, scale)
        assert fmt.relative or tensor_scale == 1
        with pytest.raises(ValueError, match=f"not those of {fmt.name}"):
            fmt.encode(scale * 1.01)


@given(st.floats(2.0**-40, 2.0**40, width=32))
@example(448.0)
@example(448.0 * 2.0**-9)
def test_the_scale_of_a_tensor_is_the_smallest_power_of_two_that_reaches(largest: float) -> None:
    scale = E4M3.tensor_scale(torch.tensor(largest)).item()
    assert np.log2(scale) % 1 == 0
    assert scale * 448 >= largest > scale / 2 * 448


# --- the search ------------------------------------------------------------------------------------------------


def errors_of(rows: Tensor, scales: Tensor) -> Tensor:
    """Squared errors of each row `[n_rows, n]` with each scale `[n_rows, n_scales]`, by rounding in ml_dtypes."""
    y = np.clip(rows.double().numpy()[:, None] / scales.double().numpy()[..., None], -6, 6)
    q = y.astype(np.float32).astype(ml_dtypes.float4_e2m1fn).astype(np.float64) * scales.double().numpy()[..., None]
    return torch.from_numpy(((q - rows.double().numpy()[:, None]) ** 2).sum(-1))


@given(seeds, st.sampled_from([0.3, 1.0]), st.sampled_from([8, 16, 32]))
def test_no_representable_scale_has_a_smaller_error(seed: int, spread: float, n: int) -> None:
    rows = rows_of(seed, n=n, spread=spread)
    for fmt in SCALE_FORMATS:
        found = search_tensor_error(rows, [E2M1], scale_format=fmt)
        assert found.scale is not None
        assert found.scale_format is fmt
        assert IS_IN[fmt.name](found.scale)
        # Every number of the format, on the grids of all powers of two that the tensor's scale could be.
        every = fmt.values[None] * 2.0 ** torch.arange(-24, -8)[:, None] if fmt.relative else fmt.values[60:160]
        trials = every.flatten().unique().expand(len(rows), -1)
        best = errors_of(rows, trials).amin(1)
        assert (errors_of(rows, found.scale)[:, 0] <= best * (1 + 1e-6)).all()


@given(seeds)
def test_the_search_beats_the_rules_that_formats_come_with(seed: int) -> None:
    rows = rows_of(seed, n_rows=32, n=32, spread=0.5)
    halves = rows.reshape(64, 16)
    found = search_tensor_error(halves, [E2M1], scale_format=E4M3)
    theirs = dequantize_nvfp4(*quantize_nvfp4(rows))
    assert (found(halves).reshape(32, 32) - rows).square().sum() < (theirs - rows).square().sum()
    found = search_tensor_error(rows, [E2M1], scale_format=E8M0)
    ocp = 2 ** (rows.abs().amax(1, keepdim=True).log2().floor() - 2)  # OCP Microscaling Formats 1.0, section 6.3
    assert found.scale is not None
    assert (errors_of(rows, found.scale) <= errors_of(rows, ocp) * (1 + 1e-6)).all()


def test_a_power_of_two_that_a_block_holds_exactly_is_found() -> None:
    # 8 = 4 * 2: without clipping at 6 the larger scale is exact, beyond the clips of float32 scales.
    rows = torch.full((2, 32), 8.0)
    found = search_tensor_error(rows, [E2M1], scale_format=E8M0)
    assert torch.equal(found(rows), rows)


@every_scale_format
def test_the_largest_magnitude_as_the_clip_is_the_next_scale_that_clips_nothing(scale_format: ScaleFormat) -> None:
    rows = rows_of(0)
    found = search_tensor_error(rows, [E2M1], max_only=True, scale_format=scale_format)
    assert found.scale is not None
    assert IS_IN[scale_format.name](found.scale)
    assert (found.scale * 6 >= rows.abs().amax(1, keepdim=True)).all()
    smaller = found.scale * (1 / 2 if scale_format is E8M0 else 15 / 16)
    assert (smaller * 6 < rows.abs().amax(1, keepdim=True)).all()


@every_scale_format
@pytest.mark.parametrize("seed", range(3))
def test_the_output_search_stays_on_the_grid_and_takes_the_best_neighbour(scale_format: ScaleFormat, seed: int) -> None:
    rows = rows_of(seed, n_rows=8)  # two groups for each of four outputs
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(seed)) * torch.linspace(0.1, 3, 32)

    def output_error(q: Quantizer) -> Tensor:
        return (x @ (q(rows) - rows).reshape(4, 32).T).square().sum(0)

    formats = parse_formats(["float4_e2m1fn", "e1m2"])
    found = search_output_error(rows, formats, output_error, scale_format=scale_format)
    assert found.scale is not None
    assert IS_IN[scale_format.name](found.scale)
    start = search_tensor_error(rows, [found.format], scale_format=scale_format).scale
    assert start is not None
    trials = []
    for shift in scale_format.shifts:
        if scale_format is E8M0:
            scale = start * 2.0**shift
        else:
            exponent = torch.floor(torch.log2(start))
            steps = start / 2**exponent * 8 + shift  # 8 to 15 in a binade, whose neighbours have steps of their own
            scale = torch.where(steps >= 8, steps, 8 - (8 - steps) / 2) * 2**exponent / 8
        trials.append(output_error(Quantizer(found.format, scale)))
    assert torch.allclose(output_error(found), torch.stack(trials).amin(0), rtol=1e-5)
    if seed == 0 and scale_format is E4M3:
        assert (output_error(found) < trials[scale_format.shifts.index(0)]).any()


@every_scale_format
def test_rows_of_zeros_and_tiny_rows_have_positive_scales(scale_format: ScaleFormat) -> None:
    rows = torch.stack([torch.zeros(16), torch.full((16,), 1e-30), torch.ones(16), torch.linspace(-1e4, 1e4, 16)])
    found = search_tensor_error(rows, [E2M1], scale_format=scale_format)
    assert found.scale is not None
    assert (found.scale > 0).all()
    assert IS_IN[scale_format.name](found.scale)
    assert torch.equal(found(rows)[:2], torch.zeros(2, 16))
    assert torch.isfinite(found(rows)).all()
    zeros = search_tensor_error(torch.zeros(3, 16), [E2M1], scale_format=scale_format)
    assert torch.equal(zeros(torch.zeros(3, 16)), torch.zeros(3, 16))


# --- quantizers, recipes and packed weights --------------------------------------------------------------------


@every_scale_format
def test_scales_with_a_format_are_not_learned_and_survive_their_state(scale_format: ScaleFormat) -> None:
    quantizer = search_tensor_error(rows_of(1), [E2M1], scale_format=scale_format)
    quantizer.learn_scale()
    assert quantizer.log_gain is None
    again = Quantizer.from_state(quantizer.to_state())
    assert again.scale_format is scale_format
    old = {k: v for k, v in quantizer.to_state().items() if k != "scale_format"}  # of an earlier checkpoint
    assert Quantizer.from_state(old).scale_format is None


@every_scale_format
def test_packed_scales_take_a_byte_each(scale_format: ScaleFormat) -> None:
    rows = rows_of(2, n_rows=24)
    quantizer = search_tensor_error(rows, [E2M1], scale_format=scale_format)
    packed = PackedWeight.of(quantizer, quantizer.encode(rows), (8, 48))
    assert isinstance(packed, BlockScaledWeight)
    assert torch.equal(packed(), quantizer(rows).reshape(8, 48))
    assert torch.equal(packed.scale, quantizer.scale.reshape(8, 3))
    stored = sum(t.numel() * t.element_size() for t in packed.state_dict().values())
    assert stored == 8 * 24 + 24 + 4 * scale_format.relative
    assert quantizer.scale_bits == 8 * (24 + 4 * scale_format.relative)
    packed.to(torch.bfloat16)
    assert torch.equal(packed(), quantizer(rows).reshape(8, 48))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"scale_format": "float8_e4m3fn"}, "scale_format float8_e4m3fn goes with granularity group"),
        ({"granularity": "tensor", "scale_format": "float8_e8m0fnu"}, "goes with granularity group"),
        (
            {"granularity": "group", "group_size": 16, "scale_format": "e4m3"},
            "unknown scale_format 'e4m3': use float32, ",
        ),
        (
            {"formats": "uint4", "granularity": "group", "group_size": 16, "scale_format": "float8_e4m3fn"},
            "needs signed weights.formats",
        ),
    ],
)
def test_scale_formats_that_make_no_sense_are_refused(weights: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        fpq.Recipe(weights=fpq.WeightRecipe(**weights))
    assert "\n" not in str(error.value)


def test_a_layer_that_groups_do_not_divide_has_a_scale_a_channel() -> None:
    granularity = Granularity("group", 16, "float8_e4m3fn")
    assert granularity.fitting([torch.zeros(4, 32), torch.zeros(4, 16, 3, 3)]) == granularity
    assert granularity.fitting([torch.zeros(4, 32), torch.zeros(4, 3, 3, 3)]) == Granularity("channel")
    assert parse_scale_format("float32") is None
