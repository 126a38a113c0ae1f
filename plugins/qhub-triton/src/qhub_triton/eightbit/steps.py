"""What the kernels of this area share: a magnitude that keeps NaN, the step of a scheme, the code of an input.

``KIND``: 0 for int8, 1 for E4M3, 2 for E5M2. ``POWERS``: 0 for a float32 step, 1 rounded up to a power of two, 2 the
power of two of OCP's formats, 3 that of a rounded mantissa (:class:`qhub.layouts.Activation`, ``scale_format``).
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "code_of",
    "code_value",
    "inverse_of",
    "magnitude_bits",
    "magnitude_of",
    "power_value",
    "prefetch",
    "step_of",
]


@triton.jit
def magnitude_bits(x):
    """Return |x| of 16-bit floats as an int32 that orders like it; NaN is above infinity, so a maximum keeps it."""
    return x.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF


@triton.jit
def magnitude_of(bits, DTYPE: tl.constexpr):
    """Return what :func:`magnitude_bits` was made of, in float32."""
    return bits.to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)


@triton.jit
def power_value(exponent):
    """Return 2^exponent in float32, for an int32 in -127 to 127."""
    bits = tl.where(exponent <= -127, 0x00400000, (exponent + 127) << 23)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def step_of(absmax, TOP: tl.constexpr, SHIFT: tl.constexpr, LIMIT: tl.constexpr, POWERS: tl.constexpr):
    """Return the scale of values up to ``absmax``: that over ``TOP``, or a power of two.

    ``SHIFT``: the exponent of the largest code, as frexp counts. ``LIMIT``: larger magnitudes saturate; 0: none do.
    """
    if LIMIT > 0:
        absmax = tl.where(absmax > LIMIT, LIMIT, absmax)
    if POWERS < 2:
        value = tl.div_rn(absmax, tl.zeros_like(absmax) + TOP)
    else:
        value = absmax
    if POWERS > 0:
        bits = value.to(tl.int32, bitcast=True)
        exponent, mantissa = bits >> 23, bits & 0x7FFFFF
        if POWERS == 1:
            # Subnormals count from 2^-127 up; a mantissa makes a normal number more than its power of two.
            small = tl.where(mantissa > 0x400000, -126, -127)
            power = tl.where(exponent == 0, small, exponent - 127 + tl.where(mantissa > 0, 1, 0))
        else:
            power = exponent - 126 - SHIFT
            if POWERS == 3:
                power += tl.where(mantissa >= 0x600000, 1, 0)
        power = tl.minimum(tl.maximum(power, -127), 127)
        value = tl.where(absmax == 0, 1.0, power_value(power))
    return value


@triton.jit
def inverse_of(step):
    """Return 1 / step, for :func:`code_of`; steps too small for one are taken for 2^-120, which their codes survive."""
    step = tl.where(step == 0, 1.0, tl.where(step < 7.52316384526264e-37, 7.52316384526264e-37, step))
    return tl.div_rn(tl.zeros_like(step) + 1.0, step)


@triton.jit
def _rounded_code(ratio, LARGEST: tl.constexpr, KIND: tl.constexpr):
    """Return the int8 or float8 nearest to ``ratio``, ties to even; beyond ``LARGEST`` saturates, NaN stays a NaN."""
    if KIND == 0:
        # Adding 1.5 * 2^23 leaves no bits below one: the sum is rounded half to even.
        whole = (ratio + 12582912.0) - 12582912.0
        code = tl.minimum(tl.maximum(whole, -LARGEST - 1.0), LARGEST).to(tl.int8)
    else:
        bounded = tl.clamp(ratio, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
        if KIND == 1:
            code = bounded.to(tl.float8e4nv)
        else:
            code = bounded.to(tl.float8e5)
    return code


@triton.jit
def code_of(x, step, inverse, LARGEST: tl.constexpr, KIND: tl.constexpr):
    """Return the code of ``x`` float32: x / step rounded, with the division's own rounding.

    One correction by the remainder makes the product with the inverse what IEEE division gives (Markstein 1990), in
    three operations instead of a dozen.
    """
    ratio = x * inverse
    ratio = tl.fma(tl.fma(-ratio, tl.zeros_like(ratio) + step, x), tl.zeros_like(ratio) + inverse, ratio)
    return _rounded_code(ratio, LARGEST, KIND)


@triton.jit
def code_value(code):
    """Return an int8 or float8 as float32."""
    if code.dtype == tl.int8:
        # 2^23 + (code + 128), put together as bits: GPUs convert integers at a quarter of the rate of other arithmetic.
        bits = code.to(tl.uint8, bitcast=True).to(tl.int32) ^ 0x4B000080
        value = bits.to(tl.float32, bitcast=True) - 8388736.0
    else:
        value = code.to(tl.float32)
    return value


@triton.jit
def prefetch(at):
    """Ask for the lines at ``at`` to be brought into the L2 cache of an NVIDIA GPU."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )
