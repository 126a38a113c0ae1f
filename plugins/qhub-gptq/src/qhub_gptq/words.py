"""Strings of bits in 32-bit words, and the zeros of format v1.

A row of codes is one little-endian string of bits: code i is bits ``[b*i, b*i + b)``, cut into 32-bit words, the last
one filled up with zeros. Codes of 3 bits straddle words (values 10 and 21 of every 32). Source: gptqmodel 7.7,
``pack_block`` and ``dequantize_weight`` (gptqmodel/nn_modules/qlinear/__init__.py). :mod:`qhub.layouts.packing` keeps
the same string in bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qhub.layouts.packing import pack, packed_length, unpack

__all__ = ["bytes_to_words", "pack_zeros", "unpack_zeros", "word_count", "words_to_bytes"]

# What format v1 takes off a word of zeros: 1 in every field.
_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}


def word_count(count: int, bits: int) -> int:
    """Return how many 32-bit words hold ``count`` codes."""
    return -(-count * bits // 32)


def words_to_bytes(words: Tensor, bits: int, count: int) -> Tensor:
    """Return (N, packed_length(count)) uint8 for ``words`` (N, word_count(count)) int32."""
    return _fit(_own(words).view(torch.uint8), packed_length(count, bits)).contiguous()


def bytes_to_words(packed: Tensor, bits: int, count: int) -> Tensor:
    """Return (N, word_count(count)) int32 for ``packed`` (N, packed_length(count)) uint8."""
    return _own(_fit(packed, 4 * word_count(count, bits))).view(torch.int32)


def unpack_zeros(words: Tensor, bits: int, count: int, v1: bool) -> Tensor:
    """Return the zeros (G, count) uint8 that ``words`` (G, word_count(count)) int32 hold.

    ``v1``: the format stores zero - 1. gptqmodel takes that 1 off whole words, so a zero of 0 borrows from the next
    field; adding it to whole words gives back every zero. 3-bit fields straddle words and wrap each for itself, modulo
    8. Source: ``convert_gptq_v2_to_v1_format_module`` (gptqmodel/utils/model.py).
    """
    if v1 and bits != 3:
        words = _add(words, _ONES[bits])
    zeros = unpack(words_to_bytes(words, bits, count), bits, count)
    return (zeros + 1) & 7 if v1 and bits == 3 else zeros


def pack_zeros(zeros: Tensor, bits: int, v1: bool) -> Tensor:
    """Return the words (G, word_count(count)) int32 for ``zeros`` (G, count) uint8; undoes :func:`unpack_zeros`."""
    if v1 and bits == 3:
        # 7 more is 1 less modulo 8.
        zeros = (zeros + 7) & 7
    words = bytes_to_words(pack(zeros, bits), bits, zeros.shape[-1])
    return _add(words, -_ONES[bits]) if v1 and bits != 3 else words


def _add(words: Tensor, number: int) -> Tensor:
    """Return ``words + number`` modulo 2^32, as int32."""
    total = (words.to(torch.int64) + number) & 0xFFFFFFFF
    return torch.where(total >= 1 << 31, total - (1 << 32), total).to(torch.int32)


def _own(rows: Tensor) -> Tensor:
    """Return a copy whose strides are those of its shape: ``contiguous()`` keeps odd ones where a size is 1."""
    return torch.empty(rows.shape, dtype=rows.dtype, device=rows.device).copy_(rows)


def _fit(packed: Tensor, size: int) -> Tensor:
    """Return rows of ``size`` bytes: both paddings are zeros behind the last code, of different lengths."""
    missing = size - packed.shape[-1]
    return torch.nn.functional.pad(packed, (0, missing)) if missing > 0 else packed[..., :size]
