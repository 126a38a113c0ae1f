"""Codebooks, Hadamard matrices and the order of bits: those of QuIP#."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from qhub_quip.hadamard import factor_of, hadamard_matrix
from qhub_quip.lattices import SHIFT, code_tables
from qhub_quip.packing import pack_bytes, pack_e8p, unpack_bytes, unpack_e8p
from torch import Tensor

from qhub.errors import ConfigError
from qhub.layouts.transforms import Transform
from qhub.layouts.vectors import FoldedBook

ORDERS = (12, 20, 28, 36, 52, 60, 108, 116, 124, 140, 156, 172)


def _digest(values: Tensor) -> str:
    return hashlib.sha256(values.to(torch.int8).contiguous().numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("order", ORDERS)
def test_hadamard_matrices_are_those_that_quip_takes_from_sloanes_library(order: int, digests: dict[str, Any]) -> None:
    matrix = hadamard_matrix(order).long()
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.int64))
    assert _digest(matrix) == digests["hadamard"][str(order)]


def test_e8p_is_quips_table(digests: dict[str, Any]) -> None:
    """Its codes have the sign bits in another order than ours: those of ``Qidxs``."""
    book = FoldedBook(code_tables("E8P12")[0, :, 0].float(), SHIFT)
    theirs = torch.arange(1 << 16)
    low = torch.zeros_like(theirs)
    for bit, weight in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
        low |= (theirs >> bit & 1) << weight
    vectors = book.vectors(theirs & ~255 | low)
    assert _digest(vectors * 4) == digests["tables"]["E8P"]
    assert vectors.unique(dim=0).shape[0] == 1 << 16


def test_the_third_bits_table_is_quips(digests: dict[str, Any]) -> None:
    table = code_tables("E8P12RVQ3B")[1, :, 0]
    assert _digest(table * 4) == digests["tables"]["E8"]
    assert table.unique(dim=0).shape[0] == 256


def test_sizes_are_taken_apart_as_quip_does() -> None:
    # Llama 2 7B: hidden, three of it, intermediate, two of it; 70B: the same with grouped heads.
    sizes = (4096, 12288, 11008, 22016, 10240, 28672, 57344, 5120, 13824, 64)
    assert [factor_of(size, "x") for size in sizes] == [1, 12, 172, 172, 20, 28, 28, 20, 108, 1]


@pytest.mark.parametrize("size", [3 * 64, 5 * 128])
def test_twelve_and_twenty_stand_for_three_and_five(size: int) -> None:
    assert factor_of(size, "x") in (12, 20)


@pytest.mark.parametrize("size", [7, 11 * 64, 9, 12 * 3 * 5, 172 * 3, 6])
def test_sizes_without_a_rotation_are_refused_by_name(size: int) -> None:
    with pytest.raises(ConfigError, match=rf"the output of x has a size of {size}"):
        factor_of(size, "the output of x")


def test_the_rotation_of_an_input_is_transposed(known: dict[str, Any]) -> None:
    layout = known["2 bits, 12"].layout
    assert (
        Transform("hadamard", "in", 12) in layout.transforms and Transform("hadamard", "out", 12) in layout.transforms
    )
    assert not torch.equal(hadamard_matrix(12), hadamard_matrix(12).T)


def _words(codes: Tensor) -> Tensor:
    """Return the words of E8P codes, bit by bit, as FORMATS of QuIP#'s maybe_pack_idxs says."""
    n, runs = codes.shape
    words = []
    for pair in range(n // 2):
        for word in range(runs // 2):
            value = 0
            for block in range(4):
                code = int(codes[2 * pair + block % 2, 2 * word + block // 2])
                value |= (code >> 8) << 8 * block
                for bit, weight in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                    value |= (code >> weight & 1) << (32 + 4 * bit + block)
            words.append(value - (1 << 64) if value >> 63 else value)
    tiled = torch.tensor(words).reshape(n // 16, 8, runs // 8, 4).transpose(1, 2)
    return tiled.reshape(n, runs // 4)


def test_words_are_put_together_bit_by_bit() -> None:
    codes = torch.randint(0, 1 << 16, (32, 24), generator=torch.Generator().manual_seed(0))
    assert torch.equal(pack_e8p(codes), _words(codes))


@given(n=st.integers(1, 3), k=st.integers(1, 3), seed=st.integers(0, 999))
def test_packing_is_undone(n: int, k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << 16, (16 * n, 8 * k), generator=generator)
    assert torch.equal(unpack_e8p(pack_e8p(codes)), codes)
    assert torch.equal(unpack_bytes(pack_bytes(codes & 255)), codes & 255)
    words = torch.randint(-(1 << 63), (1 << 63) - 1, (16 * n, 2 * k), generator=generator)
    assert torch.equal(pack_e8p(unpack_e8p(words)), words)
    assert torch.equal(pack_bytes(unpack_bytes(words)), words)
