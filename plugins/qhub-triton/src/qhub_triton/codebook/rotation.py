"""Rotations of inputs and outputs: one launch, float32 to 16 bits of mantissa, as two products with Hadamard matrices.

A vector of size a * b seen as a matrix (a, b) is rotated by ``A @ X @ B``, A the first factor's matrix times Sylvester's
of a / q, B Sylvester's of b. Each program makes 16 rows of the result. The matrices hold 1 and -1, exact in bfloat16;
what meets them is split into two bfloat16 that carry 16 bits of its mantissa, so an entry is off by 2^-17 at most, less
than a tenth of what rounding to bfloat16 costs.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["rotate_kernel"]


@triton.jit
def _sign(i, j):
    """Return Sylvester's entries: -1 where i and j share an odd number of bits, else 1."""
    both = i & j
    both = both ^ (both >> 8)
    both = both ^ (both >> 4)
    both = both ^ (both >> 2)
    both = both ^ (both >> 1)
    return (1 - 2 * (both & 1)).to(tl.float32)


@triton.jit
def _dot(a, b, acc, WIDE: tl.constexpr):
    """Return acc + a @ b; ``WIDE``: in float32, for triton's interpreter, which has no bfloat16 products."""
    if WIDE:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc)


@triton.jit
def rotate_kernel(
    x,
    out,
    divisor,
    before,
    factor,
    after,
    bias,
    size,
    stride,
    tall,
    norm,
    q,
    rest,
    HAS_DIVISOR: tl.constexpr,
    HAS_BEFORE: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    HAS_AFTER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PLANES: tl.constexpr,
    RA: tl.constexpr,
    CA: tl.constexpr,
    B: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Write ``out`` (M, size): row m of ``x``, divided, scaled, rotated, scaled, in planes of every eighth or plain.

    ``tall``: a, the rows of the matrix view; ``rest``: a / q; ``norm``: what the sums are multiplied by.
    """
    m = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * RA + tl.arange(0, RA)
    j = tl.arange(0, B)
    acc = tl.zeros([RA, B], tl.float32)
    for start in range(0, tall, CA):
        c = start + tl.arange(0, CA)
        at = c[:, None] * B + j[None, :]
        inside = c[:, None] < tall
        v = tl.load(x + m * stride + at, mask=inside, other=0.0).to(tl.float32)
        if HAS_DIVISOR:
            v = v / tl.load(divisor + at, mask=inside, other=1.0).to(tl.float32)
        if HAS_BEFORE:
            v = v * tl.load(before + at, mask=inside, other=0.0).to(tl.float32)
        if HAS_FACTOR:
            signs = _sign((i % rest)[:, None], (c % rest)[None, :])
            entry = (i // rest)[:, None] * q + (c // rest)[None, :]
            known = (i < tall)[:, None] & (c < tall)[None, :]
            signs = signs * tl.load(factor + entry, mask=known, other=0).to(tl.float32)
        else:
            signs = _sign(i[:, None], c[None, :])
        signs = signs.to(tl.bfloat16)
        high = v.to(tl.bfloat16)
        low = (v - high.to(tl.float32)).to(tl.bfloat16)
        acc = _dot(signs, high, _dot(signs, low, acc, WIDE), WIDE)
    high = acc.to(tl.bfloat16)
    low = (acc - high.to(tl.float32)).to(tl.bfloat16)
    right = _sign(j[:, None], j[None, :]).to(tl.bfloat16)
    y = _dot(high, right, _dot(low, right, tl.zeros([RA, B], tl.float32), WIDE), WIDE) * norm
    at = i[:, None] * B + j[None, :]
    inside = i[:, None] < tall
    if HAS_AFTER:
        y = y * tl.load(after + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y = y + tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)
    if PLANES:
        at = (at % 8) * (size // 8) + at // 8
    tl.store(out + m * size + at, y.to(out.dtype.element_ty), mask=inside)
