"""Rotations of inputs and outputs in one launch, as two products with Hadamard matrices.

A vector of size a * b seen as a matrix (a, b) is rotated by ``A @ X @ B``: B is Sylvester's matrix of size b, A that of
a / q times the first factor's of size q. A program makes some rows of the result, for which it needs all of X. The
matrices hold 1 and -1, exact in bfloat16; what meets them on matrix units is split into two bfloat16, which carry 16
bits of its mantissa: an entry is off by 2^-17 at most, a hundredth of what rounding to bfloat16 costs.

Few vectors: A's few rows are multiplied in float32 by a program that reads all of X at once (:func:`row_kernel`), and
what does not depend on the kernel before it is made ready while that one runs. Many: 16 rows and more on matrix units
(:func:`rotate_kernel`).

Inputs become float16, times a power of two for each row of x, so that none overflows: a rotation leaves the length of a
vector as it is, which is at most the square root of its size times its largest entry.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["narrow_kernel", "rotate_kernel", "row_kernel"]


@triton.jit
def _dot(a, b, acc, WIDE: tl.constexpr):
    """Return acc + a @ b; ``WIDE``: in float32, for triton's interpreter, which has no bfloat16 products."""
    if WIDE:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc)


@triton.jit
def _halves(v):
    """Return two bfloat16 that add up to ``v``, up to 2^-17 of it."""
    # Rounded as an integer: what converts one float32 to bfloat16 is slow, what converts two at once is not.
    top = ((v.to(tl.int32, bitcast=True) + 0x8000) & -0x10000).to(tl.float32, bitcast=True)
    return top.to(tl.bfloat16), (v - top).to(tl.bfloat16)


@triton.jit
def _odd(i, j):
    """Return whether i and j share an odd number of bits: 0 or 1."""
    both = i & j
    both = both ^ (both >> 16)
    both = both ^ (both >> 8)
    both = both ^ (both >> 4)
    # The parity of four bits is a bit of 0x6996.
    return (0x6996 >> (both & 15)) & 1


@triton.jit
def _signs(i, j, negative):
    """Return Sylvester's entries: -1 where i and j share an odd number of bits, else 1; negated by a 1."""
    # In two parts: a thread's neighbours have one in common each, which the compiler then makes once for all of them.
    odd = _odd(i >> 3, j >> 3) ^ _odd(i & 7, j & 7) ^ negative
    return ((odd << 31) | 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit
def _left(i, c, factor, known, rest, q, HAS_FACTOR: tl.constexpr):
    """Return the left matrix's entries (i, c): the factor's (q, q) times Sylvester's (rest, rest)."""
    if not HAS_FACTOR:
        return _signs(i, c, 0)
    else:
        entry = tl.load(factor + (i // rest) * q + c // rest, mask=known, other=0)
        if entry.dtype == tl.int8:
            # 1 or -1.
            return _signs(i % rest, c % rest, (entry.to(tl.int32) >> 31) & 1)
        else:
            return _signs(i % rest, c % rest, 0) * entry.to(tl.float32)


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
def _multiplier(
    divisor, before, scales, at, inside, scale_rows,
    HAS_DIVISOR: tl.constexpr, HAS_BEFORE: tl.constexpr, HAS_SCALES: tl.constexpr,
):  # fmt: skip
    """Return what the entries ``at`` are multiplied by before their rotation; a divisor of 0 counts as 1."""
    times = tl.load(before + at, mask=inside, other=0.0).to(tl.float32) if HAS_BEFORE else 1.0
    if HAS_DIVISOR:
        d = tl.load(divisor + at, mask=inside, other=1.0).to(tl.float32)
        times = times / tl.where(d == 0.0, 1.0, d)
    if HAS_SCALES:
        times = times * tl.load(scales + at // scale_rows, mask=inside, other=0.0).to(tl.float32)
    return times


@triton.jit
def _write_narrow(
    y, where, made, far, largest, out, lengths, sums, m, spread, count, HAS_SUMS: tl.constexpr, SIZE: tl.constexpr
):
    """Write a program's results ``y``, ``SIZE`` in all, as float16, and their sums; ``far``: in a four's first half."""
    up, down = _power(largest, spread)
    narrow = (y * up).to(tl.float16)
    tl.store(out + where, narrow, mask=made)
    tl.store(lengths + m, down, mask=tl.program_id(0) == 0)
    if HAS_SUMS:
        y = tl.where(made, narrow.to(tl.float32), 0.0)
        both = tl.join(tl.where(far, y, 0.0), tl.where(far, 0.0, y))
        both = tl.sum(tl.reshape(both, [SIZE, 2]), 0)
        for slot in range(tl.program_id(0), count, tl.num_programs(0)):
            tl.store(sums + (m * count + slot) * 2 + tl.arange(0, 2), both)
            both = tl.zeros([2], tl.float32)


@triton.jit
def rotate_kernel(
    x, out, lengths, sums, divisor, before, factor, after, bias, scales, size, spread, scale_rows, count, tall, rest, q,
    HAS_DIVISOR: tl.constexpr, HAS_BEFORE: tl.constexpr, HAS_FACTOR: tl.constexpr, HAS_AFTER: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SCALES: tl.constexpr, ONE_SCALE: tl.constexpr, NARROW: tl.constexpr, WIDE: tl.constexpr,
    OVERLAP: tl.constexpr, NORM: tl.constexpr, HAS_SUMS: tl.constexpr, RA: tl.constexpr, CA: tl.constexpr,
    B: tl.constexpr,
):  # fmt: skip
    """Write ``out`` (M, size): row m of ``x`` divided, scaled, rotated, scaled, biased.

    ``tall``: a, the rows of the matrix view; ``rest``: a / q; ``NORM``: what the results are multiplied by.
    ``HAS_SCALES``: before all else entry n is multiplied by ``scales[n // scale_rows]``, and row m by ``lengths[m]``;
    ``ONE_SCALE``: there is but one. ``NARROW``: each row times a power of two, whose inverse goes to ``lengths`` (M,);
    ``spread``: 2^spread is at least the square root of the size. ``sums`` (M, count, 2), with ``HAS_SUMS``: what the
    results add up to in ``count`` parts, as many as programs or more: those in the first half of each four, and the
    others.
    """
    SEVERAL: tl.constexpr = HAS_SCALES and not ONE_SCALE
    TIMES: tl.constexpr = HAS_DIVISOR or HAS_BEFORE or SEVERAL
    m = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * RA + tl.arange(0, RA)
    j = tl.arange(0, B)
    acc = tl.zeros([RA, B], tl.float32)
    largest = tl.zeros([CA, B], tl.float32)
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    length = NORM
    if HAS_SCALES:
        length *= tl.load(lengths + m)
        if ONE_SCALE:
            length *= tl.load(scales).to(tl.float32)
    for start in range(0, tall, CA):
        c = start + tl.arange(0, CA)
        at = c[:, None] * B + j[None, :]
        inside = (c[:, None] < tall) & (j[None, :] >= 0)
        v = tl.load(x + m * size + at, mask=inside, other=0.0).to(tl.float32)
        if TIMES:
            v = v * _multiplier(divisor, before, scales, at, inside, scale_rows, HAS_DIVISOR, HAS_BEFORE, SEVERAL)
        if NARROW:
            largest = tl.maximum(largest, tl.abs(v))
        known = (i < tall)[:, None] & (c < tall)[None, :]
        left, rounding = _halves(_left(i[:, None], c[None, :], factor, known, rest, q, HAS_FACTOR))
        high, low = _halves(v)
        acc = _dot(left, high, _dot(left, low, acc, WIDE), WIDE)
        # Factors of other numbers than 1 and -1 are no bfloat16.
        if HAS_FACTOR and factor.dtype.element_ty != tl.int8:
            acc = _dot(rounding, high, acc, WIDE)
    high, low = _halves(acc)
    right = _signs(j[:, None], j[None, :], 0).to(tl.bfloat16)
    y = _dot(high, right, _dot(low, right, tl.zeros([RA, B], tl.float32), WIDE), WIDE) * length
    at = i[:, None] * B + j[None, :]
    inside = (i[:, None] < tall) & (j[None, :] >= 0)
    if HAS_AFTER:
        y = y * tl.load(after + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y = y + tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)
    if NARROW:
        far = j[None, :] % 4 < 2
        _write_narrow(
            y, at, inside, far, tl.max(largest), out + m * size, lengths, sums, m, spread, count, HAS_SUMS, RA * B
        )
    else:
        tl.store(out + m * size + at, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _entries(i, c, factor, STEP: tl.constexpr, R: tl.constexpr, TALL: tl.constexpr, Q: tl.constexpr, HAS: tl.constexpr):
    """Return the left matrix's entries (i + r * STEP, c), r < R, as a tree: of even r, of odd r."""
    if R == 1:
        return _left(i, c, factor, (i < TALL) & (c < TALL), TALL // Q, Q, HAS)
    else:
        even = _entries(i, c, factor, STEP * 2, R // 2, TALL, Q, HAS)
        return even, _entries(i + STEP, c, factor, STEP * 2, R // 2, TALL, Q, HAS)


@triton.jit
def _products(v, entries, R: tl.constexpr):
    """Return v (CA, B) times ``R`` entries for each of its rows: (CA, B, 2, 2, ...), the lowest bit of r last."""
    if R == 1:
        return v * entries[:, None]
    else:
        return tl.join(_products(v, entries[0], R // 2), _products(v, entries[1], R // 2))


@triton.jit
def row_kernel(
    x, out, lengths, sums, divisor, before, factor, after, bias, scales, size, spread, scale_rows, count,
    HAS_DIVISOR: tl.constexpr, HAS_BEFORE: tl.constexpr, HAS_FACTOR: tl.constexpr, HAS_AFTER: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SCALES: tl.constexpr, ONE_SCALE: tl.constexpr, NARROW: tl.constexpr, WIDE: tl.constexpr,
    OVERLAP: tl.constexpr, NORM: tl.constexpr, HAS_SUMS: tl.constexpr, TALL: tl.constexpr, Q: tl.constexpr,
    R: tl.constexpr, CA: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Do as :func:`rotate_kernel` for few rows: a program makes ``R`` rows (1 to 16) of a vector's (TALL, B).

    ``CA``: rows of x that a step reads; all steps read before the first computes.
    """
    SEVERAL: tl.constexpr = HAS_SCALES and not ONE_SCALE
    TIMES: tl.constexpr = HAS_DIVISOR or HAS_BEFORE or SEVERAL
    m = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * R
    j = tl.arange(0, B)
    r = tl.arange(0, 16)
    where = (first + r)[:, None] * B + j[None, :]
    made = ((r < R) & (first + r < TALL))[:, None] & (j[None, :] >= 0)
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    right = _signs(j[:, None], j[None, :], 0).to(tl.bfloat16)
    if HAS_AFTER:
        behind = tl.load(after + where, mask=made, other=0.0)
    entries, times, read = (), (), ()
    for start in tl.static_range(0, TALL, CA):
        c = start + tl.arange(0, CA)
        at = c[:, None] * B + j[None, :]
        inside = (c[:, None] < TALL) & (j[None, :] >= 0)
        entries += (_entries(first, c, factor, 1, R, TALL, Q, HAS_FACTOR),)
        if TIMES:
            times += (_multiplier(divisor, before, scales, at, inside, scale_rows, HAS_DIVISOR, HAS_BEFORE, SEVERAL),)
    # All that lies before this line is the weight's.
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    for start in tl.static_range(0, TALL, CA):
        c = start + tl.arange(0, CA)
        inside = (c[:, None] < TALL) & (j[None, :] >= 0)
        read += (tl.load(x + m * size + c[:, None] * B + j[None, :], mask=inside, other=0.0),)
    length = NORM
    if HAS_SCALES:
        length *= tl.load(lengths + m)
        if ONE_SCALE:
            length *= tl.load(scales).to(tl.float32)
    if HAS_BIAS:
        shift = tl.load(bias + where, mask=made, other=0.0)
    s, largest = 0.0, 0.0
    for n in tl.static_range(len(read)):
        v = read[n].to(tl.float32)
        if TIMES:
            v = v * times[n]
        s += _products(v, entries[n], R)
        largest = tl.maximum(largest, tl.abs(v))
    s = tl.reshape(tl.sum(s, 0), [B, R])
    # Matrix units take 16 rows: each is there 16 / R times.
    s = tl.broadcast_to(tl.trans(s)[None, :, :], [16 // R, R, B])
    s = tl.reshape(s, [16, B])
    high, low = _halves(s)
    y = _dot(high, right, _dot(low, right, tl.zeros([16, B], tl.float32), WIDE), WIDE) * length
    if HAS_AFTER:
        y = y * behind.to(tl.float32)
    if HAS_BIAS:
        y = y + shift.to(tl.float32)
    if NARROW:
        far = j[None, :] % 4 < 2
        _write_narrow(
            y, where, made, far, tl.max(largest), out + m * size, lengths, sums, m, spread, count, HAS_SUMS, 16 * B
        )
    else:
        tl.store(out + m * size + where, y.to(out.dtype.element_ty), mask=made)


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
