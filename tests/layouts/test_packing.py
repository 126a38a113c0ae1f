"""Packing against a bit string written digit by digit, for every width and any count."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qhub.layouts.packing import pack, packed_length, unpack

from . import oracle

WIDTHS = st.integers(1, 8)


@st.composite
def _rows(draw: st.DrawFn) -> tuple[int, np.ndarray]:
    bits = draw(WIDTHS)
    shape = (*draw(st.lists(st.integers(1, 3), max_size=2)), draw(st.integers(1, 70)))
    seed = draw(st.integers(0, 2**32 - 1))
    return bits, np.random.default_rng(seed).integers(0, 2**bits, shape)


def _digits(row: np.ndarray, bits: int) -> str:
    """Return the codes of ``row`` as binary digits, least significant first."""
    return "".join(f"{int(code):0{bits}b}"[::-1] for code in row)


@given(_rows())
def test_bytes_are_the_bit_string(case: tuple[int, np.ndarray]) -> None:
    bits, codes = case
    packed = pack(torch.from_numpy(codes), bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*codes.shape[:-1], packed_length(codes.shape[-1], bits))
    for row, found in zip(codes.reshape(-1, codes.shape[-1]), packed.reshape(-1, packed.shape[-1]), strict=True):
        digits = "".join(f"{byte:08b}"[::-1] for byte in found.tolist())
        wanted = _digits(row, bits)
        assert digits == wanted.ljust(len(digits), "0")
    assert np.array_equal(packed.numpy(), oracle.bit_string(codes, bits, packed.shape[-1]))


@given(_rows(), st.sampled_from([torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float32]))
def test_unpack_undoes_pack(case: tuple[int, np.ndarray], dtype: torch.dtype) -> None:
    bits, codes = case
    if dtype == torch.int8 and bits == 8:
        codes = codes % 128
    packed = pack(torch.from_numpy(codes).to(dtype), bits)
    unpacked = unpack(packed, bits, codes.shape[-1])
    assert unpacked.dtype == torch.uint8
    assert np.array_equal(unpacked.numpy(), codes)


@given(WIDTHS, st.integers(0, 10_000))
def test_length_is_enough_and_not_wasteful(bits: int, count: int) -> None:
    length = packed_length(count, bits)
    assert 8 * length >= count * bits
    # At most seven codes of padding, or a part of a byte where codes do not straddle bytes.
    assert 8 * length < count * bits + (8 if bits in (1, 2, 4, 8) else 8 * bits)


@given(WIDTHS, st.integers(1, 70), st.integers(0, 2**32 - 1))
def test_any_bytes_unpack_to_codes_in_range(bits: int, count: int, seed: int) -> None:
    raw = np.random.default_rng(seed).integers(0, 256, packed_length(count, bits)).astype(np.uint8)
    codes = unpack(torch.from_numpy(raw), bits, count)
    digits = "".join(f"{byte:08b}"[::-1] for byte in raw)
    assert codes.tolist() == [int(digits[bits * i : bits * i + bits][::-1], 2) for i in range(count)]


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_code_survives_at_every_place(bits: int) -> None:
    for place in range(8):
        codes = torch.zeros(2**bits, 8, dtype=torch.uint8)
        codes[:, place] = torch.arange(2**bits)
        assert torch.equal(unpack(pack(codes, bits), bits, 8), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_strided_codes(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (24, 10), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(unpack(pack(codes.T, bits), bits, 24), codes.T)
    packed = pack(codes, bits).T.contiguous().T
    assert torch.equal(unpack(packed, bits, 10), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_no_codes(bits: int) -> None:
    for shape in ((0,), (3, 0), (0, 5)):
        packed = pack(torch.zeros(shape, dtype=torch.uint8), bits)
        assert packed.shape == (*shape[:-1], packed_length(shape[-1], bits))
        assert unpack(packed, bits, shape[-1]).shape == shape


def test_documented_bytes() -> None:
    """The diagrams of the module's docstring."""
    assert pack(torch.tensor([0x1, 0x2]), 4).tolist() == [0x21]
    assert pack(torch.tensor([1, 2, 3, 4, 5, 6, 7, 0]), 3).tolist() == [0b11_010_001, 0b0_101_100_0, 0b000_111_11]
