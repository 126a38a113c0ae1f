"""The product for many rows of input on Hopper: two groups of warps widen weights and multiply their own rows by x.

y.T = W @ x.T, weights as the left operand in registers, inputs as the right one in shared memory. The groups meet who
brings blocks, and each other, at barriers of a ring of stages only. So one widens weights while the other multiplies,
and each leaves one product under way while it widens for the next: the matrix units, which wait for nobody then, are as
busy as in a dense product. Programs stay for all their tiles.

Tiles of 128 rows of x are brought by a warp of its own. Tiles of 256 widen each weight half as often, and need all
registers for their sums: a group brings its own piece of each block then.

(Roles for warps, rings of stages: Bikshandi and Shah 2023, "A Case Study in CUDA Kernel Fusion: Implementing
FlashAttention-2 on NVIDIA Hopper Architecture using the CUTLASS Library", section 3; Shah et al. 2024,
"FlashAttention-3", section 3.1; weights as the operand in registers: Machete.)
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

from qhub_triton.tiled.decode import TABLE
from qhub_triton.tiled.groups import run_of
from qhub_triton.wide.bringing import bring, bring_first, bring_next, tile_of
from qhub_triton.wide.instructions import scales_pairs
from qhub_triton.wide.widening import entries, looked_up, scaled_pair, weights

__all__ = ["REGISTERS", "WARPS", "wide"]

# Their names in newer tritons, and in 3.6.
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
copy_out = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global

# Where groups bring their pieces, the assembler of newer tritons would wait for each product of weights that are looked
# up, two of which share their scales.
APART: gl.constexpr = gl.constexpr(hasattr(gl, "barrier"))
# Of the first group; the second and the warp that brings come on top.
WARPS = 4
# Registers of a thread that multiplies, and of the one that brings. More, and idle warps, which the compiler lets wait
# with as many as the bringer has, would have it wait for each product.
_MULTIPLIES, _BRINGS = 168, 104
MULTIPLIES: gl.constexpr = gl.constexpr(_MULTIPLIES)
BRINGS: gl.constexpr = gl.constexpr(_BRINGS)
# Of a thread where there is no bringer: all that two groups can have, at most so many in the launch too. With 256 there
# each group would have to be given what the launch rounded up.
REGISTERS = 248
ALL: gl.constexpr = gl.constexpr(REGISTERS)


@gluon.jit
def _place(row):
    """Return where the number of ``row`` is among those of its tile's 64: see tiled/groups.py, place_of."""
    return row % 64 // 16 * 16 + row % 8 * 2 + row // 8 % 2


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
def _summed(acc, shares, counters, number, part, SPLIT: gl.constexpr, MMA: gl.constexpr):
    """Return the sum of all parts of the tile ``number``, and whether this program, which has ``part``, is to write it:
    the last one that comes."""
    ROWS: gl.constexpr = acc.shape[0]
    COLUMNS: gl.constexpr = acc.shape[1]
    SIZE: gl.constexpr = ROWS * COLUMNS
    cell = (
        gl.arange(0, ROWS, gl.SliceLayout(1, MMA))[:, None] * COLUMNS
        + gl.arange(0, COLUMNS, gl.SliceLayout(0, MMA))[None, :]
    )
    mine = shares + number.to(gl.int64) * (SPLIT * SIZE)
    gl.store(mine + part * SIZE + cell, acc)
    barrier()
    # Release our part, and acquire those of the others if we are the last; parts are added in their order.
    last = gl.atomic_add(counters + number, 1, sem="acq_rel") == SPLIT - 1
    if last:
        acc = gl.load(mine + cell, cache_modifier=".cg")
        for other in gl.static_range(1, SPLIT):
            acc += gl.load(mine + other * SIZE + cell, cache_modifier=".cg")
        gl.store(counters + number, 0)
    return acc, last


@gluon.jit
def _store(acc, yd, out, m, n):
    """Write a tile (ROWS, TILE_M) to y, through ``out`` in shared memory."""
    tma.store_wait(0)
    barrier()
    out.permute((1, 0)).store(acc.to(out.dtype))
    fence_async_shared()
    barrier()
    copy_out(yd, [m, n], out)


@gluon.jit
def _multiply(
    values,
    BITS: gl.constexpr, KIND: gl.constexpr, GROUP: gl.constexpr, ZERO: gl.constexpr, ZERO_POINT: gl.constexpr,
    UNIT: gl.constexpr, WHOLE: gl.constexpr, ROUNDS: gl.constexpr, LATE: gl.constexpr, HAS_BIAS: gl.constexpr,
    TILE_N: gl.constexpr, TILE_M: gl.constexpr, SPAN: gl.constexpr, STAGES: gl.constexpr, SPLIT: gl.constexpr,
    OWN: gl.constexpr, WHICH: gl.constexpr,
):  # fmt: skip
    """Multiply the rows of W that the group WHICH has of every tile of the program; OWN: groups bring their pieces."""
    ring, scales, zeros, table, bias, yd, ys, shares, counters, tiles_n, tiles_m, N, BLOCKS, GROUPS = values
    _, _, xs, ws, full, empty = ring
    ROWS: gl.constexpr = TILE_N // 2
    P: gl.constexpr = 16 // BITS
    DTYPE: gl.constexpr = xs.dtype
    # Pieces of x that a block comes in, and slices of 32 columns of one.
    PARTS: gl.constexpr = P * 32 // SPAN
    EACH: gl.constexpr = SPAN // 32
    # Slices of 32 columns of a block that share their scale.
    RUN: gl.constexpr = 1 if APART and OWN and KIND == TABLE else run_of(P, GROUP)
    PAIRS: gl.constexpr = KIND == TABLE and scales_pairs(DTYPE == gl.float16, RUN, LATE)
    MMA: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TILE_M, 16])
    A: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=MMA, k_width=2)
    out = ys.index(WHICH)
    held = entries(table, KIND, ROWS, A)
    slot = 0
    phase = 0
    # Of two pieces of a block each group brings one; of one, the first does.
    BRINGS_ONE: gl.constexpr = OWN and (PARTS == 2 or WHICH == 0)
    MINE: gl.constexpr = WHICH if PARTS == 2 else 0
    # In a block's last slice its own first piece is free, in its second slice the last piece of the block before.
    BEFORE: gl.constexpr = PARTS == 1 or WHICH == 1
    AT: gl.constexpr = 1 if BEFORE else P - 1
    if BRINGS_ONE:
        gl.static_assert(PARTS <= 2)
        ahead = bring_first(ring, tiles_n, tiles_m, BLOCKS, MINE, P, TILE_N, TILE_M, SPAN, STAGES, SPLIT)
        # False in the first block only, before which there is none.
        begun = not BEFORE
    row = gl.arange(0, ROWS, gl.SliceLayout(1, A))
    place = _place(row)
    for unit in range(gl.program_id(0), tiles_n * tiles_m * SPLIT, gl.num_programs(0)):
        tile_n, tile_m, begin, end = tile_of(unit, tiles_n, tiles_m, BLOCKS, SPLIT)
        n = tile_n * TILE_N + WHICH * ROWS
        # Rows past the last tile have the last one's scales, and are not stored.
        tile = gl.minimum((n + row) // 64, (N - 1) // 64) * (GROUPS * 64)
        acc = gl.zeros((ROWS, TILE_M), gl.float32, MMA)
        old = gl.zeros((ROWS, 32), DTYPE, A)
        next_scale = _numbers_of(scales + tile, place, begin * P * 32 // GROUP, GROUPS, True)
        next_zero = next_scale
        scale = next_scale
        zero = next_scale
        if ZERO != 0:
            next_zero = _numbers_of(zeros + tile, place, begin * P * 32 // GROUP, GROUPS, False)
        for block in range(begin, end):
            for j in gl.static_range(P):
                if KIND == TABLE:
                    # Waits between products of looked-up weights would have the assembler wait for each of those.
                    if j == 0:
                        for part in gl.static_range(PARTS):
                            mbarrier.wait(full.index(slot * PARTS + part), phase)
                elif j % EACH == 0:
                    mbarrier.wait(full.index(slot * PARTS + j // EACH), phase)
                if j % EACH == 0:
                    x = xs.index(slot * PARTS + j // EACH)
                if j == 0:
                    w = ws.index(slot * 2 + WHICH).load(A)
                    picked = ()
                if not LATE and j % RUN == 0:
                    # Read a run ahead: the products of one take as long as memory does.
                    scale = next_scale
                    zero = next_zero
                    group = (block * P + j + RUN) * 32 // GROUP
                    next_scale = _numbers_of(scales + tile, place, group, GROUPS, True)
                    if ZERO != 0:
                        next_zero = _numbers_of(zeros + tile, place, group, GROUPS, False)
                # Codes are looked up in pairs of places: the first products of a block need not wait for all of it.
                if PAIRS:
                    if j % 2 == 0:
                        picked = scaled_pair(w, held, scale, j, ROUNDS)
                    v = picked[j % 2]
                else:
                    if KIND == TABLE and j % 2 == 0:
                        picked = looked_up(w, held, DTYPE, j)
                    v = weights(w, picked, scale, zero, j, BITS, KIND, DTYPE, ZERO, ZERO_POINT, WHOLE, ROUNDS, LATE)
                token = warpgroup_mma(v, x.slice(32 * (j % EACH), 32, dim=1).permute((1, 0)), acc, is_async=True)
                acc, old = warpgroup_mma_wait(num_outstanding=1, deps=[token, old])
                old = v
                if j % EACH == 0:
                    # All four warps have multiplied the piece before: it is free.
                    barrier()
                    if j == 0:
                        before = (slot + STAGES - 1) % STAGES * PARTS + PARTS - 1
                        mbarrier.arrive(empty.index(before), count=1, pred=block > begin)
                    else:
                        mbarrier.arrive(empty.index(slot * PARTS + j // EACH - 1), count=1)
                if BRINGS_ONE and j == AT:
                    # This slice's product is under way; the other group has long given the piece back, or soon will.
                    ahead = bring_next(
                        ring, ahead, begun, slot, phase, tiles_n, tiles_m, BLOCKS,
                        BEFORE, MINE, P, TILE_N, TILE_M, SPAN, STAGES, SPLIT,
                    )  # fmt: skip
                    begun = True
            slot += 1
            if slot == STAGES:
                slot = 0
                phase ^= 1
        acc, old = warpgroup_mma_wait(num_outstanding=0, deps=[acc, old])
        barrier()
        mbarrier.arrive(empty.index((slot + STAGES - 1) % STAGES * PARTS + PARTS - 1), count=1)
        last = True
        if SPLIT > 1:
            acc, last = _summed(acc, shares, counters, unit // SPLIT * 2 + WHICH, unit % SPLIT, SPLIT, MMA)
        if last:
            acc = acc * UNIT
            at = gl.arange(0, ROWS, gl.SliceLayout(1, MMA))
            if LATE:
                own = gl.minimum((n + at) // 64, (N - 1) // 64) * (GROUPS * 64)
                acc = acc * gl.expand_dims(_numbers_of(scales + own, _place(at), 0, GROUPS, True), 1)
            if HAS_BIAS:
                acc += gl.load(bias + n + at, mask=n + at < N, other=0.0).to(gl.float32)[:, None]
            _store(acc, yd, out, tile_m * TILE_M, n)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["tiles_n", "tiles_m", "N", "BLOCKS", "GROUPS"])
def wide(
    xd, wd, scales, zeros, table, bias, yd, shares, counters, tiles_n, tiles_m, N, BLOCKS, GROUPS,
    BITS: gl.constexpr, KIND: gl.constexpr, GROUP: gl.constexpr, ZERO: gl.constexpr, ZERO_POINT: gl.constexpr,
    UNIT: gl.constexpr, WHOLE: gl.constexpr, ROUNDS: gl.constexpr, LATE: gl.constexpr, HAS_BIAS: gl.constexpr,
    TILE_N: gl.constexpr, TILE_M: gl.constexpr, SPAN: gl.constexpr, STAGES: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """Compute y (M, N) = x (M, K) @ W.T; a program: tiles of TILE_M x TILE_N numbers of y, one in so many.

    ``xd``, ``wd``, ``yd``: descriptors of x, pieces (TILE_M, SPAN) of it; of the words as (tiles of 64 rows * BLOCKS *
    64, 32), pieces (64, 32); of y, pieces (TILE_M, TILE_N / 2). SPAN: all 512 / BITS columns of a block with TILE_M
    128, 64 with 256, where a block has no more than 128. ``shares``: SPLIT * TILE_M * TILE_N float32 for each tile;
    ``counters``: two int32 for each, 0 before and after; neither is touched where SPLIT is 1. LATE: a row has one
    scale, and no zeros: all of its sum is multiplied by it. The rest: :mod:`qhub_triton.tiled.many`.
    """
    P: gl.constexpr = 16 // BITS
    PARTS: gl.constexpr = P * 32 // SPAN
    OWN: gl.constexpr = TILE_M == 256
    gl.static_assert(not LATE or (ZERO == 0 and ZERO_POINT % 1 == 0))
    xs = gl.allocate_shared_memory(xd.dtype, [STAGES * PARTS, TILE_M, SPAN], xd.layout)
    ws = gl.allocate_shared_memory(gl.int16, [STAGES * (TILE_N // 64), 64, 32], wd.layout)
    ys = gl.allocate_shared_memory(yd.dtype, [2, TILE_M, TILE_N // 2], yd.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES * PARTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES * PARTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES * PARTS):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    ring = (xd, wd, xs, ws, full, empty)
    # What is known to the compiler only is handed on in each call: it would be no constant any more in a variable.
    values = (ring, scales, zeros, table, bias, yd, ys, shares, counters, tiles_n, tiles_m, N, BLOCKS, GROUPS)
    if OWN:
        gl.warp_specialize(
            [
                (_multiply, (
                    values, BITS, KIND, GROUP, ZERO, ZERO_POINT, UNIT, WHOLE, ROUNDS, LATE, HAS_BIAS, TILE_N, TILE_M,
                    SPAN, STAGES, SPLIT, OWN, 0,
                )),
                (_multiply, (
                    values, BITS, KIND, GROUP, ZERO, ZERO_POINT, UNIT, WHOLE, ROUNDS, LATE, HAS_BIAS, TILE_N, TILE_M,
                    SPAN, STAGES, SPLIT, OWN, 1,
                )),
            ],
            [4],
            [ALL],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_multiply, (
                    values, BITS, KIND, GROUP, ZERO, ZERO_POINT, UNIT, WHOLE, ROUNDS, LATE, HAS_BIAS, TILE_N, TILE_M,
                    SPAN, STAGES, SPLIT, OWN, 0,
                )),
                (_multiply, (
                    values, BITS, KIND, GROUP, ZERO, ZERO_POINT, UNIT, WHOLE, ROUNDS, LATE, HAS_BIAS, TILE_N, TILE_M,
                    SPAN, STAGES, SPLIT, OWN, 1,
                )),
                (bring, (ring, tiles_n, tiles_m, BLOCKS, P, TILE_N, TILE_M, SPAN, STAGES, SPLIT)),
            ],
            [4, 1],
            [MULTIPLIES, BRINGS],
        )  # fmt: skip
