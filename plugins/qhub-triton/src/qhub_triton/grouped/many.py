"""The grouped product for many rows: :mod:`qhub_triton.tiled.many`, each tile with the weights of an expert."""

from __future__ import annotations

import triton
import triton.language as tl

from qhub_triton.dense.registers import looked_up, table_bytes
from qhub_triton.grouped.few import rows_of, scales_of
from qhub_triton.tiled.decode import INTEGER, TABLE, numbers, offset_of
from qhub_triton.tiled.groups import group_zeros, run_of

__all__ = ["grouped_many"]


@triton.jit
def _less(v, zero, HAS_ZERO: tl.constexpr, WHOLE: tl.constexpr, OFFSET: tl.constexpr):
    """Return the numbers ``v`` (BLOCK_N, 32) of codes less their zeros (BLOCK_N,)."""
    if not HAS_ZERO:
        if OFFSET == 0:
            return v
        else:
            return v - OFFSET
    elif WHOLE:
        # Whole numbers of that size have no rounding in 16 bits.
        return v - (OFFSET + zero).to(v.dtype)[:, None]
    else:
        return ((v.to(tl.float32) - OFFSET) - zero[:, None]).to(v.dtype)


@triton.jit
def grouped_many(
    x, words, scales, zeros, table, supers, super_table, super_offset, zero_supers, bias, y,
    order, experts, starts, ends,
    E, N, K, BLOCKS, GROUPS, stride_xm, stride_words, stride_groups, stride_supers, stride_zero_supers,
    BITS: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, ZERO_POINT: tl.constexpr,
    UNIT: tl.constexpr, NESTED: tl.constexpr, ZERO_NESTED: tl.constexpr, POWERS: tl.constexpr,
    HAS_BIAS: tl.constexpr, NATIVE: tl.constexpr, PER: tl.constexpr, SINGLE: tl.constexpr,
    WHOLE: tl.constexpr, STAGES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Compute rows of y (S, N) = x @ W[expert].T; a program: BLOCK_N columns of y, the rows of one tile.

    EARLY: weights are scaled before the product, and rounded to x's dtype as dense ones are; one sum then does for all
    groups. Other constants as in :func:`qhub_triton.tiled.many.many` and :func:`qhub_triton.grouped.few.grouped_few`.
    """
    P: tl.constexpr = 16 // BITS
    WIDE: tl.constexpr = BITS == 8 and KIND == INTEGER and x.dtype.element_ty == tl.bfloat16
    RUN: tl.constexpr = run_of(P, GROUP)
    HAS_ZERO: tl.constexpr = ZERO == 1 or ZERO == 2
    DTYPE: tl.constexpr = x.dtype.element_ty
    PICKED: tl.constexpr = NATIVE and KIND == TABLE and BITS == 4
    OFFSET: tl.constexpr = offset_of(KIND, BITS, DTYPE == tl.float16, NATIVE)
    CENTRE: tl.constexpr = (ZERO_POINT if ZERO == 0 else 0) + (0 if WIDE else OFFSET)
    expert, source, target, valid = rows_of(order, experts, starts, ends, tl.program_id(1), E, PER, SINGLE, BLOCK_M)
    if expert >= 0:
        whose = expert.to(tl.int64)
        words += whose * stride_words
        scales += whose * stride_groups
        zeros += whose * stride_groups
        supers += whose * stride_supers
        zero_supers += whose * stride_zero_supers
        if NESTED is not None:
            super_offset += whose * (1 if NESTED[2] else 0)
        row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        p = tl.arange(0, 32)
        # Rows past the last tile are read from the last one, and not stored.
        held = tl.minimum(row // 64, (N - 1) // 64)
        pointer = words + (held.to(tl.int64) * BLOCKS)[:, None] * 2048 + (row % 64)[:, None] * 32 + p[None, :]
        from_rows = x + (source * stride_xm)[None, :] + p[:, None]
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        if PICKED:
            table_of = table_bytes(table, DTYPE)
        for block in tl.range(0, BLOCKS, num_stages=STAGES):
            codes = tl.load(pointer)
            if PICKED:
                picked = looked_up(codes, table_of, DTYPE)
            for run in tl.static_range(P // RUN):
                d = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
                at = (block * P + run * RUN) * 32 // GROUP + tl.zeros((1,), tl.int32)
                known = (at < GROUPS)[:, None] & (row < N)[None, :]
                scale = scales_of(
                    scales, supers, super_table, super_offset, row, at, GROUPS, known, NESTED, POWERS
                )  # fmt: skip
                scale = tl.reshape(scale, (BLOCK_N,))
                zero = scale
                if HAS_ZERO:
                    zero = tl.reshape(group_zeros(zeros, zero_supers, row, at, GROUPS, known, ZERO_NESTED), (BLOCK_N,))
                    if ZERO == 2:
                        # w = scale * (q - zero_point) + offset, as scale * (q - (zero_point - offset / scale)).
                        zero = ZERO_POINT - zero / tl.where(scale == 0.0, 1.0, scale)
                for place in tl.static_range(run * RUN, run * RUN + RUN):
                    k = (block * P + place) * 32
                    xv = tl.load(from_rows + place * 32, mask=valid[None, :] & (k + p < K)[:, None], other=0.0)
                    if WIDE:
                        low = numbers(codes, table, place, BITS, KIND, DTYPE, NATIVE, 0) - OFFSET
                        high = numbers(codes, table, place, BITS, KIND, DTYPE, NATIVE, 1) - OFFSET
                        v = _less(high * 16.0 + low, zero, HAS_ZERO, WHOLE, CENTRE)
                    elif KIND == INTEGER:
                        v = _less(
                            numbers(codes, table, place, BITS, KIND, DTYPE, NATIVE), zero, HAS_ZERO, WHOLE, CENTRE
                        )
                    elif PICKED:
                        v = picked[place]
                    else:
                        v = numbers(codes, table, place, BITS, KIND, DTYPE, NATIVE)
                    if EARLY:
                        acc = tl.dot(v * scale.to(DTYPE)[:, None], xv, acc)
                    else:
                        d = tl.dot(v, xv, d)
                if not EARLY:
                    acc += scale[:, None] * d
            pointer += 2048
            from_rows += P * 32
        out = acc * UNIT
        if HAS_BIAS:
            out += tl.load(bias + whose * N + row, mask=row < N, other=0.0).to(tl.float32)[:, None]
        where = y + (target * N)[None, :] + row[:, None]
        tl.store(where, out.to(y.dtype.element_ty), mask=valid[None, :] & (row < N)[:, None])
