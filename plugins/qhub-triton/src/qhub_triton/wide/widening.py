"""Words of a tile to weights in the matrix units' left operand, in Gluon: what ``tiled/operands.py`` is in Triton.

The instructions are those of ``tiled/``; a weight is rounded once here too.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from qhub_triton.tiled.decode import INTEGER, TABLE, field, float8, offset_of
from qhub_triton.tiled.operands import TINY, as_subnormal, subnormal
from qhub_triton.tiled.registers import lookup, lookup_kinds

__all__ = ["entries", "looked_up", "weights"]


@gluon.jit
def entries(table, KIND: gl.constexpr, ROWS: gl.constexpr, A: gl.constexpr):
    """Return the bytes of a table of 16 numbers, 8 tensors (ROWS, 32) int32 of one value each; none for other kinds."""
    read = ()
    if KIND == TABLE:
        for i in gl.static_range(8):
            read = read + (gl.full((ROWS, 32), gl.load(table + i), gl.int32, A),)
    return read


@gluon.jit
def looked_up(words, held, KIND: gl.constexpr, DTYPE: gl.constexpr):
    """Return the numbers at places 0 to 3 of ``words`` where ``held`` is a table, see :func:`entries`; else nothing."""
    picked = ()
    if KIND == TABLE:
        args = [words, held[0], held[1], held[2], held[3], held[4], held[5], held[6], held[7]]
        if DTYPE == gl.float16:
            picked = gl.inline_asm_elementwise(
                lookup(), lookup_kinds(), args, (gl.float16, gl.float16, gl.float16, gl.float16), True, 2
            )
        else:
            picked = gl.inline_asm_elementwise(
                lookup(), lookup_kinds(), args, (gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16), True, 2
            )
    return picked


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
        return picked[PLACE]
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
def weights(
    words, picked, scale, zero, PLACE: gl.constexpr, BITS: gl.constexpr, KIND: gl.constexpr, DTYPE: gl.constexpr,
    ZERO: gl.constexpr, ZERO_POINT: gl.constexpr, WHOLE: gl.constexpr, ROUNDS: gl.constexpr,
):  # fmt: skip
    """Return the weights at PLACE of ``words`` (ROWS, 32) int16 in DTYPE, times 2^-TINY where they are made of
    subnormal numbers (:func:`qhub_triton.tiled.operands.as_subnormal`).

    ``scale``, ``zero``: (ROWS,) float32; constants as in :func:`qhub_triton.tiled.many.many`; ROUNDS: scales are no
    numbers of DTYPE. Zeros and offsets that are no whole numbers are split as ``tiled/operands.py`` says.
    """
    if as_subnormal(KIND, BITS, DTYPE == gl.float16, True, ZERO, ZERO_POINT):
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
