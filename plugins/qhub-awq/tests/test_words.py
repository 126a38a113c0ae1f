"""The packings, against an oracle of plain Python integers."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from qhub_awq.words import columns, columns_to_words, interleaved, rows_to_interleaved
from torch import Tensor

# What llm-awq's packer does to 32 codes along K: np.arange(32).reshape(4, 4, 2).transpose(1, 0, 2), then the same
# within each 8, evens before odds.
_PAIRS = [8 * run + 2 * pair + bit for pair in range(4) for run in range(4) for bit in range(2)]
_WITHIN = [_PAIRS[8 * run + place] for run in range(4) for place in (0, 2, 4, 6, 1, 3, 5, 7)]


def _codes(rows: int, cols: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 16, (rows, cols), generator=generator, dtype=torch.uint8)


def _word(nibbles: list[int], bits: int) -> int:
    word = sum(nibble << (4 * place) for place, nibble in enumerate(nibbles))
    return word - (1 << bits) if word >> (bits - 1) else word


@given(st.integers(1, 9), st.integers(1, 6), st.integers(0, 9999))
def test_eight_columns_share_a_word_in_awqs_order(rows: int, words: int, seed: int) -> None:
    codes = _codes(rows, 8 * words, seed)
    expected = []
    for row in codes.tolist():
        eights = [row[start : start + 8] for start in range(0, len(row), 8)]
        expected.append([_word([eight[column] for column in (0, 2, 4, 6, 1, 3, 5, 7)], 32) for eight in eights])
    packed = columns_to_words(codes)
    assert packed.dtype == torch.int32
    assert packed.tolist() == expected
    assert torch.equal(columns(packed), codes)


@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 9999))
def test_four_rows_are_interleaved_in_words_of_16_bits(quads: int, runs: int, seed: int) -> None:
    codes = _codes(4 * quads, 64 * runs, seed)
    expected = []
    for quad in range(quads):
        row = []
        for run in range(runs):
            lanes = []
            for lane in range(4):
                stretch = codes[4 * quad + lane, 64 * run : 64 * (run + 1)].tolist()
                lanes += [stretch[32 * half + place] for half in range(2) for place in _WITHIN]
            row += [_word(lanes[start : start + 4], 16) for start in range(0, 256, 4)]
        expected.append(row)
    packed = rows_to_interleaved(codes)
    assert packed.dtype == torch.int16
    assert packed.tolist() == expected
    assert torch.equal(interleaved(packed), codes)


@given(st.integers(0, 9999))
def test_transposed_tensors_pack_alike(seed: int) -> None:
    codes = _codes(64, 64, seed)
    assert torch.equal(columns_to_words(codes.t()), columns_to_words(codes.t().contiguous()))
    assert torch.equal(rows_to_interleaved(codes.t()), rows_to_interleaved(codes.t().contiguous()))
