"""hqq's packing, against an oracle of plain Python integers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from qhub_hqq.slabs import pack_slabs, packed_rows, unpack_slabs, word_dtype

PER_WORD = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}


@given(
    bits=st.sampled_from(sorted(PER_WORD)),
    slabs=st.integers(1, 5),
    columns=st.integers(1, 7),
    seed=st.integers(0, 999),
    cut=st.integers(0, 9),
)
def test_words_hold_one_code_of_each_slab_the_first_in_the_high_bits(
    bits: int, slabs: int, columns: int, seed: int, cut: int
) -> None:
    count = PER_WORD[bits]
    # Only 3-bit codes are padded.
    rows = max(1, slabs * count - cut) if bits == 3 else slabs * count
    codes = torch.randint(0, 2**bits, (rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    words = pack_slabs(codes, bits)
    step = packed_rows(rows, bits)
    assert words.dtype == word_dtype(bits)
    assert tuple(words.shape) == (step, columns)
    for row in range(step):
        for column in range(columns):
            word = 0
            for slab in range(count):
                place = slab * step + row
                word = word << bits | (int(codes[place, column]) if place < rows else 0)
            assert int(words[row, column]) == word
    assert torch.equal(unpack_slabs(words, bits, rows), codes)


@pytest.mark.parametrize("bits", sorted(PER_WORD))
def test_every_code_survives(bits: int) -> None:
    codes = torch.arange(2**bits, dtype=torch.uint8).repeat(PER_WORD[bits] * 3)[:, None].repeat(1, 2)
    assert torch.equal(unpack_slabs(pack_slabs(codes, bits), bits, codes.shape[0]), codes)
