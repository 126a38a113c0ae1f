"""Rotations of inputs and outputs in one launch, as two products with Hadamard matrices.

A vector of size a * b seen as a matrix (a, b) is rotated by ``A @ X @ B``: B is Sylvester's matrix of size b, A that of
a / q times the first factor's of size q. Each program makes 16 rows of the result. The matrices hold 1 and -1, exact in
bfloat16; what meets them is split into two bfloat16, which carry 16 bits of its mantissa: an entry is off by 2^-17 at
most, a hundredth of what rounding to bfloat16 costs.

Inputs become float16, times a power of two for each row of x, so that none overflows: a rotation leaves the length of a
vector as it is, which is at most the square root of its size times its largest entry.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["narrow_kernel", "rotate_kernel"]


@triton.jit
def _dot(a, b, acc, WIDE: tl.constexpr):
    """Return acc + a @ b; ``WIDE``: in float32, for triton's interpreter, which has no bfloat16 products."""
    if WIDE:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc)


@triton.jit
def _signs(i, j):
    """Return Sylvester's entries: -1 where i and j share an odd number of bits, else 1."""
    both = i & j
    both = both ^ (both >> 16)
    both = both ^ (both >> 8)
    both = both ^ (both >> 4)
    # The parity of four bits is a bit of 0x6996.
    return (1 - 2 * ((0x6996 >> (both & 15)) & 1)).to(tl.float32)


@triton.jit
def _power(largest, spread):
    """Return 2^e and 2^-e: ``largest`` * 2^(spread + e) lies below 2^15, and not far; float16 ends at 2^16."""
    exponent = ((largest.to(tl.int32, bitcast=True) >> 23) & 255) - 126 + spread
    exponent = tl.maximum(exponent, -100)
    # Exponents of float32 are stored with 127 added.
    up = ((15 - exponent + 127) << 23).to(tl.float32, bitcast=True)
    down = ((exponent - 15 + 127) << 23).to(tl.float32, bitcast=True)
    return up, down


@triton.jit
def rotate_kernel(
    x, out, lengths, sums, divisor, before, factor, after, bias, scales, size, tall, rest, q, spread, scale_rows,
    HAS_DIVISOR: tl.constexpr, HAS_BEFORE: tl.constexpr, HAS_FACTOR: tl.constexpr, HAS_AFTER: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SCALES: tl.constexpr, ONE_SCALE: tl.constexpr, NARROW: tl.constexpr, WIDE: tl.constexpr,
    OVERLAP: tl.constexpr, NORM: tl.constexpr, RA: tl.constexpr, CA: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Write ``out`` (M, size): row m of ``x`` divided, scaled, rotated, scaled, biased.

    ``tall``: a, the rows of the matrix view; ``rest``: a / q; ``NORM``: what the sums are multiplied by.
    ``HAS_SCALES``: before all else entry n is multiplied by ``scales[n // scale_rows]``, and row m by ``lengths[m]``;
    ``ONE_SCALE``: there is but one.
    ``NARROW``:
    each row times a power of two, whose inverse goes to ``lengths`` (M,); ``spread``: 2^spread is at least the square
    root of the size. ``sums`` (M, programs, 2) gets what the program's results add up to: those in the first half of
    each four, and the others.
    """
    m = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * RA + tl.arange(0, RA)
    j = tl.arange(0, B)
    acc = tl.zeros([RA, B], tl.float32)
    largest = tl.zeros([CA, B], tl.float32)
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    length = 1.0
    if HAS_SCALES:
        length = tl.load(lengths + m)
        if ONE_SCALE:
            length *= tl.load(scales).to(tl.float32)
    for start in range(0, tall, CA):
        c = start + tl.arange(0, CA)
        at = c[:, None] * B + j[None, :]
        inside = c[:, None] < tall
        v = tl.load(x + m * size + at, mask=inside, other=0.0).to(tl.float32)
        if HAS_DIVISOR:
            d = tl.load(divisor + at, mask=inside, other=1.0).to(tl.float32)
            v = v / tl.where(d == 0.0, 1.0, d)
        if HAS_SCALES:
            v = v * length
            if not ONE_SCALE:
                v = v * tl.load(scales + at // scale_rows, mask=inside, other=0.0).to(tl.float32)
        if HAS_BEFORE:
            v = v * tl.load(before + at, mask=inside, other=0.0).to(tl.float32)
        if NARROW:
            largest = tl.maximum(largest, tl.abs(v))
        if HAS_FACTOR:
            signs = _signs((i % rest)[:, None], (c % rest)[None, :])
            entry = (i // rest)[:, None] * q + (c // rest)[None, :]
            known = (i < tall)[:, None] & (c < tall)[None, :]
            signs = signs * tl.load(factor + entry, mask=known, other=0).to(tl.float32)
        else:
            signs = _signs(i[:, None], c[None, :])
        signs = signs.to(tl.bfloat16)
        high = v.to(tl.bfloat16)
        low = (v - high.to(tl.float32)).to(tl.bfloat16)
        acc = _dot(signs, high, _dot(signs, low, acc, WIDE), WIDE)
    high = acc.to(tl.bfloat16)
    low = (acc - high.to(tl.float32)).to(tl.bfloat16)
    right = _signs(j[:, None], j[None, :]).to(tl.bfloat16)
    y = _dot(high, right, _dot(low, right, tl.zeros([RA, B], tl.float32), WIDE), WIDE) * NORM
    at = i[:, None] * B + j[None, :]
    inside = (i[:, None] < tall) & (j[None, :] >= 0)
    if HAS_AFTER:
        y = y * tl.load(after + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y = y + tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)
    if NARROW:
        up, down = _power(tl.max(tl.max(largest, 1), 0), spread)
        narrow = (y * up).to(tl.float16)
        tl.store(out + m * size + at, narrow, mask=inside)
        tl.store(lengths + m, down, mask=tl.program_id(0) == 0)
        y = tl.where(inside, narrow.to(tl.float32), 0.0)
        far = tl.sum(tl.sum(tl.where(j[None, :] % 4 < 2, y, 0.0), 1), 0)
        near = tl.sum(tl.sum(tl.where(j[None, :] % 4 < 2, 0.0, y), 1), 0)
        sums += (m * tl.num_programs(0) + tl.program_id(0)) * 2
        tl.store(sums, far)
        tl.store(sums + 1, near)
    else:
        tl.store(out + m * size + at, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def narrow_kernel(
    x, out, lengths, sums, divisor, before, size,
    HAS_DIVISOR: tl.constexpr, HAS_BEFORE: tl.constexpr, OVERLAP: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Write ``out`` (M, size) float16 and ``lengths`` (M,): row m of ``x`` divided, scaled and times a power of two.

    ``sums`` (M, 1, 2): as of :func:`rotate_kernel`.
    """
    m = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, B)
    inside = k < size
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    v = tl.load(x + m * size + k, mask=inside, other=0.0).to(tl.float32)
    if HAS_DIVISOR:
        d = tl.load(divisor + k, mask=inside, other=1.0).to(tl.float32)
        v = v / tl.where(d == 0.0, 1.0, d)
    if HAS_BEFORE:
        v = v * tl.load(before + k, mask=inside, other=0.0).to(tl.float32)
    up, down = _power(tl.max(tl.abs(v), 0), 0)
    narrow = (v * up).to(tl.float16)
    tl.store(out + m * size + k, narrow, mask=inside)
    tl.store(lengths + m, down)
    v = narrow.to(tl.float32)
    tl.store(sums + m * 2, tl.sum(tl.where(k % 4 < 2, v, 0.0), 0))
    tl.store(sums + m * 2 + 1, tl.sum(tl.where(k % 4 < 2, 0.0, v), 0))
