"""Weights as the left operand of a product for many rows, and the scales and zeros of a block of them."""

from __future__ import annotations

import triton
import triton.language as tl

from qhub_triton.tiled.decode import INTEGER, numbers, offset_of
from qhub_triton.tiled.groups import group_scales, group_zeros, run_of
from qhub_triton.tiled.registers import in_registers

__all__ = ["block_product", "factors"]


@triton.jit
def _less(v, zero, HAS_ZERO: tl.constexpr, WHOLE: tl.constexpr, OFFSET: tl.constexpr):
    """Return the numbers ``v`` (BLOCK_N, 32) less OFFSET, and less ``zero`` (BLOCK_N,) if they have one."""
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
def factors(
    scales, zeros, supers, super_table, super_offset, zero_supers, row, block, N, GROUPS,
    P: tl.constexpr, RUN: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, ZERO_POINT: tl.constexpr,
    NESTED: tl.constexpr, ZERO_NESTED: tl.constexpr,
):  # fmt: skip
    """Return the scale (BLOCK_N,) float32 of each run of slices of ``block``, each followed by its zero if it has
    one."""
    read = ()
    for run in tl.static_range(P // RUN):
        at = (block * P + run * RUN) * 32 // GROUP + tl.zeros((1,), tl.int32)
        known = (at < GROUPS)[:, None] & (row < N)[None, :]
        scale = group_scales(scales, supers, super_table, super_offset, row, at, GROUPS, known, NESTED)
        scale = tl.reshape(scale, row.shape)
        read = read + (scale,)
        if ZERO == 1 or ZERO == 2:
            zero = tl.reshape(group_zeros(zeros, zero_supers, row, at, GROUPS, known, ZERO_NESTED), row.shape)
            if ZERO == 2:
                # w = scale * (q - zero_point) + offset, as scale * (q - (zero_point - offset / scale)).
                zero = ZERO_POINT - zero / tl.where(scale == 0.0, 1.0, scale)
            read = read + (zero,)
    return read


@triton.jit
def _operand(
    codes, picked, table, zero, PLACE: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr, DTYPE: tl.constexpr,
    NATIVE: tl.constexpr, ZERO: tl.constexpr, ZERO_POINT: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Return the numbers at PLACE of ``codes`` (BLOCK_N, 32) less their zeros, in DTYPE; scales are not in them.

    ``picked``: of :func:`qhub_triton.tiled.registers.looked_up` where codes are looked up in registers. ``zero``:
    (BLOCK_N,) of :func:`factors`, if ZERO is not 0. WHOLE: it is a whole number.
    """
    WIDE: tl.constexpr = BITS == 8 and KIND == INTEGER and DTYPE == tl.bfloat16
    OFFSET: tl.constexpr = offset_of(KIND, BITS, DTYPE == tl.float16, NATIVE)
    CENTRE: tl.constexpr = (ZERO_POINT if ZERO == 0 else 0) + (0 if WIDE else OFFSET)
    if WIDE:
        low = numbers(codes, table, PLACE, BITS, KIND, DTYPE, NATIVE, 0) - OFFSET
        high = numbers(codes, table, PLACE, BITS, KIND, DTYPE, NATIVE, 1) - OFFSET
        return _less(high * 16.0 + low, zero, ZERO != 0, WHOLE, CENTRE)
    elif KIND == INTEGER:
        return _less(numbers(codes, table, PLACE, BITS, KIND, DTYPE, NATIVE), zero, ZERO != 0, WHOLE, CENTRE)
    elif in_registers(KIND, BITS, NATIVE):
        return picked[PLACE]
    else:
        return numbers(codes, table, PLACE, BITS, KIND, DTYPE, NATIVE)


@triton.jit
def block_product(
    acc, codes, picked, table, now, source, valid, block, K,
    BITS: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, ZERO_POINT: tl.constexpr,
    DTYPE: tl.constexpr, NATIVE: tl.constexpr, WHOLE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Return ``acc`` (BLOCK_N, BLOCK_M) plus the product of one block of weights with its columns of the input.

    ``now``: of :func:`factors`. ``source`` (32, BLOCK_M): where the input's first slice of the block lies, ``valid``
    (BLOCK_M,): which of its rows there are. EARLY: see :func:`qhub_triton.tiled.many.many`; the rest: :func:`_operand`.
    """
    P: tl.constexpr = 16 // BITS
    RUN: tl.constexpr = run_of(P, GROUP)
    EACH: tl.constexpr = 2 if ZERO == 1 or ZERO == 2 else 1
    p = tl.arange(0, 32)
    for run in tl.static_range(P // RUN):
        scale = now[run * EACH]
        zero = now[run * EACH + EACH - 1]
        if not EARLY:
            d = tl.zeros(acc.shape, tl.float32)
        for place in tl.static_range(run * RUN, run * RUN + RUN):
            k = (block * P + place) * 32
            xv = tl.load(source + place * 32, mask=valid[None, :] & (k + p < K)[:, None], other=0.0)
            v = _operand(codes, picked, table, zero, place, BITS, KIND, DTYPE, NATIVE, ZERO, ZERO_POINT, WHOLE)
            if EARLY:
                acc = tl.dot(v * scale.to(DTYPE)[:, None], xv, acc)
            else:
                d = tl.dot(v, xv, d)
        if not EARLY:
            acc += scale[:, None] * d
    return acc
