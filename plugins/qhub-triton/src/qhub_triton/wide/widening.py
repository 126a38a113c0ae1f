"""Words of a tile to weights in the matrix units' left operand, in Gluon: what ``tiled/operands.py`` is in Triton.

The instructions are those of ``tiled/``, and shorter ones where those would keep the matrix units waiting; a weight is
rounded once here too.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from qhub_triton.tiled.decode import INTEGER, TABLE, field, float8, offset_of
from qhub_triton.tiled.operands import TINY, as_subnormal, subnormal
from qhub_triton.wide.instructions import float8_scaled, folds, less_zero, lookup_kinds, lookup_pair

__all__ = ["entries", "looked_up", "scaled_pair", "weights"]


@gluon.jit
def entries(table, KIND: gl.constexpr, ROWS: gl.constexpr, A: gl.constexpr):
    """Return the bytes of a table of 16 numbers, 8 tensors (ROWS, 32) int32 of one value each; none for other kinds."""
    read = ()
    if KIND == TABLE:
        for i in gl.static_range(8):
            read = read + (gl.full((ROWS, 32), gl.load(table + i), gl.int32, A),)
    return read


@gluon.jit
def looked_up(words, held, DTYPE: gl.constexpr, PLACE: gl.constexpr):
    """Return the numbers at PLACE, an even one, and the next of ``words``; ``held``: of :func:`entries`."""
    args = [words, held[0], held[1], held[2], held[3], held[4], held[5], held[6], held[7]]
    # The dtypes are written out: the compiler takes no constants of the caller's here.
    if DTYPE == gl.float16:
        return gl.inline_asm_elementwise(
            lookup_pair(PLACE, 0), lookup_kinds(0), args, (gl.float16, gl.float16), True, 2
        )
    else:
        return gl.inline_asm_elementwise(
            lookup_pair(PLACE, 0), lookup_kinds(0), args, (gl.bfloat16, gl.bfloat16), True, 2
        )


@gluon.jit
def scaled_pair(words, held, scale, PLACE: gl.constexpr, ROUNDS: gl.constexpr):
    """Return the numbers of :func:`looked_up` times ``scale`` (ROWS,) float32, which they share, in bfloat16; ROUNDS:
    of :func:`weights`."""
    own = scale.to(gl.bfloat16)
    args = [words, held[0], held[1], held[2], held[3], held[4], held[5], held[6], held[7], gl.expand_dims(own, 1)]
    if ROUNDS:
        args = args + [_column(scale - own.to(gl.float32), gl.bfloat16)]
        return gl.inline_asm_elementwise(
            lookup_pair(PLACE, 2), lookup_kinds(2), args, (gl.bfloat16, gl.bfloat16), True, 2
        )
    else:
        return gl.inline_asm_elementwise(
            lookup_pair(PLACE, 1), lookup_kinds(1), args, (gl.bfloat16, gl.bfloat16), True, 2
        )


@gluon.jit
def _pairs(words, CODE: gl.constexpr, DTYPE: gl.constexpr):
    # The dtypes are written out: the compiler takes no constants of the caller's here.
    if DTYPE == gl.float16:
        return gl.inline_asm_elementwise(CODE, "=r,r", [words], gl.float16, True, 2)
    else:
        return gl.inline_asm_elementwise(CODE, "=r,r", [words], gl.bfloat16, True, 2)


@gluon.jit
def _column(value, DTYPE: gl.constexpr):
    """Return ``value`` (ROWS,) float32 as (ROWS, 1) in DTYPE."""
    return gl.expand_dims(value.to(DTYPE), 1)


@gluon.jit
def _less(v, zero, HAS_ZERO: gl.constexpr, OFFSET: gl.constexpr, POINT: gl.constexpr):
    """Return ``v`` less OFFSET, and less ``zero`` (ROWS,), a whole number, if there is one, else less POINT."""
    if HAS_ZERO:
        v = v - _column(zero + OFFSET, v.dtype)
    elif OFFSET + POINT != 0:
        v = v - (OFFSET + POINT)
    return v


@gluon.jit
def _number(
    words, picked, zero, PLACE: gl.constexpr, BITS: gl.constexpr, KIND: gl.constexpr, DTYPE: gl.constexpr,
    HAS_ZERO: gl.constexpr, POINT: gl.constexpr,
):  # fmt: skip
    """Return the numbers at PLACE of ``words`` less their zeros, exact in DTYPE; scales are not in them."""
    HALF: gl.constexpr = DTYPE == gl.float16
    OFFSET: gl.constexpr = offset_of(KIND, BITS, HALF, True)
    if KIND == TABLE:
        return picked[PLACE % 2]
    elif KIND == INTEGER and BITS == 8 and not HALF:
        low = _pairs(words, field(BITS, PLACE, HALF, 0), DTYPE) - OFFSET
        high = _pairs(words, field(BITS, PLACE, HALF, 1), DTYPE) - OFFSET
        return _less(high * 16.0 + low, zero, HAS_ZERO, 0, POINT)
    elif KIND == INTEGER:
        return _less(_pairs(words, field(BITS, PLACE, HALF, None), DTYPE), zero, HAS_ZERO, OFFSET, POINT)
    else:
        return _pairs(words, float8(PLACE, HALF, 4 if KIND == 2 else 5), DTYPE)


@gluon.jit
def _times(v, scale, rest, ROUNDS: gl.constexpr, HAS_REST: gl.constexpr):
    """Return ``v`` times ``scale`` (ROWS,) float32, plus ``rest`` (ROWS,) float32, in v's dtype.

    ROUNDS: the scale is no number of that dtype, and goes in two parts; in float16, whose range is too small for the
    lesser part, everything is multiplied in float32.
    """
    if ROUNDS and v.dtype == gl.float16:
        product = v.to(gl.float32) * gl.expand_dims(scale, 1)
        if HAS_REST:
            product += gl.expand_dims(rest, 1)
        return product.to(v.dtype)
    own = gl.expand_dims(scale.to(v.dtype), 1)
    if not ROUNDS and not HAS_REST:
        return v * own
    more = gl.full_like(v, 0.0)
    if HAS_REST:
        more = more + _column(rest, v.dtype)
    if ROUNDS:
        v, lost = gl.broadcast(v, _column(scale - scale.to(v.dtype).to(gl.float32), v.dtype))
        more = gl.fma(v, lost, more)
    v, own = gl.broadcast(v, own)
    return gl.fma(v, own, more)


@gluon.jit
def _whole(zero, BITS: gl.constexpr):
    """Return the whole number nearest to ``zero`` that codes can be less by without rounding in 16 bits."""
    LEAST: gl.constexpr = 0.0 if BITS == 8 else -112.0
    MOST: gl.constexpr = 255.0 if BITS == 8 else 127.0
    return gl.minimum(gl.maximum(gl.floor(zero + 0.5), LEAST), MOST)


@gluon.jit
def _unscaled(
    words, picked, scale, PLACE: gl.constexpr, BITS: gl.constexpr, KIND: gl.constexpr, DTYPE: gl.constexpr,
    ZERO_POINT: gl.constexpr,
):  # fmt: skip
    """Return the numbers at PLACE of ``words`` less ZERO_POINT, a whole number, or what is such times 2^-TINY."""
    if as_subnormal(KIND, BITS, DTYPE == gl.float16, True, 0, ZERO_POINT):
        # As with a scale of 1: what is added is exact.
        ONE: gl.constexpr = 2.0 ** (133 - TINY - BITS * PLACE % 8)
        one = gl.full_like(scale, ONE)
        off = gl.full_like(scale, -ZERO_POINT * 2.0**-TINY)
        code: gl.constexpr = subnormal(BITS, PLACE, ZERO_POINT, True)
        args = [words, _column(one, DTYPE), _column(off, DTYPE)]
        return gl.inline_asm_elementwise(code, "=r,r,r,r", args, gl.bfloat16, True, 2)
    else:
        return _number(words, picked, scale, PLACE, BITS, KIND, DTYPE, False, ZERO_POINT // 1)


@gluon.jit
def _folded(words, scale, zero, PLACE: gl.constexpr, BITS: gl.constexpr, KIND: gl.constexpr, ROUNDS: gl.constexpr):
    """Return the weights at PLACE of ``words`` in bfloat16 times 2^-TINY, where the kind
    :func:`qhub_triton.wide.instructions.folds`."""
    own = scale.to(gl.bfloat16).to(gl.float32)
    if KIND == INTEGER:
        UP: gl.constexpr = 2.0 ** (133 - TINY - BITS * PLACE % 8)
        # In float32 that is a subnormal number too, and in bfloat16 exact up to 255.
        minus = _column(zero * (-(2.0 ** (BITS * PLACE % 8 - 133))), gl.bfloat16)
        args = [words, minus, _column(own * UP, gl.bfloat16)]
        if ROUNDS:
            args = args + [_column((scale - own) * UP, gl.bfloat16)]
            return gl.inline_asm_elementwise(less_zero(BITS, PLACE, True), "=r,r,r,r,r", args, gl.bfloat16, True, 2)
        else:
            return gl.inline_asm_elementwise(less_zero(BITS, PLACE, False), "=r,r,r,r", args, gl.bfloat16, True, 2)
    else:
        EXPONENT: gl.constexpr = 4 if KIND == 2 else 5
        RAISE: gl.constexpr = 2.0 ** (128 - 2 ** (EXPONENT - 1) - TINY)
        args = [words, _column(own * RAISE, gl.bfloat16)]
        if ROUNDS:
            args = args + [_column((scale - own) * RAISE, gl.bfloat16)]
            return gl.inline_asm_elementwise(
                float8_scaled(PLACE, EXPONENT, True), "=r,r,r,r", args, gl.bfloat16, True, 2
            )
        else:
            return gl.inline_asm_elementwise(
                float8_scaled(PLACE, EXPONENT, False), "=r,r,r", args, gl.bfloat16, True, 2
            )


@gluon.jit
def weights(
    words, picked, scale, zero, PLACE: gl.constexpr, BITS: gl.constexpr, KIND: gl.constexpr, DTYPE: gl.constexpr,
    ZERO: gl.constexpr, ZERO_POINT: gl.constexpr, WHOLE: gl.constexpr, ROUNDS: gl.constexpr, LATE: gl.constexpr,
):  # fmt: skip
    """Return the weights at PLACE of ``words`` (ROWS, 32) int16 in DTYPE, times 2^-TINY where they are made of
    subnormal numbers (:func:`qhub_triton.tiled.operands.as_subnormal`, :func:`qhub_triton.wide.instructions.folds`).

    ``picked``: of :func:`looked_up` where codes are looked up. ``scale``, ``zero``: (ROWS,) float32; constants as in
    :func:`qhub_triton.tiled.many.many`; ROUNDS: scales are no numbers of DTYPE. LATE: without their scales, for the
    product is multiplied by them. Zeros and offsets that are no whole numbers are split as ``tiled/operands.py`` says.
    """
    if LATE:
        return _unscaled(words, picked, scale, PLACE, BITS, KIND, DTYPE, ZERO_POINT)
    elif folds(KIND, BITS, DTYPE == gl.float16, ZERO, WHOLE):
        return _folded(words, scale, zero, PLACE, BITS, KIND, ROUNDS)
    elif as_subnormal(KIND, BITS, DTYPE == gl.float16, True, ZERO, ZERO_POINT):
        FACTOR: gl.constexpr = 2.0 ** (133 - TINY - BITS * PLACE % 8)
        own = scale.to(DTYPE).to(gl.float32)
        if ROUNDS:
            more = (scale - own) * FACTOR
        else:
            more = own * (-ZERO_POINT * 2.0**-TINY)
        args = [words, _column(own * FACTOR, DTYPE), _column(more, DTYPE)]
        code: gl.constexpr = subnormal(BITS, PLACE, ZERO_POINT, not ROUNDS)
        return gl.inline_asm_elementwise(code, "=r,r,r,r", args, gl.bfloat16, True, 2)
    elif ZERO == 0:
        POINT: gl.constexpr = ZERO_POINT // 1
        REST: gl.constexpr = ZERO_POINT % 1 != 0
        v = _number(words, picked, zero, PLACE, BITS, KIND, DTYPE, False, POINT)
        return _times(v, scale, scale * (POINT - ZERO_POINT), ROUNDS, REST)
    elif WHOLE:
        v = _number(words, picked, zero, PLACE, BITS, KIND, DTYPE, True, 0)
        return _times(v, scale, scale, ROUNDS, False)
    else:
        if ZERO == 1:
            whole = _whole(zero, BITS)
            rest = scale * (whole - zero)
        else:
            whole = _whole(ZERO_POINT - zero / gl.where(scale == 0.0, 1.0, scale), BITS)
            rest = scale * (whole - ZERO_POINT) + zero
        v = _number(words, picked, whole, PLACE, BITS, KIND, DTYPE, True, 0)
        return _times(v, scale, rest, ROUNDS, True)
