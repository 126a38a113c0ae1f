"""The product for few rows of input: every weight is read once, and goes to the matrix units with one shift.

A program computes 16 * TALL rows of the output, its warps share the columns among them, and each warp reads 16-byte
pieces of a tile that are the fragments its matrix unit wants: the order of K is chosen to that end, for the codes and
the input alike, which a sum over K does not mind. So nothing passes through shared memory but the sums of the warps at
the end. Weights stay whole numbers in the product; scales and zeros come after it, in float32:

    y = sum_g scale_g * (sum_k code_k x_k - zero_g * sum_k x_k) + offset_g * sum_k x_k
"""

from __future__ import annotations

import triton
import triton.language as tl

from qhub_triton.dense.registers import looked_up
from qhub_triton.tiled.decode import INTEGER, entries, in_registers, numbers, offset_of, ones
from qhub_triton.tiled.groups import group_scales, group_zeros, run_of

__all__ = ["few"]


@triton.jit
def _fragments(t, ROWS: tl.constexpr, WARPS: tl.constexpr):
    """Return (WARPS, ROWS, 32) in the order of K in which 16 bytes are one lane's share of a matrix fragment."""
    return t.reshape(WARPS, ROWS, 4, 2, 4).permute(0, 1, 3, 2, 4).reshape(WARPS, ROWS, 32)


@triton.jit
def _pieces(pointer, base, warp, BLOCKS, WARPS: tl.constexpr, TALL: tl.constexpr, AHEAD: tl.constexpr):
    """Return the words of AHEAD blocks for each warp from ``base`` on, in pieces (8, WARPS, 32) of eight rows."""
    read = ()
    for i in tl.static_range(AHEAD):
        known = (base + i * WARPS + warp < BLOCKS)[None, :, None]
        for piece in tl.static_range(2 * TALL):
            read = read + (tl.load(pointer + (base + i * WARPS) * 2048 + piece * 256, mask=known, other=0),)
    return read


@triton.jit
def _words(pieces, i: tl.constexpr, WARPS: tl.constexpr, TALL: tl.constexpr):
    """Return the words (WARPS, 16 * TALL, 32) of the block ``i`` of ``pieces``.

    Put together here, and not where they are read: the compiler looks for it between loop and product.
    """
    if TALL == 1:
        return tl.join(pieces[2 * i], pieces[2 * i + 1]).permute(1, 3, 0, 2).reshape(WARPS, 16, 32)
    else:
        both = tl.join(tl.join(pieces[4 * i], pieces[4 * i + 1]), tl.join(pieces[4 * i + 2], pieces[4 * i + 3]))
        return both.permute(1, 4, 3, 0, 2).reshape(WARPS, 32, 32)


@triton.jit
def _inputs(x, m0, k, M, K, stride_xm, WARPS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Return x (WARPS, BLOCK_M, 32) of rows from ``m0`` and columns from ``k`` (WARPS,), eight rows a load."""
    p = k[None, :, None] + tl.arange(0, 32)[None, None, :]
    m = (m0 + tl.arange(0, 8))[:, None, None]
    x += p
    # In 64 bits: an input may have more than 2^31 elements.
    m = m.to(tl.int64)
    a = tl.load(x + m * stride_xm, mask=(m < M) & (p < K), other=0.0)
    if BLOCK_M == 8:
        return a.permute(1, 0, 2)
    else:
        b = tl.load(x + (m + 8) * stride_xm, mask=(m + 8 < M) & (p < K), other=0.0)
        if BLOCK_M == 16:
            return tl.join(a, b).permute(1, 3, 0, 2).reshape(WARPS, 16, 32)
        else:
            c = tl.load(x + (m + 16) * stride_xm, mask=(m + 16 < M) & (p < K), other=0.0)
            d = tl.load(x + (m + 24) * stride_xm, mask=(m + 24 < M) & (p < K), other=0.0)
            both = tl.join(tl.join(a, b), tl.join(c, d))
            return both.permute(1, 4, 3, 0, 2).reshape(WARPS, 32, 32)


@triton.jit
def _halves(row, TALL: tl.constexpr):
    """Return the first and the second 16 of 32 rows; all 16, twice."""
    if TALL == 1:
        return row, row
    else:
        return tl.split(row.reshape(2, 16).trans(1, 0))


@triton.jit
def _whole(upper, lower):
    """Return (WARPS, 32) from two halves (WARPS, 16).

    Read in halves, scales are so few that each thread reads those it needs; whole, they would be read once and handed
    round through shared memory, with a barrier at every turn.
    """
    return tl.join(upper, lower).permute(0, 2, 1).reshape(upper.shape[0], 32)


@triton.jit
def _turn(
    acc, pieces, x, scales, zeros, table, held, supers, super_table, super_offset, zero_supers, row, warp, base, m0,
    M, K, GROUPS, stride_xm,
    BITS: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, ZERO_POINT: tl.constexpr,
    NESTED: tl.constexpr, ZERO_NESTED: tl.constexpr, NATIVE: tl.constexpr,
    WARPS: tl.constexpr, TALL: tl.constexpr, AHEAD: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Return ``acc`` (WARPS, 16 * TALL, BLOCK_M) plus the products of the blocks in ``pieces``, from ``base`` on."""
    P: tl.constexpr = 16 // BITS
    WIDE: tl.constexpr = BITS == 8 and KIND == INTEGER and x.dtype.element_ty == tl.bfloat16
    # Slices of one block whose weights share their scales.
    RUN: tl.constexpr = run_of(P, GROUP)
    HEIGHT: tl.constexpr = 16 * TALL
    DTYPE: tl.constexpr = x.dtype.element_ty
    OFFSET: tl.constexpr = offset_of(KIND, BITS, DTYPE == tl.float16, NATIVE) * (17 if WIDE else 1)
    for i in tl.static_range(AHEAD):
        block = base + i * WARPS + warp
        codes = _fragments(_words(pieces, i, WARPS, TALL), HEIGHT, WARPS)
        if in_registers(KIND, BITS, NATIVE):
            picked = looked_up(codes, held, DTYPE)
        for run in tl.static_range(P // RUN):
            d = tl.zeros((WARPS, HEIGHT, BLOCK_M), tl.float32)
            e = tl.zeros((WARPS, HEIGHT, BLOCK_M), tl.float32)
            sums = tl.zeros((WARPS, HEIGHT, BLOCK_M), tl.float32)
            for place in tl.static_range(run * RUN, run * RUN + RUN):
                k = (block * P + place) * 32
                xv = _inputs(x, m0, k, M, K, stride_xm, WARPS, BLOCK_M)
                xv = _fragments(xv, BLOCK_M, WARPS).permute(0, 2, 1)
                if WIDE:
                    d = tl.dot(numbers(codes, table, place, BITS, KIND, DTYPE, NATIVE, 0), xv, d)
                    e = tl.dot(numbers(codes, table, place, BITS, KIND, DTYPE, NATIVE, 1), xv, e)
                elif in_registers(KIND, BITS, NATIVE):
                    d = tl.dot(picked[place], xv, d)
                else:
                    d = tl.dot(numbers(codes, table, place, BITS, KIND, DTYPE, NATIVE), xv, d)
                if KIND == INTEGER:
                    sums = tl.dot(ones(WARPS, HEIGHT, DTYPE), xv, sums)
            if WIDE:
                d += 16.0 * e
            group = (block * P + run * RUN) * 32 // GROUP
            known = (group < GROUPS)[:, None]
            upper, lower = _halves(row, TALL)
            scale = group_scales(scales, supers, super_table, super_offset, upper, group, GROUPS, known, NESTED)
            if TALL == 2:
                below = group_scales(scales, supers, super_table, super_offset, lower, group, GROUPS, known, NESTED)
                scale = _whole(scale, below)
            scale = scale[:, :, None]
            if KIND != INTEGER:
                acc += scale * d
            elif ZERO == 0:
                acc += scale * (d - (OFFSET + ZERO_POINT) * sums)
            else:
                zero = group_zeros(zeros, zero_supers, upper, group, GROUPS, known, ZERO_NESTED)
                if TALL == 2:
                    below = group_zeros(zeros, zero_supers, lower, group, GROUPS, known, ZERO_NESTED)
                    zero = _whole(zero, below)
                zero = zero[:, :, None]
                if ZERO == 1:
                    acc += scale * (d - (OFFSET + zero) * sums)
                else:
                    acc += scale * (d - (OFFSET + ZERO_POINT) * sums) + zero * sums
    return acc


@triton.jit(do_not_specialize=["M"])
def few(
    x, words, scales, zeros, table, supers, super_table, super_offset, zero_supers, bias, y,
    M, N, K, BLOCKS, GROUPS, stride_xm, stride_ym,
    BITS: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, ZERO_POINT: tl.constexpr,
    UNIT: tl.constexpr, NESTED: tl.constexpr, ZERO_NESTED: tl.constexpr, HAS_BIAS: tl.constexpr,
    NATIVE: tl.constexpr, OVERLAP: tl.constexpr,
    WARPS: tl.constexpr, TALL: tl.constexpr, AHEAD: tl.constexpr, TURNS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Compute y (M, N) = x (M, K) @ W.T; a program: 16 * TALL columns of y, BLOCK_M rows.

    GROUP: weights of a row that share a scale, a multiple of 32 or all. AHEAD: blocks of each warp in a turn. TURNS:
    how many there are, 0 for any number. OVERLAP: the first weights are read while the kernel before, which makes x,
    still runs.
    """
    HEIGHT: tl.constexpr = 16 * TALL
    STEP: tl.constexpr = WARPS * AHEAD
    n0 = tl.program_id(0) * HEIGHT
    m0 = tl.program_id(1) * BLOCK_M
    m = m0 + tl.arange(0, BLOCK_M)
    warp = tl.arange(0, WARPS)
    p = tl.arange(0, 32)
    tile = words + (n0 // 64).to(tl.int64) * BLOCKS * 2048 + (n0 % 64) * 32
    pointer = tile + (warp * 2048)[None, :, None] + (tl.arange(0, 8) * 32)[:, None, None] + p[None, None, :]
    row = n0 + tl.arange(0, HEIGHT)
    acc = tl.zeros((WARPS, HEIGHT, BLOCK_M), tl.float32)
    held = entries(table, KIND, BITS, NATIVE)
    if TURNS == 0:
        if OVERLAP:
            tl.extra.cuda.gdc_launch_dependents()
            tl.extra.cuda.gdc_wait()
        for base in range(0, BLOCKS, STEP):
            here = _pieces(pointer, base, warp, BLOCKS, WARPS, TALL, AHEAD)
            acc = _turn(
                acc, here, x, scales, zeros, table, held, supers, super_table, super_offset, zero_supers, row, warp,
                base, m0, M, K, GROUPS, stride_xm, BITS, KIND, GROUP, ZERO, ZERO_POINT, NESTED, ZERO_NESTED, NATIVE,
                WARPS, TALL, AHEAD, BLOCK_M,
            )  # fmt: skip
    else:
        # Unrolled: what is carried round a loop would be taken apart, two words of 16 bits, and put together again.
        here = _pieces(pointer, 0, warp, BLOCKS, WARPS, TALL, AHEAD)
        if OVERLAP:
            tl.extra.cuda.gdc_launch_dependents()
            tl.extra.cuda.gdc_wait()
        for turn in tl.static_range(TURNS):
            there = here
            if turn + 1 < TURNS:
                there = _pieces(pointer, (turn + 1) * STEP, warp, BLOCKS, WARPS, TALL, AHEAD)
            acc = _turn(
                acc, here, x, scales, zeros, table, held, supers, super_table, super_offset, zero_supers, row, warp,
                turn * STEP, m0, M, K, GROUPS, stride_xm, BITS, KIND, GROUP, ZERO, ZERO_POINT, NESTED, ZERO_NESTED,
                NATIVE, WARPS, TALL, AHEAD, BLOCK_M,
            )  # fmt: skip
            here = there
    out = tl.sum(acc, axis=0) * UNIT
    if HAS_BIAS:
        out += tl.load(bias + row, mask=row < N, other=0.0).to(tl.float32)[:, None]
    where = y + m.to(tl.int64)[None, :] * stride_ym + row[:, None]
    tl.store(where, out.to(y.dtype.element_ty), mask=(m < M)[None, :] & (row < N)[:, None])
