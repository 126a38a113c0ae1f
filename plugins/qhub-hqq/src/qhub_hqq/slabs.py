"""hqq's packing: rows of codes taken together in slabs, the first slab in the high bits. Source: hqq/core/bitpack.py.

A matrix of R rows is cut into ``n`` slabs of R/n rows, and one word holds the codes at the same place of all slabs::

    4 bits, n=2,  uint8    [slab0 slab0 slab0 slab0 slab1 slab1 slab1 slab1]
    2 bits, n=4,  uint8    [slab0 slab0 slab1 slab1 slab2 slab2 slab3 slab3]
    1 bit,  n=8,  uint8    [slab0 slab1 ... slab7]
    3 bits, n=10, int32    [0 0 | slab0 (3 bits) | slab1 | ... | slab9], R padded with zeros to a multiple of 10
    8 bits, n=1,  uint8    as it is
"""

from __future__ import annotations

import torch
from torch import Tensor

from qhub_hqq.settings import CODES_PER_WORD

__all__ = ["PACKING", "pack_slabs", "packed_rows", "unpack_slabs", "word_dtype"]

# hqq's names of the packings (Quantizer.bit_to_packing).
PACKING = {8: "8bit_u8", 4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8", 1: "1bit_u8"}


def word_dtype(bits: int) -> torch.dtype:
    """Return the dtype of the packed words."""
    return torch.int32 if bits == 3 else torch.uint8


def packed_rows(rows: int, bits: int) -> int:
    """Return how many rows of words hold ``rows`` rows of codes."""
    return -(-rows // CODES_PER_WORD[bits])


def pack_slabs(codes: Tensor, bits: int) -> Tensor:
    """Return the words (packed_rows(R), C) of ``codes`` (R, C), whole numbers in [0, 2**bits)."""
    count, dtype = CODES_PER_WORD[bits], word_dtype(bits)
    step = packed_rows(codes.shape[0], bits)
    codes = torch.nn.functional.pad(codes.to(dtype), (0, 0, 0, step * count - codes.shape[0]))
    words = torch.zeros(step, codes.shape[1], dtype=dtype, device=codes.device)
    for index, slab in enumerate(codes.split(step)):
        words |= slab << (bits * (count - 1 - index))
    return words


def unpack_slabs(words: Tensor, bits: int, rows: int) -> Tensor:
    """Return the codes (rows, C) uint8 of ``words`` (packed_rows(rows), C)."""
    count, mask = CODES_PER_WORD[bits], 2**bits - 1
    slabs = [((words >> (bits * (count - 1 - index))) & mask).to(torch.uint8) for index in range(count)]
    return torch.cat(slabs)[:rows]
