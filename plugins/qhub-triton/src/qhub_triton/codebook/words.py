"""Products with few rows where every vector of eight weights fits in one 32-bit word: QuIP#'s lattices.

A book whose entries are ``step * (v - zero)`` with whole v below 16 is a table of words, eight nibbles each; a folded
book is two such tables, one of rows and one of signs, xor-ed: with a row's entry 2u + 1 (in halves) and the shift as
the lowest bit of its nibble, negating the entry is a complement of the bits of u, since -(2u + 1) = 2(-u - 1) + 1.

A nibble becomes a float without conversion: put into a mantissa where it counts as 1, under the exponent of 16 or of
256, it reads 16 + v or 256 + v. What the offsets add is a sum of inputs, taken off at the end. Nibbles are rotated by
15 bits in a word, so that two of the four pairs lie in place.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["words_kernel"]


@triton.jit
def _pair(word, low, high):
    """Return (256 + low nibble) * low + (16 + high nibble) * high of the pair at bits 15 to 22 of ``word``."""
    first = ((word & 0x00078000) | 0x43800000).to(tl.float32, bitcast=True)
    second = ((word & 0x00780000) | 0x41800000).to(tl.float32, bitcast=True)
    return first * low + second * high


@triton.jit
def _dots(word, x0, x1, x2, x3, x4, x5, x6, x7):
    """Return the dot products of the eight nibbles of ``word``, offset as in :func:`_pair`, with x0 to x7."""
    total = _pair(word, x0, x1) + _pair(word >> 8, x2, x3)
    return total + _pair((word << 16) | (word >> 16), x4, x5) + _pair(word << 8, x6, x7)


@triton.jit
def words_kernel(
    x,
    codes,
    rows,
    signs,
    second,
    scales,
    out,
    n_rows,
    blocks,
    step,
    zero,
    step2,
    zero2,
    M: tl.constexpr,
    KIND: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    VEC: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Write ``out`` (M, N) float32 = x @ S.T times the scale.

    ``x``: (M, 8, K / 8) float32, entry j of each block of eight in plane j. ``codes``: by ``KIND`` 1: (N, K / 8) int16;
    2: (N, K / 8) int32, two codes of 16 bits; 3: (N, K / 8, 3) int8, a code of 16 bits and one of 8.
    """
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    live = n < n_rows
    row = tl.where(live, n, 0).to(tl.int64) * blocks
    acc = tl.zeros([BN, BK], tl.float32)
    acc2 = tl.zeros([BN, BK], tl.float32)
    sums = tl.zeros([BK], tl.float32)
    plain = tl.zeros([BK], tl.float32)
    for start in range(0, blocks, BK):
        k = start + tl.max_contiguous(tl.arange(0, BK), VEC)
        inside = k < blocks
        at = row[:, None] + k[None, :]
        if KIND == 3:
            if EVEN:
                low = tl.load(codes + at * 3).to(tl.int32) & 255
                high = tl.load(codes + at * 3 + 1).to(tl.int32) & 255
                other = tl.load(codes + at * 3 + 2).to(tl.int32) & 255
            else:
                low = tl.load(codes + at * 3, mask=inside[None, :], other=0).to(tl.int32) & 255
                high = tl.load(codes + at * 3 + 1, mask=inside[None, :], other=0).to(tl.int32) & 255
                other = tl.load(codes + at * 3 + 2, mask=inside[None, :], other=0).to(tl.int32) & 255
        else:
            if EVEN:
                code = tl.load(codes + at).to(tl.int32)
            else:
                code = tl.load(codes + at, mask=inside[None, :], other=0).to(tl.int32)
            low = code & 255
            high = (code >> 8) & 255
            other = (code >> 16) & 0xFFFF
        plane = x + k
        if EVEN:
            x0 = tl.load(plane)
            x1 = tl.load(plane + blocks)
            x2 = tl.load(plane + 2 * blocks)
            x3 = tl.load(plane + 3 * blocks)
            x4 = tl.load(plane + 4 * blocks)
            x5 = tl.load(plane + 5 * blocks)
            x6 = tl.load(plane + 6 * blocks)
            x7 = tl.load(plane + 7 * blocks)
        else:
            x0 = tl.load(plane, mask=inside, other=0.0)
            x1 = tl.load(plane + blocks, mask=inside, other=0.0)
            x2 = tl.load(plane + 2 * blocks, mask=inside, other=0.0)
            x3 = tl.load(plane + 3 * blocks, mask=inside, other=0.0)
            x4 = tl.load(plane + 4 * blocks, mask=inside, other=0.0)
            x5 = tl.load(plane + 5 * blocks, mask=inside, other=0.0)
            x6 = tl.load(plane + 6 * blocks, mask=inside, other=0.0)
            x7 = tl.load(plane + 7 * blocks, mask=inside, other=0.0)
        evens = (x0 + x2) + (x4 + x6)
        odds = (x1 + x3) + (x5 + x7)
        sums += 256.0 * evens + 16.0 * odds
        plain += evens + odds
        word = (tl.load(rows + high) ^ tl.load(signs + low)).to(tl.uint32, bitcast=True)
        acc += _dots(
            word,
            x0[None, :],
            x1[None, :],
            x2[None, :],
            x3[None, :],
            x4[None, :],
            x5[None, :],
            x6[None, :],
            x7[None, :],
        )
        if KIND > 1:
            if KIND == 2:
                extra = tl.load(second + (other >> 8)) ^ tl.load(signs + (other & 255))
            else:
                extra = tl.load(second + other)
            acc2 += _dots(
                extra.to(tl.uint32, bitcast=True),
                x0[None, :],
                x1[None, :],
                x2[None, :],
                x3[None, :],
                x4[None, :],
                x5[None, :],
                x6[None, :],
                x7[None, :],
            )
    offset = tl.sum(sums, 0)
    total = tl.sum(plain, 0)
    y = step * (tl.sum(acc, 1) - (offset + zero * total))
    if KIND > 1:
        y += step2 * (tl.sum(acc2, 1) - (offset + zero2 * total))
    tl.store(out + n, y * tl.load(scales).to(tl.float32), mask=live)
