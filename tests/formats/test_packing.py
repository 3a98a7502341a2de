"""Codes packed into bytes: against a stream of bits written out one by one, and ml_dtypes' own layout."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fpq_lightning.formats.packing import pack, packed_length, unpack

WIDTHS = st.integers(1, 8)


def random_codes(rows: int, n: int, width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2**width, (rows, n), generator=generator, dtype=torch.uint8)


def stream(codes: torch.Tensor, width: int) -> list[list[int]]:
    """Rows as bytes, by writing every bit of every code into one large integer."""
    rows = []
    for row in codes.tolist():
        number = sum(code << (i * width) for i, code in enumerate(row))
        rows.append(list(number.to_bytes(-(-len(row) * width // 8), "little")))
    return rows


@given(st.integers(1, 5), st.integers(1, 70), WIDTHS, st.integers(0, 99))
def test_packed_rows_are_the_stream_of_bits_of_their_codes(rows: int, n: int, width: int, seed: int) -> None:
    codes = random_codes(rows, n, width, seed)
    packed = pack(codes, width)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == stream(codes, width)
    assert packed.shape == (rows, packed_length(n, width))


@given(st.integers(0, 5), st.integers(1, 70), WIDTHS, st.integers(0, 99))
def test_unpacking_gives_the_codes_back(rows: int, n: int, width: int, seed: int) -> None:
    codes = random_codes(rows, n, width, seed)
    assert torch.equal(unpack(pack(codes, width), width, n), codes)


@pytest.mark.parametrize("width", range(1, 9))
def test_no_more_than_a_byte_of_a_row_is_lost(width: int) -> None:
    for n in range(1, 40):
        assert 0 <= 8 * packed_length(n, width) - n * width < 8


def test_four_bits_lie_two_in_a_byte_and_six_bits_four_in_three() -> None:
    assert pack(torch.tensor([[0x1, 0x2, 0xF]], dtype=torch.uint8), 4).tolist() == [[0x21, 0x0F]]
    codes = torch.tensor([[0b000001, 0b100000, 0b111111, 0b101010]], dtype=torch.uint8)
    assert pack(codes, 6).tolist() == [[0b00_000001, 0b1111_1000, 0b101010_11]]


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
def test_eight_bits_are_the_bytes_of_the_hardware_type(name: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8)[None]
    values = pack(codes, 8).view(getattr(torch, name)).float().numpy()
    expected = np.arange(256, dtype=np.uint8).view(getattr(ml_dtypes, name)).astype(np.float32)
    np.testing.assert_array_equal(values[0], expected)


def test_a_code_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="16, which does not fit 4 bits"):
        pack(torch.tensor([[3, 16]], dtype=torch.uint8), 4)


def test_rows_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="2 bytes, but 5 codes of 4 bits take 3"):
        unpack(torch.zeros(1, 2, dtype=torch.uint8), 4, 5)
