"""Weights as the left operand of a product for many rows, and the scales and zeros of a block of them."""

from __future__ import annotations

import triton
import triton.language as tl

from qhub_triton.tiled.decode import INTEGER, numbers, offset_of
from qhub_triton.tiled.groups import group_scales, group_zeros, paired, run_of
from qhub_triton.tiled.registers import in_registers

__all__ = ["block_product", "depth_of", "factors", "unit_of"]

# Weights made of subnormal numbers are times 2^-TINY, so that a scale's part of them stays far from both ends.
TINY: tl.constexpr = tl.constexpr(69)


@triton.constexpr_function
def depth_of(early, bits):
    """Return how many columns of the input a product takes at a time: two slices, where a block has pairs of them."""
    return 64 if early and 16 // bits % 2 == 0 else 32


@triton.constexpr_function
def as_subnormal(kind, bits, half, native, zero, zero_point):
    """Return whether codes become weights by one masking and one multiply-add: see :func:`_subnormal`.

    What is added is the zero point times the scale, which must be exact: the zero point is a power of two.
    """
    return native and not half and kind == 0 and zero == 0 and zero_point in (0.5, 1, 2, 4, 8, 16, 32, 64, 128)


@triton.constexpr_function
def unit_of(unit, kind, bits, half, native, zero, zero_point, early):
    """Return what a product of :func:`block_product` is to be multiplied by; ``unit``: the layout's own part of it."""
    if early and as_subnormal(kind, bits, half, native, zero, zero_point):
        return unit * 2.0**69
    return unit


@triton.constexpr_function
def _subnormal(bits, place):
    """Return the instructions for the weights at ``place`` of two words.

    The code's bits, where they lie, are a bfloat16 below 2^-125: the code times 2^(position - 133). That times $2, plus
    $3, is the weight. In float16 the range of scales would be too small for it.
    """
    mask = ((1 << bits) - 1) << (bits * place % 8)
    high = "shr.b32 t, $1, 8; and.b32 t, t," if bits * place >= 8 else "and.b32 t, $1,"
    return f"{{ .reg .b32 t; {high} {mask << 16 | mask:#x}; fma.rn.bf16x2 $0, t, $2, $3; }}"


@triton.jit
def _less(v, zero, HAS_ZERO: tl.constexpr, OFFSET: tl.constexpr):
    """Return the numbers ``v`` (BLOCK_N, 32) less OFFSET, and less ``zero`` (BLOCK_N,), a whole number, if there is
    one; neither is rounded in 16 bits."""
    if HAS_ZERO:
        return v - (OFFSET + zero).to(v.dtype)[:, None]
    elif OFFSET == 0:
        return v
    else:
        return v - OFFSET


@triton.jit
def factors(
    scales, zeros, supers, super_table, super_offset, zero_supers, first, row, block, N, GROUPS,
    P: tl.constexpr, RUN: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, ZERO_POINT: tl.constexpr,
    NESTED: tl.constexpr, ZERO_NESTED: tl.constexpr, PAIRED: tl.constexpr,
):  # fmt: skip
    """Return the scale (BLOCK_N,) float32 of each run of slices of ``block``, each followed by its zero or offset if it
    has one; PAIRED: of the rows from ``first`` on, see :func:`qhub_triton.tiled.groups.paired`."""
    read = ()
    for run in tl.static_range(P // RUN):
        at = (block * P + run * RUN) * 32 // GROUP + tl.zeros((1,), tl.int32)
        known = (at < GROUPS)[:, None] & (row < N)[None, :]
        if PAIRED:
            scale = paired(scales, first, (block * P + run * RUN) * 32 // GROUP, N, GROUPS, row.shape[0])
            scale = scale.to(tl.float32)
        else:
            scale = group_scales(scales, supers, super_table, super_offset, row, at, GROUPS, known, NESTED)
            scale = tl.reshape(scale, row.shape)
        read = read + (scale,)
        if ZERO != 0:
            zero = group_zeros(zeros, zero_supers, row, at, GROUPS, known, ZERO_NESTED)
            read = read + (tl.reshape(zero, row.shape),)
    return read


@triton.jit
def _operand(
    codes, picked, table, zero, PLACE: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr, DTYPE: tl.constexpr,
    NATIVE: tl.constexpr, ZERO: tl.constexpr, ZERO_POINT: tl.constexpr,
):  # fmt: skip
    """Return the numbers at PLACE of ``codes`` (BLOCK_N, 32) less their zeros, in DTYPE; scales are not in them.

    ``picked``: of :func:`qhub_triton.tiled.registers.looked_up` where codes are looked up in registers. ``zero``:
    (BLOCK_N,), a whole number, if ZERO is not 0.
    """
    WIDE: tl.constexpr = BITS == 8 and KIND == INTEGER and DTYPE == tl.bfloat16
    OFFSET: tl.constexpr = offset_of(KIND, BITS, DTYPE == tl.float16, NATIVE)
    CENTRE: tl.constexpr = (ZERO_POINT if ZERO == 0 else 0) + (0 if WIDE else OFFSET)
    if WIDE:
        low = numbers(codes, table, PLACE, BITS, KIND, DTYPE, NATIVE, 0) - OFFSET
        high = numbers(codes, table, PLACE, BITS, KIND, DTYPE, NATIVE, 1) - OFFSET
        return _less(high * 16.0 + low, zero, ZERO != 0, CENTRE)
    elif KIND == INTEGER:
        return _less(numbers(codes, table, PLACE, BITS, KIND, DTYPE, NATIVE), zero, ZERO != 0, CENTRE)
    elif in_registers(KIND, BITS, NATIVE):
        return picked[PLACE]
    else:
        return numbers(codes, table, PLACE, BITS, KIND, DTYPE, NATIVE)


@triton.jit
def _whole(zero, BITS: tl.constexpr):
    """Return the code that is nearest to ``zero``."""
    return tl.minimum(tl.maximum(tl.floor(zero + 0.5), 0.0), (1 << BITS) - 1.0)


@triton.jit
def _scaled(
    codes, picked, table, now, PLACE: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr,
    DTYPE: tl.constexpr, NATIVE: tl.constexpr, ZERO: tl.constexpr, ZERO_POINT: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Return the weights at PLACE of ``codes`` (BLOCK_N, 32) in DTYPE, times 2^-TINY where :func:`as_subnormal`.

    Others as of :func:`_operand`; ``now``: of :func:`factors`. A weight is rounded once: what it is less its zero is
    exact before it meets its scale, or is one sum with it.
    """
    EACH: tl.constexpr = 2 if ZERO != 0 else 1
    RUN: tl.constexpr = run_of(16 // BITS, GROUP)
    scale = now[PLACE // RUN * EACH]
    own = scale.to(DTYPE)
    zero = now[PLACE // RUN * EACH + EACH - 1]
    if as_subnormal(KIND, BITS, DTYPE == tl.float16, NATIVE, ZERO, ZERO_POINT):
        POSITION: tl.constexpr = BITS * PLACE % 8
        factor = (own.to(tl.float32) * 2.0 ** (133 - TINY - POSITION)).to(DTYPE)
        less = (own.to(tl.float32) * (-ZERO_POINT * 2.0**-TINY)).to(DTYPE)
        factor = tl.broadcast_to(factor[:, None], codes.shape)
        less = tl.broadcast_to(less[:, None], codes.shape)
        return tl.inline_asm_elementwise(
            _subnormal(BITS, PLACE), "=r,r,r,r", args=[codes, factor, less], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    elif ZERO != 0 and not WHOLE:
        # s (q - z) as s (q - w) + s (w - z), w whole and near z: only the sum is rounded, and s (w - z) is small.
        # An offset is s (z' - z), z' the zero point.
        if ZERO == 1:
            whole = _whole(zero, BITS)
            rest = scale * (whole - zero)
        else:
            whole = _whole(ZERO_POINT - zero / tl.where(scale == 0.0, 1.0, scale), BITS)
            rest = scale * (whole - ZERO_POINT) + zero
        v = _operand(codes, picked, table, whole, PLACE, BITS, KIND, DTYPE, NATIVE, ZERO, ZERO_POINT)
        if not NATIVE:
            # Elsewhere a sum in 16 bits may be two roundings.
            return (v.to(tl.float32) * scale[:, None] + rest[:, None]).to(DTYPE)
        return tl.fma(v, tl.broadcast_to(own[:, None], v.shape), tl.broadcast_to(rest.to(DTYPE)[:, None], v.shape))
    else:
        v = _operand(codes, picked, table, zero, PLACE, BITS, KIND, DTYPE, NATIVE, ZERO, ZERO_POINT)
        return v * own[:, None]


@triton.jit
def block_product(
    acc, codes, picked, table, now, source, valid, block, K,
    BITS: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, ZERO_POINT: tl.constexpr,
    DTYPE: tl.constexpr, NATIVE: tl.constexpr, WHOLE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Return ``acc`` (BLOCK_N, BLOCK_M) plus the product of one block of weights with its columns of the input.

    ``now``: of :func:`factors`. ``source`` (:func:`depth_of`, BLOCK_M): where the input's first columns of the block
    lie, ``valid`` (BLOCK_M,): which of its rows there are. EARLY: see :func:`qhub_triton.tiled.many.many`; the rest:
    :func:`_operand`.
    """
    P: tl.constexpr = 16 // BITS
    RUN: tl.constexpr = run_of(P, GROUP)
    EACH: tl.constexpr = 2 if ZERO != 0 else 1
    DEPTH: tl.constexpr = depth_of(EARLY, BITS)
    tl.static_assert(EARLY or ZERO == 0 or WHOLE, "numbers less their zeros are rounded before their scales")
    p = tl.arange(0, DEPTH)
    if EARLY:
        for turn in tl.static_range(P * 32 // DEPTH):
            k = block * P * 32 + turn * DEPTH
            xv = tl.load(source + turn * DEPTH, mask=valid[None, :] & (k + p < K)[:, None], other=0.0)
            if DEPTH == 32:
                v = _scaled(codes, picked, table, now, turn, BITS, KIND, GROUP, DTYPE, NATIVE, ZERO, ZERO_POINT, WHOLE)
            else:
                left = _scaled(
                    codes, picked, table, now, 2 * turn, BITS, KIND, GROUP, DTYPE, NATIVE, ZERO, ZERO_POINT, WHOLE
                )
                right = _scaled(
                    codes, picked, table, now, 2 * turn + 1, BITS, KIND, GROUP, DTYPE, NATIVE, ZERO, ZERO_POINT, WHOLE
                )
                v = tl.join(left, right).permute(0, 2, 1).reshape(left.shape[0], DEPTH)
            acc = tl.dot(v, xv, acc)
    else:
        for run in tl.static_range(P // RUN):
            scale = now[run * EACH]
            zero = now[run * EACH + EACH - 1]
            d = tl.zeros(acc.shape, tl.float32)
            for place in tl.static_range(run * RUN, run * RUN + RUN):
                k = (block * P + place) * 32
                xv = tl.load(source + place * 32, mask=valid[None, :] & (k + p < K)[:, None], other=0.0)
                v = _operand(codes, picked, table, zero, place, BITS, KIND, DTYPE, NATIVE, ZERO, ZERO_POINT)
                d = tl.dot(v, xv, d)
            acc += scale[:, None] * d
    return acc
