"""Device functions that turn stored numbers into float32: packed codes, 8-bit floats, scales under scales.

Every operation is that of the layouts in torch, one rounding each and in the same order, so that results agree in the
last bit; kernels that call these are compiled without contraction to fused multiply-adds.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["float8_value", "formula", "level_value", "rounded", "spread", "times", "unpacked"]

# The interpreter cuts float32 off where it makes bfloat16 of it.
_CUTS = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """Return float32 ``x`` in ``DTYPE``, rounded to nearest even."""
    if _CUTS and DTYPE == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        nearest = bits + 0x7FFF + ((bits >> 16) & 1)
        # A NaN stays one, whatever its payload.
        nearest = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, bits | 0x00400000, nearest)
        return (nearest >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(DTYPE)


@triton.jit
def float8_value(code, FORMAT: tl.constexpr):
    """Return in float32 what ``code``, an int32 from 0 to 255, stands for in one of torch's 8-bit float formats.

    ``FORMAT``: what follows ``float8_`` in torch's name. By integer operations, which every GPU has.
    """
    if FORMAT == "e8m0fnu":
        # The exponent of a float32; 0 stands for a number below the normal ones.
        bits = tl.where(code == 0, 0x00400000, code << 23)
        return tl.where(code == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)
    else:
        # The exponent's bias is made up for by a power of two; numbers below the normal ones come out right too.
        magnitude = code & 0x7F
        if FORMAT == "e4m3fn":
            value = (magnitude << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
            value = tl.where(magnitude == 0x7F, float("nan"), value)
        elif FORMAT == "e4m3fnuz":
            value = (magnitude << 20).to(tl.float32, bitcast=True) * 6.64613997892458e35  # 2^119
        elif FORMAT == "e5m2":
            value = (magnitude << 21).to(tl.float32, bitcast=True) * 5.192296858534828e33  # 2^112
            value = tl.where(magnitude == 0x7C, float("inf"), value)
            value = tl.where(magnitude > 0x7C, float("nan"), value)
        else:
            value = (magnitude << 21).to(tl.float32, bitcast=True) * 2.596148429267414e33  # 2^111
        bits = value.to(tl.int32, bitcast=True) | ((code & 0x80) << 24)
        value = bits.to(tl.float32, bitcast=True)
        if FORMAT == "e4m3fnuz" or FORMAT == "e5m2fnuz":
            # No negative zero: its code is the NaN.
            value = tl.where(code == 0x80, float("nan"), value)
        return value


@triton.jit
def unpacked(q_ptr, words, mask, BITS: tl.constexpr, ALIGNED: tl.constexpr):
    """Return the codes of the eights ``words`` (W,) of the row at ``q_ptr`` as int32 (8 W,).

    Eight codes of ``BITS`` bits are that many bytes. ``ALIGNED``: whether the row starts at a multiple of
    ``BITS & -BITS`` bytes, so that a word of that size can be loaded.
    """
    W: tl.constexpr = words.shape[0]
    if ALIGNED and BITS == 4:
        low = tl.load(q_ptr.to(tl.pointer_type(tl.int32)) + words, mask=mask, other=0)
    elif ALIGNED and BITS == 2:
        low = tl.load(q_ptr.to(tl.pointer_type(tl.int16)) + words, mask=mask, other=0).to(tl.int32)
    else:
        place = q_ptr + words * BITS
        low = tl.load(place, mask=mask, other=0).to(tl.int32)
        if BITS > 1:
            low |= tl.load(place + 1, mask=mask, other=0).to(tl.int32) << 8
        if BITS > 2:
            low |= tl.load(place + 2, mask=mask, other=0).to(tl.int32) << 16
        if BITS > 3:
            low |= tl.load(place + 3, mask=mask, other=0).to(tl.int32) << 24
    lane = tl.arange(0, 8)
    if BITS <= 4:
        codes = (low[:, None] >> (lane * BITS)[None, :]) & ((1 << BITS) - 1)
    else:
        long = low.to(tl.int64) & 0xFFFFFFFF
        long |= tl.load(place + 4, mask=mask, other=0).to(tl.int64) << 32
        if BITS > 5:
            long |= tl.load(place + 5, mask=mask, other=0).to(tl.int64) << 40
        if BITS > 6:
            long |= tl.load(place + 6, mask=mask, other=0).to(tl.int64) << 48
        codes = ((long[:, None] >> (lane * BITS).to(tl.int64)[None, :]) & ((1 << BITS) - 1)).to(tl.int32)
    return tl.reshape(codes, (8 * W,))


@triton.jit
def spread(values, EIGHTS: tl.constexpr):
    """Return ``values`` (W,) eight times each, (8 W,), if ``EIGHTS``."""
    if EIGHTS:
        W: tl.constexpr = values.shape[0]
        return tl.reshape(tl.broadcast_to(values[:, None], (W, 8)), (8 * W,))
    else:
        return values


@triton.jit
def level_value(
    ptr, super_ptr, table_ptr, offset_ptr, place, index, mask,
    STORED: tl.constexpr, GROUP: tl.constexpr, DIVIDE: tl.constexpr,
):  # fmt: skip
    """Return in float32 the scales (or zeros) ``index`` of a tensor, plain or nested, which lie at ``place``.

    ``STORED``: ``"number"`` for what converts to float32 exactly, or the name of an 8-bit float format (bytes).
    ``super_ptr``: second-level scales, None for plain ones; ``GROUP``: how many share one, 0 for all; ``DIVIDE``:
    whether they divide. ``table_ptr``: codes are places in it; ``offset_ptr``: one number that is added; None: not.
    """
    code = tl.load(ptr + place, mask=mask, other=0)
    if table_ptr is not None:
        value = tl.load(table_ptr + code.to(tl.int32), mask=mask, other=0.0)
    elif STORED == "number":
        value = code.to(tl.float32)
    else:
        value = float8_value(code.to(tl.int32), STORED)
    if super_ptr is not None:
        if GROUP == 0:
            second = tl.load(super_ptr).to(tl.float32)
        else:
            second = tl.load(super_ptr + index // GROUP, mask=mask, other=1.0).to(tl.float32)
        value = tl.div_rn(value, second + tl.zeros_like(value)) if DIVIDE else value * second
    if offset_ptr is not None:
        value = value + tl.load(offset_ptr)
    return value


@triton.jit
def formula(
    value, scale, zero, zero_point, unit,
    ZERO: tl.constexpr, HAS_POINT: tl.constexpr, HAS_UNIT: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Return the weights float32 of codes ``value`` float32, each step of an affine layout's formula in ``DTYPE``."""
    if ZERO == "value":
        value = rounded(value - rounded(zero, DTYPE).to(tl.float32), DTYPE).to(tl.float32)
    elif HAS_POINT:
        value = rounded(value - zero_point, DTYPE).to(tl.float32)
    value = rounded(value * scale, DTYPE).to(tl.float32)
    if ZERO == "offset":
        value = rounded(value + rounded(zero, DTYPE).to(tl.float32), DTYPE).to(tl.float32)
    if HAS_UNIT:
        value = rounded(value * unit, DTYPE).to(tl.float32)
    return value


@triton.jit
def times(value, factor, DIVIDE: tl.constexpr):
    """Return ``value`` times ``factor``, or divided by it; a divisor of 0 counts as 1."""
    if DIVIDE:
        factor = tl.where(factor == 0.0, 1.0, factor)
        return tl.div_rn(value, factor + tl.zeros_like(value))
    else:
        return value * factor
