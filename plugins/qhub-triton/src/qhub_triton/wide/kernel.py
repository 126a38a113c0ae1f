"""The product for many rows of input on Hopper: one warp brings, two groups of warps widen and multiply their own rows.

y.T = W @ x.T, weights as the left operand in registers, inputs as the right one in shared memory. The groups meet the
bringer, and each other, at barriers of a ring of stages only. So one widens weights while the other multiplies, and
each leaves one product under way while it widens for the next: the matrix units, which wait for nobody then, are as
busy as in a dense product. Programs stay for all their tiles.

(Roles for warps: Shah et al. 2024, "FlashAttention-3", section 3.1; weights as the operand in registers: Machete.)
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from qhub_triton.tiled.groups import run_of
from qhub_triton.wide.widening import entries, looked_up, weights

__all__ = ["WARPS", "wide"]

# Their names in newer tritons, and in 3.6.
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
copy_in = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
copy_out = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global

# Of the first group; the second and the bringer come on top.
WARPS = 4
# Tiles of W whose products with all of x are computed before the next ones begin: their words stay in the L2 cache.
BAND: gl.constexpr = gl.constexpr(8)
# Registers of a thread that multiplies, and of the one that brings. More, and idle warps, which the compiler lets wait
# with as many as the bringer has, would have it wait for each product.
_MULTIPLIES, _BRINGS = 168, 104
MULTIPLIES: gl.constexpr = gl.constexpr(_MULTIPLIES)
BRINGS: gl.constexpr = gl.constexpr(_BRINGS)


@gluon.jit
def _tile(unit, tiles_n, tiles_m, BLOCKS, SPLIT: gl.constexpr):
    """Return the tile of W and of x that ``unit`` works on, and its first block of columns and the one past its last.

    A tile's SPLIT units follow each other.
    """
    tile = unit // SPLIT
    part = unit % SPLIT
    band = BAND * tiles_m
    first = tile // band * BAND
    height = gl.minimum(tiles_n - first, BAND)
    within = tile % band
    return first + within % height, within // height, part * BLOCKS // SPLIT, (part + 1) * BLOCKS // SPLIT


@gluon.jit
def _bring(
    xd, wd, xs, ws, full, empty, tiles_n, tiles_m, BLOCKS,
    P: gl.constexpr, TILE: gl.constexpr, STAGES: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """Fill the stages with blocks of x and of words, tile after tile."""
    slot = 0
    # Nobody waits for the first phase of an empty stage.
    phase = 1
    for unit in range(gl.program_id(0), tiles_n * tiles_m * SPLIT, gl.num_programs(0)):
        tile_n, tile_m, begin, end = _tile(unit, tiles_n, tiles_m, BLOCKS, SPLIT)
        for block in range(begin, end):
            mbarrier.wait(empty.index(slot), phase)
            bar = full.index(slot)
            mbarrier.expect(bar, TILE * P * 64 + TILE * 64)
            for i in gl.static_range(TILE // 64):
                row = ((tile_n * (TILE // 64) + i) * BLOCKS + block) * 64
                copy_in(wd, [row, 0], bar, ws.index(slot * (TILE // 64) + i))
            copy_in(xd, [tile_m * TILE, block * P * 32], bar, xs.index(slot))
            slot += 1
            if slot == STAGES:
                slot = 0
                phase ^= 1


@gluon.jit
def _numbers_of(pointer, place, group, GROUPS, POWERS: gl.constexpr):
    """Return the scales or zeros (ROWS,) float32 of ``group``, or of the last one.

    POWERS: numbers in bytes are powers of two, in E8M0: the exponent of a float32.
    """
    number = gl.load(pointer + gl.minimum(group, GROUPS - 1) * 64 + place)
    if POWERS and number.dtype == gl.uint8:
        return (number.to(gl.int32) << 23).to(gl.float32, bitcast=True)
    else:
        return number.to(gl.float32)


@gluon.jit
def _store(acc, yd, out, m, n):
    """Write a tile (ROWS, TILE) to y, through ``out`` in shared memory."""
    tma.store_wait(0)
    barrier()
    out.permute((1, 0)).store(acc.to(out.dtype))
    fence_async_shared()
    barrier()
    copy_out(yd, [m, n], out)


@gluon.jit
def _multiply(
    scales, zeros, table, bias, yd, shares, counters, xs, ws, ys, full, empty, tiles_n, tiles_m, N, BLOCKS, GROUPS,
    BITS: gl.constexpr, KIND: gl.constexpr, GROUP: gl.constexpr, ZERO: gl.constexpr, ZERO_POINT: gl.constexpr,
    UNIT: gl.constexpr, WHOLE: gl.constexpr, ROUNDS: gl.constexpr, HAS_BIAS: gl.constexpr, WHICH: gl.constexpr,
    TILE: gl.constexpr, STAGES: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """Multiply the rows of W that the group WHICH has of every tile of the program."""
    ROWS: gl.constexpr = TILE // 2
    P: gl.constexpr = 16 // BITS
    DTYPE: gl.constexpr = xs.dtype
    # Slices of 32 columns of a block that share their scale.
    RUN: gl.constexpr = run_of(P, GROUP)
    MMA: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TILE, 16])
    A: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=MMA, k_width=2)
    out = ys.index(WHICH)
    held = entries(table, KIND, ROWS, A)
    slot = 0
    phase = 0
    row = gl.arange(0, ROWS, gl.SliceLayout(1, A))
    # See tiled/groups.py, place_of.
    place = row % 64 // 16 * 16 + row % 8 * 2 + row // 8 % 2
    for unit in range(gl.program_id(0), tiles_n * tiles_m * SPLIT, gl.num_programs(0)):
        tile_n, tile_m, begin, end = _tile(unit, tiles_n, tiles_m, BLOCKS, SPLIT)
        n = tile_n * TILE + WHICH * ROWS
        # Rows past the last tile have the last one's scales, and are not stored.
        tile = gl.minimum((n + row) // 64, (N - 1) // 64) * (GROUPS * 64)
        acc = gl.zeros((ROWS, TILE), gl.float32, MMA)
        old = gl.zeros((ROWS, 32), DTYPE, A)
        next_scale = _numbers_of(scales + tile, place, begin * P * 32 // GROUP, GROUPS, True)
        next_zero = next_scale
        if ZERO != 0:
            next_zero = _numbers_of(zeros + tile, place, begin * P * 32 // GROUP, GROUPS, False)
        for block in range(begin, end):
            mbarrier.wait(full.index(slot), phase)
            w = ws.index(slot * 2 + WHICH).load(A)
            x = xs.index(slot)
            picked = looked_up(w, held, KIND, DTYPE)
            for j in gl.static_range(P):
                if j % RUN == 0:
                    # Read a run ahead: the products of one take as long as memory does.
                    scale = next_scale
                    zero = next_zero
                    group = (block * P + j + RUN) * 32 // GROUP
                    next_scale = _numbers_of(scales + tile, place, group, GROUPS, True)
                    if ZERO != 0:
                        next_zero = _numbers_of(zeros + tile, place, group, GROUPS, False)
                v = weights(w, picked, scale, zero, j, BITS, KIND, DTYPE, ZERO, ZERO_POINT, WHOLE, ROUNDS)
                token = warpgroup_mma(v, x.slice(32 * j, 32, dim=1).permute((1, 0)), acc, is_async=True)
                acc, old = warpgroup_mma_wait(num_outstanding=1, deps=[token, old])
                old = v
                if j == 0:
                    # All four warps have multiplied the block before: its stage is free.
                    barrier()
                    mbarrier.arrive(empty.index((slot + STAGES - 1) % STAGES), count=1, pred=block > begin)
            slot += 1
            if slot == STAGES:
                slot = 0
                phase ^= 1
        acc, old = warpgroup_mma_wait(num_outstanding=0, deps=[acc, old])
        barrier()
        mbarrier.arrive(empty.index((slot + STAGES - 1) % STAGES), count=1)
        last = True
        if SPLIT > 1:
            SIZE: gl.constexpr = ROWS * TILE
            cell = (
                gl.arange(0, ROWS, gl.SliceLayout(1, MMA))[:, None] * TILE
                + gl.arange(0, TILE, gl.SliceLayout(0, MMA))[None, :]
            )
            number = unit // SPLIT * 2 + WHICH
            mine = shares + number.to(gl.int64) * (SPLIT * SIZE)
            gl.store(mine + unit % SPLIT * SIZE + cell, acc)
            barrier()
            # Release our part, and acquire those of the others if we are the last; parts are added in their order.
            last = gl.atomic_add(counters + number, 1, sem="acq_rel") == SPLIT - 1
            if last:
                acc = gl.load(mine + cell, cache_modifier=".cg")
                for other in gl.static_range(1, SPLIT):
                    acc += gl.load(mine + other * SIZE + cell, cache_modifier=".cg")
                gl.store(counters + number, 0)
        if last:
            acc = acc * UNIT
            if HAS_BIAS:
                at = n + gl.arange(0, ROWS, gl.SliceLayout(1, MMA))
                acc += gl.load(bias + at, mask=at < N, other=0.0).to(gl.float32)[:, None]
            _store(acc, yd, out, tile_m * TILE, n)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["tiles_n", "tiles_m", "N", "BLOCKS", "GROUPS"])
def wide(
    xd, wd, scales, zeros, table, bias, yd, shares, counters, tiles_n, tiles_m, N, BLOCKS, GROUPS,
    BITS: gl.constexpr, KIND: gl.constexpr, GROUP: gl.constexpr, ZERO: gl.constexpr, ZERO_POINT: gl.constexpr,
    UNIT: gl.constexpr, WHOLE: gl.constexpr, ROUNDS: gl.constexpr, HAS_BIAS: gl.constexpr, STAGES: gl.constexpr,
    SPLIT: gl.constexpr, TILE: gl.constexpr,
):  # fmt: skip
    """Compute y (M, N) = x (M, K) @ W.T; a program: tiles of TILE x TILE numbers of y, one in so many.

    ``xd``, ``wd``, ``yd``: descriptors of x, pieces (TILE, 512 / BITS) of it; of the words as (tiles of 64 rows *
    BLOCKS * 64, 32), pieces (64, 32); of y, pieces (TILE, TILE / 2). ``shares``: SPLIT * TILE * TILE float32 for each
    tile; ``counters``: two int32 for each, 0 before and after; neither is touched where SPLIT is 1. The rest:
    :mod:`qhub_triton.tiled.many`.
    """
    P: gl.constexpr = 16 // BITS
    xs = gl.allocate_shared_memory(xd.dtype, [STAGES, TILE, P * 32], xd.layout)
    ws = gl.allocate_shared_memory(gl.int16, [STAGES * (TILE // 64), 64, 32], wd.layout)
    ys = gl.allocate_shared_memory(yd.dtype, [2, TILE, TILE // 2], yd.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_multiply, (
                scales, zeros, table, bias, yd, shares, counters, xs, ws, ys, full, empty, tiles_n, tiles_m, N, BLOCKS,
                GROUPS, BITS, KIND, GROUP, ZERO, ZERO_POINT, UNIT, WHOLE, ROUNDS, HAS_BIAS, 0, TILE, STAGES, SPLIT,
            )),
            (_multiply, (
                scales, zeros, table, bias, yd, shares, counters, xs, ws, ys, full, empty, tiles_n, tiles_m, N, BLOCKS,
                GROUPS, BITS, KIND, GROUP, ZERO, ZERO_POINT, UNIT, WHOLE, ROUNDS, HAS_BIAS, 1, TILE, STAGES, SPLIT,
            )),
            (_bring, (xd, wd, xs, ws, full, empty, tiles_n, tiles_m, BLOCKS, P, TILE, STAGES, SPLIT)),
        ],
        [4, 1],
        [MULTIPLIES, BRINGS],
    )  # fmt: skip
