"""Words of zeros and codes, against an oracle of plain Python integers; the borrow of format v1."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from qhub_gptq.words import bytes_to_words, pack_zeros, unpack_zeros, word_count, words_to_bytes

from qhub.layouts.packing import pack, unpack

BITS = (2, 3, 4, 8)
ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}


def _words(codes: list[int], bits: int) -> list[int]:
    """Return the 32-bit words of one row, unsigned: one long little-endian integer, cut up."""
    whole = sum(code << (bits * place) for place, code in enumerate(codes))
    return [(whole >> (32 * index)) & 0xFFFFFFFF for index in range(-(-len(codes) * bits // 32))]


def _signed(words: list[int]) -> list[int]:
    return [word - (1 << 32) if word >> 31 else word for word in words]


def _rows(bits: int) -> st.SearchStrategy[list[list[int]]]:
    widths = st.integers(1, 70)
    return widths.flatmap(
        lambda n: st.lists(st.lists(st.integers(0, 2**bits - 1), min_size=n, max_size=n), min_size=1, max_size=3)
    )


CASES = st.sampled_from(BITS).flatmap(lambda bits: st.tuples(st.just(bits), _rows(bits)))


@given(CASES)
def test_words_are_one_string_of_bits(case: tuple[int, list[list[int]]]) -> None:
    bits, rows = case
    count = len(rows[0])
    codes = torch.tensor(rows, dtype=torch.uint8)
    words = bytes_to_words(pack(codes, bits), bits, count)
    assert words.dtype == torch.int32
    assert words.tolist() == [_signed(_words(row, bits)) for row in rows]
    assert words.shape[1] == word_count(count, bits)
    assert torch.equal(unpack(words_to_bytes(words, bits, count), bits, count), codes)


@given(CASES)
def test_zeros_of_v2_are_stored_as_they_are(case: tuple[int, list[list[int]]]) -> None:
    bits, rows = case
    zeros = torch.tensor(rows, dtype=torch.uint8)
    words = pack_zeros(zeros, bits, v1=False)
    assert words.tolist() == [_signed(_words(row, bits)) for row in rows]
    assert torch.equal(unpack_zeros(words, bits, zeros.shape[1], v1=False), zeros)


@given(CASES)
def test_zeros_of_v1_lose_one_per_word_with_borrows(case: tuple[int, list[list[int]]]) -> None:
    """One subtraction per word; in 3 bits, whose fields straddle words, one per field, modulo 8."""
    bits, rows = case
    zeros = torch.tensor(rows, dtype=torch.uint8)
    words = pack_zeros(zeros, bits, v1=True)
    if bits == 3:
        expected = [_words([(zero - 1) % 8 for zero in row], 3) for row in rows]
    else:
        expected = [[(word - ONES[bits]) % 2**32 for word in _words(row, bits)] for row in rows]
    assert words.tolist() == [_signed(row) for row in expected]
    assert torch.equal(unpack_zeros(words, bits, zeros.shape[1], v1=True), zeros)


@pytest.mark.parametrize(
    ("bits", "zeros"),
    [(4, [5, 0, 7, 15, 0, 0, 1, 9]), (2, [0, 1, 3, 0] * 4), (8, [17, 0, 128, 255]), (4, [0] * 8)],
)
def test_adding_one_per_field_gives_other_zeros(bits: int, zeros: list[int]) -> None:
    """The trap: a zero of 0 borrows from the next field, so the fields of a word are not zero - 1 one by one."""
    (word,) = (w - ONES[bits] & 0xFFFFFFFF for w in _words(zeros, bits))
    stored = torch.tensor([_signed([word])], dtype=torch.int32)
    assert unpack_zeros(stored, bits, len(zeros), v1=True).tolist() == [zeros]
    mask = 2**bits - 1
    per_field = [((word >> (bits * place)) + 1) & mask for place in range(len(zeros))]
    assert per_field != zeros


def test_the_checkpoint_of_the_borrow_test_holds_such_zeros(borrowing: Any) -> None:
    """gptqmodel's own file: read field by field, its zeros come out wrong, and so do the weights."""
    n = borrowing.dequantized.shape[0]
    layout, parts = borrowing.format.unpack(borrowing.layout, borrowing.entries)
    right = parts["zeros"]
    fields = unpack_zeros(borrowing.entries["qzeros"], 4, n, v1=False)
    per_field = ((fields + 1) & 15).t().contiguous()
    assert bool((right == 0).any())
    assert not torch.equal(per_field, right)
    wrong = layout.dequantize({**parts, "zeros": per_field}).half()
    assert torch.equal(layout.dequantize(parts).half(), borrowing.dequantized)
    assert not torch.equal(wrong, borrowing.dequantized)
