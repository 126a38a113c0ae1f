"""AWQ's packings of 4-bit codes, to and from (N, K) codes of one byte each.

Columns in words of 32 bits (gemm): eight neighbouring columns share a word; nibble i, counted from the low end, holds
column ``ORDER[i]`` of the eight. Source: ``WQLinear_GEMM.from_linear`` of autoawq 0.2.9 (awq/modules/linear/gemm.py).

Rows in words of 16 bits (gemv_fast, llm-awq): codes are permuted along K and four rows are interleaved. Source:
``pack_intweight`` of llm-awq (awq/quantize/qmodule.py) and of autoawq 0.2.9 (awq/modules/linear/gemv_fast.py).

:mod:`qhub.layouts.packing` keeps codes as nibbles along K, low one first: what gemv stores as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qhub.layouts.packing import pack, unpack

__all__ = ["LANES", "ORDER", "STRIDE", "columns", "columns_to_words", "interleaved", "rows_to_interleaved"]

# Which of eight columns each nibble of a word holds: even ones in the low half, so that a GPU unpacks pairs.
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
# Rows that are interleaved, and the run of K that is contiguous before the next row's.
LANES, STRIDE = 4, 64


def columns(words: Tensor) -> Tensor:
    """Return the codes (R, 8*C) uint8 of ``words`` (R, C) int32."""
    nibbles = unpack(_own(words).view(torch.uint8), 4, 8 * words.shape[1])
    inverse = torch.tensor([ORDER.index(column) for column in range(8)], device=words.device)
    return nibbles.unflatten(-1, (-1, 8)).index_select(-1, inverse).flatten(-2)


def columns_to_words(codes: Tensor) -> Tensor:
    """Return the words (R, C/8) int32 of ``codes`` (R, C), C a multiple of 8; undoes :func:`columns`."""
    order = torch.tensor(ORDER, device=codes.device)
    nibbles = codes.unflatten(-1, (-1, 8)).index_select(-1, order).flatten(-2)
    return _own(pack(nibbles, 4)).view(torch.int32)


def interleaved(words: Tensor) -> Tensor:
    """Return the codes (4*R, K) uint8 of ``words`` (R, K) int16."""
    rows, k = words.shape
    nibbles = unpack(_own(words).view(torch.uint8), 4, LANES * k)
    lanes = nibbles.reshape(rows, k // STRIDE, LANES, STRIDE).transpose(1, 2).reshape(LANES * rows, k)
    # Per 8: evens before odds; per 32: pairs of four runs of 8 in turn. Both undone, the last one first.
    pairs = lanes.reshape(-1, k // 8, 2, 4).transpose(-1, -2)
    return pairs.reshape(-1, k // 32, 4, 4, 2).transpose(2, 3).reshape(LANES * rows, k)


def rows_to_interleaved(codes: Tensor) -> Tensor:
    """Return the words (N/4, K) int16 of ``codes`` (N, K), N a multiple of 4, K of 64; undoes :func:`interleaved`."""
    n, k = codes.shape
    runs = codes.reshape(n, k // 32, 4, 4, 2).transpose(2, 3).reshape(n, k // 8, 4, 2)
    lanes = runs.transpose(-1, -2).reshape(n // LANES, LANES, k // STRIDE, STRIDE).transpose(1, 2)
    return _own(pack(lanes.reshape(n // LANES, LANES * k), 4)).view(torch.int16)


def _own(rows: Tensor) -> Tensor:
    """Return a copy whose strides are those of its shape: ``contiguous()`` keeps odd ones where a size is 1."""
    return torch.empty(rows.shape, dtype=rows.dtype, device=rows.device).copy_(rows)
