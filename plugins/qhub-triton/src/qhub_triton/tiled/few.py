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

from qhub_triton.tiled.banks import write_banks
from qhub_triton.tiled.registers import by_instructions
from qhub_triton.tiled.turns import pieces, turn

__all__ = ["few"]


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
    rows = ()
    valid = ()
    for eight in tl.static_range(BLOCK_M // 8):
        # In 64 bits: an input may have more than 2^31 elements.
        own = (m0 + eight * 8 + tl.arange(0, 8))[:, None, None].to(tl.int64)
        rows = rows + (x + own * stride_xm,)
        valid = valid + (own < M,)
    if TURNS == 0:
        if OVERLAP:
            tl.extra.cuda.gdc_launch_dependents()
        if by_instructions(KIND, BITS, NATIVE):
            write_banks(table)
        if OVERLAP:
            tl.extra.cuda.gdc_wait()
        for base in range(0, BLOCKS, STEP):
            here = pieces(pointer, base, warp, BLOCKS, WARPS, TALL, AHEAD)
            acc = turn(
                acc, here, rows, valid, scales, zeros, table, (), supers, super_table, super_offset, zero_supers, row,
                warp, base, K, GROUPS, BITS, KIND, GROUP, ZERO, ZERO_POINT, NESTED, ZERO_NESTED, NATIVE,
                WARPS, TALL, AHEAD, BLOCK_M,
            )  # fmt: skip
    else:
        # Unrolled: what is carried round a loop would be taken apart, two words of 16 bits, and put together again.
        here = pieces(pointer, 0, warp, BLOCKS, WARPS, TALL, AHEAD)
        if OVERLAP:
            tl.extra.cuda.gdc_launch_dependents()
        if by_instructions(KIND, BITS, NATIVE):
            write_banks(table)
        if OVERLAP:
            tl.extra.cuda.gdc_wait()
        for number in tl.static_range(TURNS):
            there = here
            if number + 1 < TURNS:
                there = pieces(pointer, (number + 1) * STEP, warp, BLOCKS, WARPS, TALL, AHEAD)
            acc = turn(
                acc, here, rows, valid, scales, zeros, table, (), supers, super_table, super_offset, zero_supers, row,
                warp, number * STEP, K, GROUPS, BITS, KIND, GROUP, ZERO, ZERO_POINT, NESTED, ZERO_NESTED, NATIVE,
                WARPS, TALL, AHEAD, BLOCK_M,
            )  # fmt: skip
            here = there
    out = tl.sum(acc, axis=0) * UNIT
    if HAS_BIAS:
        out += tl.load(bias + row, mask=row < N, other=0.0).to(tl.float32)[:, None]
    where = y + m.to(tl.int64)[None, :] * stride_ym + row[:, None]
    tl.store(where, out.to(y.dtype.element_ty), mask=(m < M)[None, :] & (row < N)[:, None])
