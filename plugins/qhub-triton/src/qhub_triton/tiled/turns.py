"""One turn of the product for few rows: blocks of weights that were read, times the input, sums under their scales.

The order of K within a slice of 32 weights is that in which 16 bytes of a row are one lane's share of a matrix
fragment; codes and input are brought into it alike.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qhub_triton.tiled.banks import in_banks
from qhub_triton.tiled.decode import INTEGER, numbers, offset_of, ones
from qhub_triton.tiled.groups import group_scales, group_zeros, run_of
from qhub_triton.tiled.registers import by_instructions, looked_up

__all__ = ["fragments", "inputs", "pieces", "turn", "words"]


@triton.jit
def fragments(t, ROWS: tl.constexpr, WARPS: tl.constexpr):
    """Return (WARPS, ROWS, 32) in the order of K in which 16 bytes are one lane's share of a matrix fragment."""
    return t.reshape(WARPS, ROWS, 4, 2, 4).permute(0, 1, 3, 2, 4).reshape(WARPS, ROWS, 32)


@triton.jit
def pieces(pointer, base, warp, BLOCKS, WARPS: tl.constexpr, TALL: tl.constexpr, AHEAD: tl.constexpr):
    """Return the words of AHEAD blocks for each warp from ``base`` on, in pieces (8, WARPS, 32) of eight rows."""
    read = ()
    for i in tl.static_range(AHEAD):
        known = (base + i * WARPS + warp < BLOCKS)[None, :, None]
        for piece in tl.static_range(2 * TALL):
            read = read + (tl.load(pointer + (base + i * WARPS) * 2048 + piece * 256, mask=known, other=0),)
    return read


@triton.jit
def words(read, i: tl.constexpr, WARPS: tl.constexpr, TALL: tl.constexpr):
    """Return the words (WARPS, 16 * TALL, 32) of the block ``i`` of what :func:`pieces` read.

    Put together here, and not where they are read: the compiler looks for it between loop and product.
    """
    if TALL == 1:
        return tl.join(read[2 * i], read[2 * i + 1]).permute(1, 3, 0, 2).reshape(WARPS, 16, 32)
    else:
        both = tl.join(tl.join(read[4 * i], read[4 * i + 1]), tl.join(read[4 * i + 2], read[4 * i + 3]))
        return both.permute(1, 4, 3, 0, 2).reshape(WARPS, 32, 32)


@triton.jit
def inputs(rows, valid, k, K, WARPS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Return x (WARPS, BLOCK_M, 32) of the columns from ``k`` (WARPS,) on, eight rows a load.

    ``rows``, ``valid``: for each eight rows where they begin, and which there are, (8, 1, 1).
    """
    p = k[None, :, None] + tl.arange(0, 32)[None, None, :]
    a = tl.load(rows[0] + p, mask=valid[0] & (p < K), other=0.0)
    if BLOCK_M == 8:
        return a.permute(1, 0, 2)
    else:
        b = tl.load(rows[1] + p, mask=valid[1] & (p < K), other=0.0)
        if BLOCK_M == 16:
            return tl.join(a, b).permute(1, 3, 0, 2).reshape(WARPS, 16, 32)
        else:
            c = tl.load(rows[2] + p, mask=valid[2] & (p < K), other=0.0)
            d = tl.load(rows[3] + p, mask=valid[3] & (p < K), other=0.0)
            both = tl.join(tl.join(a, b), tl.join(c, d))
            return both.permute(1, 4, 3, 0, 2).reshape(WARPS, 32, 32)


@triton.jit
def _halves(row, TALL: tl.constexpr):
    """Return the first and the second 16 of 32 rows; all 16, twice."""
    if TALL == 1:
        return row, row
    else:
        return tl.split(row.reshape(2, 16).trans(1, 0))


@triton.jit
def _whole(upper, lower):
    """Return (WARPS, 32) from two halves (WARPS, 16).

    Read in halves, scales are so few that each thread reads those it needs; whole, they would be read once and handed
    round through shared memory, with a barrier at every turn.
    """
    return tl.join(upper, lower).permute(0, 2, 1).reshape(upper.shape[0], 32)


@triton.jit
def turn(
    acc, read, rows, valid, scales, zeros, table, held, supers, super_table, super_offset, zero_supers, row, warp,
    base, K, GROUPS,
    BITS: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, ZERO_POINT: tl.constexpr,
    NESTED: tl.constexpr, ZERO_NESTED: tl.constexpr, NATIVE: tl.constexpr,
    WARPS: tl.constexpr, TALL: tl.constexpr, AHEAD: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Return ``acc`` (WARPS, 16 * TALL, BLOCK_M) plus the products of the blocks ``read`` by :func:`pieces`.

    ``rows``, ``valid``: see :func:`inputs`. ``held``: a table's bytes, of :func:`qhub_triton.tiled.registers.entries`;
    nothing where a table has been written to shared memory (:func:`qhub_triton.tiled.banks.write_banks`).
    """
    P: tl.constexpr = 16 // BITS
    DTYPE: tl.constexpr = rows[0].dtype.element_ty
    WIDE: tl.constexpr = BITS == 8 and KIND == INTEGER and DTYPE == tl.bfloat16
    # Slices of one block whose weights share their scales.
    RUN: tl.constexpr = run_of(P, GROUP)
    HEIGHT: tl.constexpr = 16 * TALL
    OFFSET: tl.constexpr = offset_of(KIND, BITS, DTYPE == tl.float16, NATIVE) * (17 if WIDE else 1)
    for i in tl.static_range(AHEAD):
        block = base + i * WARPS + warp
        codes = fragments(words(read, i, WARPS, TALL), HEIGHT, WARPS)
        if len(held) > 0:
            picked = looked_up(codes, held, DTYPE)
        for run in tl.static_range(P // RUN):
            d = tl.zeros((WARPS, HEIGHT, BLOCK_M), tl.float32)
            e = tl.zeros((WARPS, HEIGHT, BLOCK_M), tl.float32)
            sums = tl.zeros((WARPS, HEIGHT, BLOCK_M), tl.float32)
            for place in tl.static_range(run * RUN, run * RUN + RUN):
                k = (block * P + place) * 32
                xv = inputs(rows, valid, k, K, WARPS, BLOCK_M)
                xv = fragments(xv, BLOCK_M, WARPS).permute(0, 2, 1)
                if WIDE:
                    d = tl.dot(numbers(codes, table, place, BITS, KIND, DTYPE, NATIVE, 0), xv, d)
                    e = tl.dot(numbers(codes, table, place, BITS, KIND, DTYPE, NATIVE, 1), xv, e)
                elif len(held) > 0:
                    d = tl.dot(picked[place], xv, d)
                elif by_instructions(KIND, BITS, NATIVE):
                    d = tl.dot(in_banks(codes, place, DTYPE), xv, d)
                else:
                    d = tl.dot(numbers(codes, table, place, BITS, KIND, DTYPE, NATIVE), xv, d)
                if KIND == INTEGER:
                    sums = tl.dot(ones(WARPS, HEIGHT, DTYPE), xv, sums)
            if WIDE:
                d += 16.0 * e
            group = (block * P + run * RUN) * 32 // GROUP
            known = (group < GROUPS)[:, None]
            upper, lower = _halves(row, TALL)
            scale = group_scales(scales, supers, super_table, super_offset, upper, group, GROUPS, known, NESTED)
            if TALL == 2:
                below = group_scales(scales, supers, super_table, super_offset, lower, group, GROUPS, known, NESTED)
                scale = _whole(scale, below)
            scale = scale[:, :, None]
            if KIND != INTEGER:
                acc += scale * d
            elif ZERO == 0:
                acc += scale * (d - (OFFSET + ZERO_POINT) * sums)
            else:
                zero = group_zeros(zeros, zero_supers, upper, group, GROUPS, known, ZERO_NESTED)
                if TALL == 2:
                    below = group_zeros(zeros, zero_supers, lower, group, GROUPS, known, ZERO_NESTED)
                    zero = _whole(zero, below)
                zero = zero[:, :, None]
                if ZERO == 1:
                    acc += scale * (d - (OFFSET + zero) * sums)
                else:
                    acc += scale * (d - (OFFSET + ZERO_POINT) * sums) + zero * sums
    return acc
