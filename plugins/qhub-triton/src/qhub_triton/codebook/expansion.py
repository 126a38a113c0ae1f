"""Writes a codebook layout's stored matrix dense: one program a few rows, one vector of each codebook a block.

Values are those of the layout in float32, sums in the order of the codebooks, rounded once to the output's dtype. All
tables are float32 here: what a book is divided by, and folded signs, are the same operations as in torch.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["code_of", "expand_kernel", "vectors"]


@triton.jit
def code_of(codes, block, inside, START: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr, BITS: tl.constexpr):
    """Return the unsigned code that begins at byte ``START`` of each block's codes, as int32."""
    at = codes + block * STRIDE + START
    code = tl.load(at, mask=inside, other=0).to(tl.int32) & 255
    if SIZE == 2:
        code |= (tl.load(at + 1, mask=inside, other=0).to(tl.int32) & 255) << 8
    return code & ((1 << BITS) - 1)


@triton.jit
def vectors(books, code, G: tl.constexpr, SHIFT: tl.constexpr, DIVISOR: tl.constexpr):
    """Return the vectors (..., G) float32 of ``code`` (rows, blocks) from a table (entries, G).

    ``SHIFT``: of a folded book, None for one that lists every vector; see :class:`qhub.layouts.vectors.FoldedBook`.
    """
    j = tl.arange(0, G)[None, None, :]
    if SHIFT is None:
        v = tl.load(books + code[:, :, None].to(tl.int64) * G + j).to(tl.float32)
        if DIVISOR != 1.0:
            v = tl.div_rn(v, tl.full(v.shape, DIVISOR, tl.float32))
        return v
    else:
        v = tl.load(books + (code >> G)[:, :, None] * G + j).to(tl.float32)
        if DIVISOR != 1.0:
            v = tl.div_rn(v, tl.full(v.shape, DIVISOR, tl.float32))
        bits = code & ((1 << G) - 1)
        odd = bits ^ (bits >> 16)
        odd = odd ^ (odd >> 8)
        odd = odd ^ (odd >> 4)
        odd = odd ^ (odd >> 2)
        odd = (odd ^ (odd >> 1)) & 1
        negated = ((bits ^ odd)[:, :, None] >> j) & 1
        shift = SHIFT / DIVISOR
        return tl.where(negated == 1, -v, v) + tl.where(odd == 1, -shift, shift)[:, :, None]


@triton.jit
def expand_kernel(
    codes, books, scales, out, n_rows, blocks, stride_codes, stride_out, scale_rows,
    PLACES: tl.constexpr, STRIDE: tl.constexpr, NBITS: tl.constexpr, SHIFTS: tl.constexpr, DIVISORS: tl.constexpr,
    E: tl.constexpr, G: tl.constexpr, SCALED: tl.constexpr, BN: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    """Write ``out`` (N, K): the weights, times their scales where ``SCALED``; ``codes`` int8 as bytes."""
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    block = tl.program_id(0) * BB + tl.arange(0, BB)
    inside = (n < n_rows)[:, None] & (block < blocks)[None, :]
    row = codes + n.to(tl.int64)[:, None] * stride_codes
    value = tl.zeros([BN, BB, G], tl.float32)
    for c in tl.static_range(len(NBITS)):
        code = code_of(row, block[None, :], inside, PLACES[c][0], PLACES[c][1], STRIDE, NBITS[c])
        vector = vectors(books + c * E * G, code, G, SHIFTS[c], DIVISORS[c])
        value = vector if c == 0 else value + vector
    if SCALED:
        scale = tl.load(scales + n // scale_rows, mask=n < n_rows, other=0.0).to(tl.float32)
        value = value * scale[:, None, None]
    k = block[None, :, None] * G + tl.arange(0, G)[None, None, :]
    at = out + n.to(tl.int64)[:, None, None] * stride_out + k
    tl.store(at, value.to(out.dtype.element_ty), mask=inside[:, :, None] & (k >= 0))
