"""The grouped product for few rows of each expert: :mod:`qhub_triton.tiled.few`, each tile with an expert's weights.

Only the weights of experts that have rows are read, each once while all their rows fit into a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qhub_triton.tiled.registers import entries
from qhub_triton.tiled.turns import pieces, turn

__all__ = ["grouped_few", "parts_of", "rows_of"]


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
def parts_of(
    whose, words, scales, zeros, supers, super_offset, zero_supers, stride_words, stride_groups, stride_supers,
    stride_zero_supers, NESTED: tl.constexpr,
):  # fmt: skip
    """Return where the parts of the expert ``whose`` (int64) lie, in the order of the arguments."""
    if NESTED is not None:
        super_offset += whose * (1 if NESTED[2] else 0)
    return (
        words + whose * stride_words, scales + whose * stride_groups, zeros + whose * stride_groups,
        supers + whose * stride_supers, super_offset, zero_supers + whose * stride_zero_supers,
    )  # fmt: skip


@triton.jit
def grouped_few(
    x, words, scales, zeros, table, supers, super_table, super_offset, zero_supers, bias, y,
    order, experts, starts, ends,
    E, N, K, BLOCKS, GROUPS, stride_xm, stride_words, stride_groups, stride_supers, stride_zero_supers,
    BITS: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, ZERO_POINT: tl.constexpr,
    UNIT: tl.constexpr, NESTED: tl.constexpr, ZERO_NESTED: tl.constexpr,
    HAS_BIAS: tl.constexpr, NATIVE: tl.constexpr, PER: tl.constexpr, SINGLE: tl.constexpr,
    WARPS: tl.constexpr, TALL: tl.constexpr, AHEAD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute rows of y (S, N) = x @ W[expert].T; a program: 16 * TALL columns of y, the rows of one tile, up to 8.

    Constants as in :func:`qhub_triton.tiled.few.few`, PER and SINGLE as in :func:`rows_of`. The strides are those from
    expert to expert. AHEAD: blocks that a warp reads before it multiplies; STAGES: turns whose reads are under way.
    """
    HEIGHT: tl.constexpr = 16 * TALL
    STEP: tl.constexpr = WARPS * AHEAD
    expert, source, target, valid = rows_of(order, experts, starts, ends, tl.program_id(1), E, PER, SINGLE, 8)
    if expert >= 0:
        whose = expert.to(tl.int64)
        words, scales, zeros, supers, super_offset, zero_supers = parts_of(
            whose, words, scales, zeros, supers, super_offset, zero_supers, stride_words, stride_groups, stride_supers,
            stride_zero_supers, NESTED,
        )  # fmt: skip
        n0 = tl.program_id(0) * HEIGHT
        warp = tl.arange(0, WARPS)
        p = tl.arange(0, 32)
        first = words + (n0 // 64).to(tl.int64) * BLOCKS * 2048 + (n0 % 64) * 32
        pointer = first + (warp * 2048)[None, :, None] + (tl.arange(0, 8) * 32)[:, None, None] + p[None, None, :]
        row = n0 + tl.arange(0, HEIGHT)
        acc = tl.zeros((WARPS, HEIGHT, 8), tl.float32)
        held = entries(table, KIND, BITS, NATIVE)
        rows = (x + (source * stride_xm)[:, None, None],)
        there = (valid[:, None, None],)
        for base in tl.range(0, BLOCKS, STEP, num_stages=STAGES):
            here = pieces(pointer, base, warp, BLOCKS, WARPS, TALL, AHEAD)
            acc = turn(
                acc, here, rows, there, scales, zeros, table, held, supers, super_table, super_offset, zero_supers, row,
                warp, base, K, GROUPS, BITS, KIND, GROUP, ZERO, ZERO_POINT, NESTED, ZERO_NESTED, NATIVE, WARPS, TALL,
                AHEAD, 8,
            )  # fmt: skip
        out = tl.sum(acc, axis=0) * UNIT
        if HAS_BIAS:
            out += tl.load(bias + whose * N + row, mask=row < N, other=0.0).to(tl.float32)[:, None]
        where = y + (target * N)[None, :] + row[:, None]
        tl.store(where, out.to(y.dtype.element_ty), mask=valid[None, :] & (row < N)[:, None])
