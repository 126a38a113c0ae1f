"""The grouped product for many rows: :mod:`qhub_triton.tiled.many`, each tile with the weights of an expert."""

from __future__ import annotations

import triton
import triton.language as tl

from qhub_triton.grouped.few import parts_of, rows_of
from qhub_triton.tiled.groups import run_of
from qhub_triton.tiled.operands import block_product, depth_of, factors, unit_of
from qhub_triton.tiled.registers import by_instructions, entries, looked_up

__all__ = ["grouped_many"]


@triton.jit
def grouped_many(
    x, words, scales, zeros, table, supers, super_table, super_offset, zero_supers, bias, y,
    order, experts, starts, ends,
    E, N, K, BLOCKS, GROUPS, stride_xm, stride_words, stride_groups, stride_supers, stride_zero_supers,
    BITS: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, ZERO_POINT: tl.constexpr,
    UNIT: tl.constexpr, NESTED: tl.constexpr, ZERO_NESTED: tl.constexpr,
    HAS_BIAS: tl.constexpr, NATIVE: tl.constexpr, PER: tl.constexpr, SINGLE: tl.constexpr,
    WHOLE: tl.constexpr, STAGES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Compute rows of y (S, N) = x @ W[expert].T; a program: BLOCK_N columns of y, the rows of one tile.

    EARLY: weights are scaled before the product, and rounded to x's dtype as dense ones are; one sum then does for all
    groups. Other constants as in :func:`qhub_triton.tiled.many.many` and :func:`qhub_triton.grouped.few.grouped_few`.
    """
    P: tl.constexpr = 16 // BITS
    RUN: tl.constexpr = run_of(P, GROUP)
    DTYPE: tl.constexpr = x.dtype.element_ty
    PAIRED: tl.constexpr = EARLY and NESTED is None and scales.dtype.element_ty.primitive_bitwidth == 16
    tl.assume(BLOCKS > 0)
    expert, source, target, valid = rows_of(order, experts, starts, ends, tl.program_id(1), E, PER, SINGLE, BLOCK_M)
    if expert >= 0:
        whose = expert.to(tl.int64)
        words, scales, zeros, supers, super_offset, zero_supers = parts_of(
            whose, words, scales, zeros, supers, super_offset, zero_supers, stride_words, stride_groups, stride_supers,
            stride_zero_supers, NESTED,
        )  # fmt: skip
        row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        p = tl.arange(0, 32)
        # Rows past the last tile are read from the last one, and not stored.
        held = tl.minimum(row // 64, (N - 1) // 64)
        pointer = words + (held.to(tl.int64) * BLOCKS)[:, None] * 2048 + (row % 64)[:, None] * 32 + p[None, :]
        from_rows = x + (source * stride_xm)[None, :] + tl.arange(0, depth_of(EARLY, BITS))[:, None]
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        kept = entries(table, KIND, BITS, NATIVE)
        for block in tl.range(0, BLOCKS, num_stages=STAGES):
            codes = tl.load(pointer)
            picked = ()
            if by_instructions(KIND, BITS, NATIVE):
                picked = looked_up(codes, kept, DTYPE)
            now = factors(
                scales, zeros, supers, super_table, super_offset, zero_supers, tl.program_id(0) * BLOCK_N, row, block,
                N, GROUPS, P, RUN, GROUP, ZERO, ZERO_POINT, NESTED, ZERO_NESTED, PAIRED,
            )  # fmt: skip
            acc = block_product(
                acc, codes, picked, table, now, from_rows, valid, block, K, BITS, KIND, GROUP, ZERO, ZERO_POINT, DTYPE,
                NATIVE, WHOLE, EARLY, scales.dtype.element_ty, NESTED,
            )  # fmt: skip
            pointer += 2048
            from_rows += P * 32
        out = acc * unit_of(UNIT, KIND, BITS, DTYPE == tl.float16, NATIVE, ZERO, ZERO_POINT, EARLY)
        if HAS_BIAS:
            out += tl.load(bias + whose * N + row, mask=row < N, other=0.0).to(tl.float32)[:, None]
        where = y + (target * N)[None, :] + row[:, None]
        tl.store(where, out.to(y.dtype.element_ty), mask=valid[None, :] & (row < N)[:, None])
