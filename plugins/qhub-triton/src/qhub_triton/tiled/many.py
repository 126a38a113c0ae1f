"""The product for many rows of input: tiles of weights in registers against the input in shared memory.

The roles are turned round, y.T = W @ x.T: the words of a tile become the left operand of the matrix units where they
were read, so that a weight is widened once per program, and few rows of input cost little. Weights are scaled before
the product and rounded once, as a dequantized weight is; under nested scales they stay whole numbers in it, and scales
come after it, in float32. Where the output has too few tiles for the GPU, several programs share the columns; the last
of them to finish adds up all parts in their order, so that the result is the same each time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qhub_triton.tiled.banks import write_banks
from qhub_triton.tiled.groups import run_of
from qhub_triton.tiled.operands import block_product, depth_of, factors, unit_of
from qhub_triton.tiled.registers import by_instructions, entries, looked_up

__all__ = ["many"]


@triton.jit(do_not_specialize=["M"])
def many(
    x, words, scales, zeros, table, supers, super_table, super_offset, zero_supers, bias, y, shares, counters,
    M, N, K, BLOCKS, GROUPS, stride_xm, stride_ym, SPAN,
    BITS: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, ZERO_POINT: tl.constexpr,
    UNIT: tl.constexpr, NESTED: tl.constexpr, ZERO_NESTED: tl.constexpr, HAS_BIAS: tl.constexpr,
    NATIVE: tl.constexpr, OVERLAP: tl.constexpr, WHOLE: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, EARLY: tl.constexpr, BANKS: tl.constexpr = False,
):  # fmt: skip
    """Compute y (M, N) = x (M, K) @ W.T; a program: BLOCK_N columns of y, BLOCK_M rows, SPAN of the blocks along K.

    ``shares``: SPLIT x (programs of one part) x BLOCK_N * BLOCK_M float32; ``counters``: as many int32, 0 before and
    after. WHOLE: zeros are whole numbers. EARLY: weights are scaled before the product, and rounded to x's dtype as a
    dequantized weight is; one accumulator then does for all groups. OVERLAP: 0, or when the kernel after this one may
    begin: 1 at once, 2 when the last block has been multiplied. BANKS: codes of 4 bits are looked up in shared memory,
    not in registers.
    """
    P: tl.constexpr = 16 // BITS
    RUN: tl.constexpr = run_of(P, GROUP)
    DTYPE: tl.constexpr = x.dtype.element_ty
    # Scales that come after the product are read a block ahead: such small reads are worth no place in shared memory.
    AHEAD: tl.constexpr = not EARLY and ZERO == 0
    PAIRED: tl.constexpr = EARLY and NESTED is None and scales.dtype.element_ty.primitive_bitwidth == 16
    program = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles = tl.cdiv(N, BLOCK_N) * tiles_m
    part = program // tiles
    tile = program % tiles
    # Programs next to each other share the weights, which are read once from memory.
    tile_n, tile_m = tile // tiles_m, tile % tiles_m
    row = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    p = tl.arange(0, 32)
    first = part * SPAN
    last = min(first + SPAN, BLOCKS)
    # The plan leaves no part empty. Were the loop left out on some path, the assembler would wait for every product.
    tl.assume(first < last)
    # Rows past the last tile are read from the last one, and not stored.
    held = tl.minimum(row // 64, (N - 1) // 64)
    pointer = words + (held.to(tl.int64) * BLOCKS + first)[:, None] * 2048 + (row % 64)[:, None] * 32 + p[None, :]
    deep = tl.arange(0, depth_of(EARLY, BITS))
    source = x + m.to(tl.int64)[None, :] * stride_xm + (first * P * 32 + deep)[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    if OVERLAP == 1:
        tl.extra.cuda.gdc_launch_dependents()
    if BANKS and by_instructions(KIND, BITS, NATIVE):
        write_banks(table)
        held = ()
    else:
        held = entries(table, KIND, BITS, NATIVE)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    if AHEAD:
        now = factors(
            scales, zeros, supers, super_table, super_offset, zero_supers, tile_n * BLOCK_N, row, first, N, GROUPS,
            P, RUN, GROUP, ZERO, ZERO_POINT, NESTED, ZERO_NESTED, PAIRED,
        )  # fmt: skip
    for block in tl.range(first, last, num_stages=STAGES):
        codes = tl.load(pointer)
        picked = ()
        if len(held) > 0:
            picked = looked_up(codes, held, DTYPE)
        if not AHEAD:
            # Read where they are used: only then are they brought into the order of the operand.
            now = factors(
                scales, zeros, supers, super_table, super_offset, zero_supers, tile_n * BLOCK_N, row, block, N, GROUPS,
                P, RUN, GROUP, ZERO, ZERO_POINT, NESTED, ZERO_NESTED, PAIRED,
            )  # fmt: skip
        else:
            later = factors(
                scales, zeros, supers, super_table, super_offset, zero_supers, tile_n * BLOCK_N, row, block + 1, N,
                GROUPS, P, RUN, GROUP, ZERO, ZERO_POINT, NESTED, ZERO_NESTED, PAIRED,
            )  # fmt: skip
        acc = block_product(
            acc, codes, picked, table, now, source, m < M, block, K, BITS, KIND, GROUP, ZERO, ZERO_POINT, DTYPE, NATIVE,
            WHOLE, EARLY, scales.dtype.element_ty, NESTED,
        )  # fmt: skip
        if AHEAD:
            now = later
        pointer += 2048
        source += P * 32
    if OVERLAP >= 2:
        tl.extra.cuda.gdc_launch_dependents()
    if SPLIT > 1:
        size: tl.constexpr = BLOCK_N * BLOCK_M
        cell = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        mine = shares + tile.to(tl.int64) * SPLIT * size
        tl.store(mine + part * size + cell, acc)
        tl.debug_barrier()
        # Release our part, and acquire those of the others if we are the last.
        arrived = tl.atomic_add(counters + tile, 1, sem="acq_rel")
        if arrived < SPLIT - 1:
            return
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for other in range(SPLIT):
            acc += tl.load(mine + other * size + cell, cache_modifier=".cg")
        tl.store(counters + tile, 0)
    out = acc * unit_of(UNIT, KIND, BITS, DTYPE == tl.float16, NATIVE, ZERO, ZERO_POINT, EARLY)
    if HAS_BIAS:
        out += tl.load(bias + row, mask=row < N, other=0.0).to(tl.float32)[:, None]
    where = y + m.to(tl.int64)[None, :] * stride_ym + row[:, None]
    tl.store(where, out.to(y.dtype.element_ty), mask=(m < M)[None, :] & (row < N)[:, None])
