"""Strings of bits in 32-bit words.

A row of codes is one little-endian string of bits: code i is bits ``[b*i, b*i + b)``, cut into 32-bit words, the last
one filled up with zeros; codes may straddle words. Source: compressed-tensors 0.20, ``pack_to_int32``
(compressed_tensors/compressors/pack_quantized/helpers.py). Older versions (0.11 is one) put ``32 // b`` codes into each
word and left the rest of it empty, which is the same for 1, 2, 4 and 8 bits.
:mod:`qhub.layouts.packing` keeps the same string in bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qhub.layouts.packing import pack, packed_length, unpack

__all__ = ["codes_of_words", "old_word_count", "word_count", "words_of_codes"]


def word_count(count: int, bits: int) -> int:
    """Return how many 32-bit words hold ``count`` codes."""
    return -(-count * bits // 32)


def old_word_count(count: int, bits: int) -> int:
    """Return how many words held them in older versions."""
    return -(-count // (32 // bits))


def codes_of_words(words: Tensor, bits: int, count: int) -> Tensor:
    """Return the codes (N, count) uint8 in ``words`` (N, word_count or old_word_count) int32.

    For widths that divide no word the number of words tells which packing it is; where both need as many, the present
    one is taken.
    """
    if words.shape[-1] != word_count(count, bits):
        per_word = 32 // bits
        shifts = torch.arange(per_word, dtype=torch.int32, device=words.device) * bits
        fields = (words.unsqueeze(-1) >> shifts) & (2**bits - 1)
        return fields.to(torch.uint8).flatten(-2)[..., :count].contiguous()
    return unpack(_own(_fit(_own(words).view(torch.uint8), packed_length(count, bits))), bits, count)


def words_of_codes(codes: Tensor, bits: int) -> Tensor:
    """Return the words (N, word_count) int32 of ``codes`` (N, count) uint8."""
    return _own(_fit(pack(codes, bits), 4 * word_count(codes.shape[-1], bits))).view(torch.int32)


def _own(rows: Tensor) -> Tensor:
    """Return a copy whose strides are those of its shape: ``contiguous()`` keeps odd ones where a size is 1."""
    return torch.empty(rows.shape, dtype=rows.dtype, device=rows.device).copy_(rows)


def _fit(packed: Tensor, size: int) -> Tensor:
    """Return rows of ``size`` bytes: both paddings are zeros behind the last code, of different lengths."""
    missing = size - packed.shape[-1]
    return torch.nn.functional.pad(packed, (0, missing)) if missing > 0 else packed[..., :size]
