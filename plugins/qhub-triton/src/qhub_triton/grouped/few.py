"""The grouped product for few rows of each expert: :mod:`qhub_triton.tiled.few`, each tile with an expert's weights.

Only the weights of experts that have rows are read, each once while all their rows fit into a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qhub_triton.dense.decode import float8_value
from qhub_triton.dense.registers import looked_up, table_bytes
from qhub_triton.tiled.decode import INTEGER, TABLE, numbers, offset_of
from qhub_triton.tiled.groups import group_scales, group_zeros, run_of

__all__ = ["grouped_few", "rows_of", "scales_of"]


@triton.jit
def rows_of(order, experts, starts, ends, tile, E, PER: tl.constexpr, SINGLE: tl.constexpr, BLOCK_M: tl.constexpr):
    """Return the expert of a tile (-1: none), where its rows lie in x and in y (BLOCK_M,) int64, and which there are.

    PER: pairs that share a row of x, which is in the order of the tokens; 0: x is in the order of y.
    """
    expert = tl.load(experts + tile).to(tl.int32)
    expert = tl.where((expert < 0) | (expert >= E), -1, expert)
    m = tl.arange(0, BLOCK_M)
    if SINGLE:
        target = (tile + m).to(tl.int64)
        known = m < 1
        source = target
        if PER > 0:
            source = target // PER
    else:
        target = (tl.load(starts + tile) + m).to(tl.int64)
        known = target < tl.load(ends + tile)
        source = target
        if PER > 0:
            source = (tl.load(order + target, mask=known, other=0) // PER).to(tl.int64)
    return expert, source, target, known


@triton.jit
def scales_of(
    scales, supers, table, offset, row, group, GROUPS, known, NESTED: tl.constexpr, POWERS: tl.constexpr
):  # fmt: skip
    """Return the scales (len(group), len(row)) float32; POWERS: they are powers of two, held as their exponents."""
    if POWERS:
        place = ((row // 64)[None, :] * GROUPS + group[:, None]) * 64 + (row % 64)[None, :]
        code = tl.load(scales + place, mask=known, other=0).to(tl.int32)
        return tl.where(known, float8_value(code, "e8m0fnu"), 0.0)
    else:
        return group_scales(scales, supers, table, offset, row, group, GROUPS, known, NESTED)


@triton.jit
def _fragments(t, ROWS: tl.constexpr, WARPS: tl.constexpr):
    return t.reshape(WARPS, ROWS, 4, 2, 4).permute(0, 1, 3, 2, 4).reshape(WARPS, ROWS, 32)


@triton.jit
def _pieces(pointer, base, warp, BLOCKS, WARPS: tl.constexpr, TALL: tl.constexpr, AHEAD: tl.constexpr):
    read = ()
    for i in tl.static_range(AHEAD):
        known = (base + i * WARPS + warp < BLOCKS)[None, :, None]
        for piece in tl.static_range(2 * TALL):
            read = read + (tl.load(pointer + (base + i * WARPS) * 2048 + piece * 256, mask=known, other=0),)
    return read


@triton.jit
def _words(pieces, i: tl.constexpr, WARPS: tl.constexpr, TALL: tl.constexpr):
    if TALL == 1:
        return tl.join(pieces[2 * i], pieces[2 * i + 1]).permute(1, 3, 0, 2).reshape(WARPS, 16, 32)
    else:
        both = tl.join(tl.join(pieces[4 * i], pieces[4 * i + 1]), tl.join(pieces[4 * i + 2], pieces[4 * i + 3]))
        return both.permute(1, 4, 3, 0, 2).reshape(WARPS, 32, 32)


@triton.jit
def _ones(WARPS: tl.constexpr, ROWS: tl.constexpr, DTYPE: tl.constexpr):
    # Joined from halves, as the words are: the compiler then gives both operands of a product the same order.
    half = tl.full((WARPS, ROWS // 2, 32), 1.0, tl.float32).to(DTYPE)
    return tl.join(half, half).permute(0, 3, 1, 2).reshape(WARPS, ROWS, 32)


@triton.jit
def grouped_few(
    x, words, scales, zeros, table, supers, super_table, super_offset, zero_supers, bias, y,
    order, experts, starts, ends,
    E, N, K, BLOCKS, GROUPS, stride_xm, stride_words, stride_groups, stride_supers, stride_zero_supers,
    BITS: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, ZERO_POINT: tl.constexpr,
    UNIT: tl.constexpr, NESTED: tl.constexpr, ZERO_NESTED: tl.constexpr, POWERS: tl.constexpr,
    HAS_BIAS: tl.constexpr, NATIVE: tl.constexpr, PER: tl.constexpr, SINGLE: tl.constexpr,
    WARPS: tl.constexpr, TALL: tl.constexpr, AHEAD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute rows of y (S, N) = x @ W[expert].T; a program: 16 * TALL columns of y, the rows of one tile, up to 8.

    Constants as in :func:`qhub_triton.tiled.few.few`, PER and SINGLE as in :func:`rows_of`. The strides are those from
    expert to expert. AHEAD: blocks that a warp reads before it multiplies; STAGES: turns whose reads are under way.
    """
    P: tl.constexpr = 16 // BITS
    WIDE: tl.constexpr = BITS == 8 and KIND == INTEGER and x.dtype.element_ty == tl.bfloat16
    RUN: tl.constexpr = run_of(P, GROUP)
    HEIGHT: tl.constexpr = 16 * TALL
    STEP: tl.constexpr = WARPS * AHEAD
    DTYPE: tl.constexpr = x.dtype.element_ty
    # Tables of 16 numbers are held in registers.
    PICKED: tl.constexpr = NATIVE and KIND == TABLE and BITS == 4
    OFFSET: tl.constexpr = offset_of(KIND, BITS, DTYPE == tl.float16, NATIVE) * (17 if WIDE else 1)
    expert, source, target, valid = rows_of(order, experts, starts, ends, tl.program_id(1), E, PER, SINGLE, 8)
    if expert >= 0:
        whose = expert.to(tl.int64)
        words += whose * stride_words
        scales += whose * stride_groups
        zeros += whose * stride_groups
        supers += whose * stride_supers
        zero_supers += whose * stride_zero_supers
        if NESTED is not None:
            super_offset += whose * (1 if NESTED[2] else 0)
        n0 = tl.program_id(0) * HEIGHT
        warp = tl.arange(0, WARPS)
        p = tl.arange(0, 32)
        first = words + (n0 // 64).to(tl.int64) * BLOCKS * 2048 + (n0 % 64) * 32
        pointer = first + (warp * 2048)[None, :, None] + (tl.arange(0, 8) * 32)[:, None, None] + p[None, None, :]
        row = n0 + tl.arange(0, HEIGHT)
        acc = tl.zeros((WARPS, HEIGHT, 8), tl.float32)
        if PICKED:
            table_of = table_bytes(table, DTYPE)
        from_rows = x + (source * stride_xm)[:, None, None] + p[None, None, :]
        for base in tl.range(0, BLOCKS, STEP, num_stages=STAGES):
            here = _pieces(pointer, base, warp, BLOCKS, WARPS, TALL, AHEAD)
            for i in tl.static_range(AHEAD):
                block = base + i * WARPS + warp
                codes = _fragments(_words(here, i, WARPS, TALL), HEIGHT, WARPS)
                if PICKED:
                    picked = looked_up(codes, table_of, DTYPE)
                for run in tl.static_range(P // RUN):
                    d = tl.zeros((WARPS, HEIGHT, 8), tl.float32)
                    e = tl.zeros((WARPS, HEIGHT, 8), tl.float32)
                    sums = tl.zeros((WARPS, HEIGHT, 8), tl.float32)
                    for place in tl.static_range(run * RUN, run * RUN + RUN):
                        k = (block * P + place) * 32
                        inside = valid[:, None, None] & (k[None, :, None] + p[None, None, :] < K)
                        xv = tl.load(from_rows + k[None, :, None], mask=inside, other=0.0).permute(1, 0, 2)
                        xv = _fragments(xv, 8, WARPS).permute(0, 2, 1)
                        if WIDE:
                            d = tl.dot(numbers(codes, table, place, BITS, KIND, DTYPE, NATIVE, 0), xv, d)
                            e = tl.dot(numbers(codes, table, place, BITS, KIND, DTYPE, NATIVE, 1), xv, e)
                        elif PICKED:
                            d = tl.dot(picked[place], xv, d)
                        else:
                            d = tl.dot(numbers(codes, table, place, BITS, KIND, DTYPE, NATIVE), xv, d)
                        if KIND == INTEGER:
                            sums = tl.dot(_ones(WARPS, HEIGHT, DTYPE), xv, sums)
                    if WIDE:
                        d += 16.0 * e
                    group = (block * P + run * RUN) * 32 // GROUP
                    known = (group < GROUPS)[:, None]
                    scale = scales_of(
                        scales, supers, super_table, super_offset, row, group, GROUPS, known, NESTED, POWERS
                    )[:, :, None]  # fmt: skip
                    if KIND != INTEGER:
                        acc += scale * d
                    elif ZERO == 0:
                        acc += scale * (d - (OFFSET + ZERO_POINT) * sums)
                    else:
                        zero = group_zeros(zeros, zero_supers, row, group, GROUPS, known, ZERO_NESTED)[:, :, None]
                        if ZERO == 1:
                            acc += scale * (d - (OFFSET + zero) * sums)
                        else:
                            acc += scale * (d - (OFFSET + ZERO_POINT) * sums) + zero * sums
        out = tl.sum(acc, axis=0) * UNIT
        if HAS_BIAS:
            out += tl.load(bias + whose * N + row, mask=row < N, other=0.0).to(tl.float32)[:, None]
        where = y + (target * N)[None, :] + row[:, None]
        tl.store(where, out.to(y.dtype.element_ty), mask=valid[None, :] & (row < N)[:, None])
