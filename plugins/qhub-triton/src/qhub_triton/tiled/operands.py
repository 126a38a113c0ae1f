"""Weights as the left operand of a product for many rows, and the scales and zeros of a block of them."""

from __future__ import annotations

import triton
import triton.language as tl

from qhub_triton.tiled.banks import in_banks
from qhub_triton.tiled.decode import INTEGER, numbers, offset_of
from qhub_triton.tiled.groups import group_scales, group_zeros, paired, run_of
from qhub_triton.tiled.registers import by_instructions

__all__ = [
    "TINY",
    "as_subnormal",
    "block_product",
    "depth_of",
    "factors",
    "in_two_parts",
    "masked",
    "subnormal",
    "unit_of",
]

# Weights made of subnormal numbers are times 2^-TINY, so that a scale's part of them stays far from both ends.
_TINY = 69
TINY: tl.constexpr = tl.constexpr(_TINY)


@triton.constexpr_function
def depth_of(early, bits):
    """Return how many columns of the input a product takes at a time.

    Two slices of weights that are scaled before it, where a block has pairs of them: the matrix units are waited for
    once. Four at once leave too few registers, and were slower on an H100.
    """
    return 64 if early and 16 // bits % 2 == 0 else 32


@triton.constexpr_function
def as_subnormal(kind, bits, half, native, zero, zero_point):
    """Return whether codes become weights by one masking and one multiply-add: see :func:`subnormal`.

    What is added is the zero point times the scale, which must be exact: the zero point is a power of two, and no more
    than half the codes. A code must lie in one byte.
    """
    if not native or half or kind != 0 or 8 % bits or zero != 0:
        return False
    return zero_point in [2**i for i in range(bits)]


@triton.constexpr_function
def _rounds(nested, stored, half):
    """Return whether scales of the dtype ``stored`` are no numbers of the input's dtype: float16 if ``half``."""
    if nested is not None or stored == tl.float32:
        return True
    return stored == tl.float16 and not half


@triton.constexpr_function
def unit_of(unit, kind, bits, half, native, zero, zero_point, early):
    """Return what a product of :func:`block_product` is to be multiplied by; ``unit``: the layout's own part of it."""
    if early and as_subnormal(kind, bits, half, native, zero, zero_point):
        return unit * 2.0**_TINY
    return unit


@triton.constexpr_function
def masked(bits, place):
    """Return how instructions begin that leave the codes at ``place`` of two words $1 in t, not moved in their byte."""
    mask = ((1 << bits) - 1) << bits * place % 8
    code = "{ .reg .b32 t, u; " + ("shr.b32 t, $1, 8; and.b32 t, t," if bits * place >= 8 else "and.b32 t, $1,")
    return code + f" {mask << 16 | mask:#x}; "


@triton.constexpr_function
def in_two_parts(scale):
    """Return how instructions end whose result $0 is t times a scale, the operand ``scale``, and what that lost, the
    next one."""
    return f"mul.rn.bf16x2 u, t, ${scale + 1}; fma.rn.bf16x2 $0, t, ${scale}, u; }}"


@triton.constexpr_function
def subnormal(bits, place, zero_point, exact):
    """Return the instructions for the weights at ``place`` of two words.

    The code's bits, where they lie, are a bfloat16 below 2^-125: the code times 2^(position - 133). That times $2, plus
    $3, is the weight. Not ``exact``: $2 is a scale rounded to bfloat16 and $3 what it lost; both times the code less
    its zero point are the weight. In float16 the range of scales would be too small for it.
    """
    code = masked(bits, place)
    if exact:
        return code + "fma.rn.bf16x2 $0, t, $2, $3; }"
    # Numbers below 2^-125 are spaced evenly: a zero point, moved to the code's place, is a pattern of bits like it.
    centre = 0x8000 | int(zero_point * 2 ** (bits * place % 8))
    code += f"mov.b32 u, {centre << 16 | centre:#x}; add.rn.bf16x2 t, t, u; "
    return code + in_two_parts(2)


@triton.jit
def _less(v, zero, HAS_ZERO: tl.constexpr, OFFSET: tl.constexpr, ZERO_POINT: tl.constexpr):
    """Return the numbers ``v`` (BLOCK_N, 32) less OFFSET, and less ``zero`` (BLOCK_N,), a whole number, if there is
    one, else less ZERO_POINT; nothing is rounded in 16 bits."""
    if HAS_ZERO:
        return v - (OFFSET + zero).to(v.dtype)[:, None]
    elif OFFSET + ZERO_POINT == 0:
        return v
    else:
        return v - (OFFSET + ZERO_POINT)


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
            if PAIRED and ZERO_NESTED is None and zeros.dtype.element_ty.primitive_bitwidth < 32:
                zero = paired(zeros, first, (block * P + run * RUN) * 32 // GROUP, N, GROUPS, row.shape[0])
                zero = zero.to(tl.float32)
            else:
                zero = tl.reshape(group_zeros(zeros, zero_supers, row, at, GROUPS, known, ZERO_NESTED), row.shape)
            read = read + (zero,)
    return read


@triton.jit
def _operand(
    codes, picked, table, zero, PLACE: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr, DTYPE: tl.constexpr,
    NATIVE: tl.constexpr, ZERO: tl.constexpr, ZERO_POINT: tl.constexpr,
):  # fmt: skip
    """Return the numbers at PLACE of ``codes`` (BLOCK_N, 32) less their zeros, in DTYPE; scales are not in them.

    ``picked``: of :func:`qhub_triton.tiled.registers.looked_up` where codes are looked up in registers, nothing where
    they are in shared memory. ``zero``: (BLOCK_N,), a whole number, if ZERO is not 0.
    """
    WIDE: tl.constexpr = BITS == 8 and KIND == INTEGER and DTYPE == tl.bfloat16
    OFFSET: tl.constexpr = offset_of(KIND, BITS, DTYPE == tl.float16, NATIVE)
    if WIDE:
        low = numbers(codes, table, PLACE, BITS, KIND, DTYPE, NATIVE, 0) - OFFSET
        high = numbers(codes, table, PLACE, BITS, KIND, DTYPE, NATIVE, 1) - OFFSET
        return _less(high * 16.0 + low, zero, ZERO != 0, 0, ZERO_POINT)
    elif KIND == INTEGER:
        return _less(numbers(codes, table, PLACE, BITS, KIND, DTYPE, NATIVE), zero, ZERO != 0, OFFSET, ZERO_POINT)
    elif len(picked) > 0:
        return picked[PLACE]
    elif by_instructions(KIND, BITS, NATIVE):
        return in_banks(codes, PLACE, DTYPE)
    else:
        return numbers(codes, table, PLACE, BITS, KIND, DTYPE, NATIVE)


@triton.jit
def _whole(zero, BITS: tl.constexpr):
    """Return the whole number nearest to ``zero`` that codes can be less by without rounding in 16 bits."""
    LEAST: tl.constexpr = 0.0 if BITS == 8 else -112.0
    MOST: tl.constexpr = 255.0 if BITS == 8 else 127.0
    return tl.minimum(tl.maximum(tl.floor(zero + 0.5), LEAST), MOST)


@triton.jit
def _times(v, scale, rest, ROUNDS: tl.constexpr, HAS_REST: tl.constexpr, NATIVE: tl.constexpr):
    """Return ``v`` (BLOCK_N, 32) times ``scale`` (BLOCK_N,) float32, plus ``rest`` (BLOCK_N,) float32, in v's dtype.

    ROUNDS: the scale is no number of that dtype, and goes in two parts.
    """
    if not NATIVE or (ROUNDS and v.dtype == tl.float16):
        # Elsewhere a sum in 16 bits may be two roundings. What a small scale loses is below what float16 holds.
        product = v.to(tl.float32) * scale[:, None]
        if HAS_REST:
            product += rest[:, None]
        return product.to(v.dtype)
    own = scale.to(v.dtype)
    if not ROUNDS and not HAS_REST:
        return v * own[:, None]
    more = tl.zeros(v.shape, v.dtype)
    if HAS_REST:
        more = tl.broadcast_to(rest.to(v.dtype)[:, None], v.shape)
    if ROUNDS:
        lost = (scale - own.to(tl.float32)).to(v.dtype)
        more = tl.fma(v, tl.broadcast_to(lost[:, None], v.shape), more)
    return tl.fma(v, tl.broadcast_to(own[:, None], v.shape), more)


@triton.jit
def _scaled(
    codes, picked, table, now, PLACE: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr,
    DTYPE: tl.constexpr, NATIVE: tl.constexpr, ZERO: tl.constexpr, ZERO_POINT: tl.constexpr, WHOLE: tl.constexpr,
    ROUNDS: tl.constexpr,
):  # fmt: skip
    """Return the weights at PLACE of ``codes`` (BLOCK_N, 32) in DTYPE, times 2^-TINY where :func:`as_subnormal`.

    Others as of :func:`_operand`; ``now``: of :func:`factors`. ROUNDS: of :func:`_times`. A weight is rounded once:
    what it is less its zero is exact before it meets its scale, or is one sum with it.
    """
    EACH: tl.constexpr = 2 if ZERO != 0 else 1
    RUN: tl.constexpr = run_of(16 // BITS, GROUP)
    scale = now[PLACE // RUN * EACH]
    zero = now[PLACE // RUN * EACH + EACH - 1]
    if as_subnormal(KIND, BITS, DTYPE == tl.float16, NATIVE, ZERO, ZERO_POINT):
        own = scale.to(DTYPE).to(tl.float32)
        FACTOR: tl.constexpr = 2.0 ** (133 - TINY - BITS * PLACE % 8)
        if ROUNDS:
            more = ((scale - own) * FACTOR).to(DTYPE)
        else:
            more = (own * (-ZERO_POINT * 2.0**-TINY)).to(DTYPE)
        args = [
            codes, tl.broadcast_to((own * FACTOR).to(DTYPE)[:, None], codes.shape),
            tl.broadcast_to(more[:, None], codes.shape),
        ]  # fmt: skip
        code: tl.constexpr = subnormal(BITS, PLACE, ZERO_POINT, not ROUNDS)
        return tl.inline_asm_elementwise(code, "=r,r,r,r", args=args, dtype=tl.bfloat16, is_pure=True, pack=2)
    elif ZERO == 0 and ZERO_POINT % 1 != 0:
        POINT: tl.constexpr = ZERO_POINT // 1
        v = _operand(codes, picked, table, zero, PLACE, BITS, KIND, DTYPE, NATIVE, ZERO, POINT)
        return _times(v, scale, scale * (POINT - ZERO_POINT), ROUNDS, True, NATIVE)
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
        return _times(v, scale, rest, ROUNDS, True, NATIVE)
    else:
        v = _operand(codes, picked, table, zero, PLACE, BITS, KIND, DTYPE, NATIVE, ZERO, ZERO_POINT)
        return _times(v, scale, scale, ROUNDS, False, NATIVE)


@triton.jit
def _joined(
    codes, picked, table, now, PLACE: tl.constexpr, COUNT: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr,
    GROUP: tl.constexpr, DTYPE: tl.constexpr, NATIVE: tl.constexpr, ZERO: tl.constexpr, ZERO_POINT: tl.constexpr,
    WHOLE: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """Return the weights (BLOCK_N, 32 * COUNT) of COUNT places from PLACE on, side by side; see :func:`_scaled`."""
    if COUNT == 1:
        return _scaled(
            codes, picked, table, now, PLACE, BITS, KIND, GROUP, DTYPE, NATIVE, ZERO, ZERO_POINT, WHOLE, ROUNDS
        )
    else:
        HALF: tl.constexpr = COUNT // 2
        left = _joined(
            codes, picked, table, now, PLACE, HALF, BITS, KIND, GROUP, DTYPE, NATIVE, ZERO, ZERO_POINT, WHOLE, ROUNDS
        )
        right = _joined(
            codes, picked, table, now, PLACE + HALF, HALF, BITS, KIND, GROUP, DTYPE, NATIVE, ZERO, ZERO_POINT, WHOLE,
            ROUNDS,
        )  # fmt: skip
        return tl.join(left, right).permute(0, 2, 1).reshape(codes.shape[0], 32 * COUNT)


@triton.jit
def block_product(
    acc, codes, picked, table, now, source, valid, block, K,
    BITS: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, ZERO_POINT: tl.constexpr,
    DTYPE: tl.constexpr, NATIVE: tl.constexpr, WHOLE: tl.constexpr, EARLY: tl.constexpr, STORED: tl.constexpr,
    NESTED: tl.constexpr,
):  # fmt: skip
    """Return ``acc`` (BLOCK_N, BLOCK_M) plus the product of one block of weights with its columns of the input.

    ``now``: of :func:`factors`. ``source`` (:func:`depth_of`, BLOCK_M): where the input's first columns of the block
    lie, ``valid`` (BLOCK_M,): which of its rows there are. STORED: the dtype of scales. EARLY: see
    :func:`qhub_triton.tiled.many.many`; the rest: :func:`_operand`.
    """
    P: tl.constexpr = 16 // BITS
    RUN: tl.constexpr = run_of(P, GROUP)
    EACH: tl.constexpr = 2 if ZERO != 0 else 1
    DEPTH: tl.constexpr = depth_of(EARLY, BITS)
    tl.static_assert(
        EARLY or WHOLE or (ZERO == 0 and ZERO_POINT % 1 == 0),
        "numbers less their zeros are rounded before their scales",
    )
    ROUNDS: tl.constexpr = _rounds(NESTED, STORED, DTYPE == tl.float16)
    p = tl.arange(0, DEPTH)
    if EARLY:
        for turn in tl.static_range(P * 32 // DEPTH):
            k = block * P * 32 + turn * DEPTH
            xv = tl.load(source + turn * DEPTH, mask=valid[None, :] & (k + p < K)[:, None], other=0.0)
            v = _joined(
                codes, picked, table, now, turn * DEPTH // 32, DEPTH // 32, BITS, KIND, GROUP, DTYPE, NATIVE, ZERO,
                ZERO_POINT, WHOLE, ROUNDS,
            )  # fmt: skip
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
