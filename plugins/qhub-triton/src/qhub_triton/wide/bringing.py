"""Brings blocks of x and of words into a ring of stages: by a warp of its own, or by the groups that multiply.

A block of x comes in pieces, each with a barrier that says it is full and one that says it is empty; a block's words
come with its first piece, and are given back with it.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

__all__ = ["bring", "bring_first", "bring_next", "tile_of"]

# Their names in newer tritons, and in 3.6.
copy_in = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared

# Tiles of W whose products with all of x are computed before the next ones begin: their words stay in the L2 cache.
BAND: gl.constexpr = gl.constexpr(8)


@gluon.jit
def tile_of(unit, tiles_n, tiles_m, BLOCKS, SPLIT: gl.constexpr):
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
def _piece(
    ring, slot, tile_n, tile_m, block, BLOCKS, there,
    PART: gl.constexpr, P: gl.constexpr, TILE_N: gl.constexpr, TILE_M: gl.constexpr, SPAN: gl.constexpr,
):  # fmt: skip
    """Ask for a piece of x, and with the first of a block for its words, if ``there``."""
    xd, wd, xs, ws, full, _ = ring
    PARTS: gl.constexpr = P * 32 // SPAN
    bar = full.index(slot * PARTS + PART)
    mbarrier.expect(bar, TILE_M * SPAN * 2 + (TILE_N * 64 if PART == 0 else 0), pred=there)
    if PART == 0:
        for i in gl.static_range(TILE_N // 64):
            row = ((tile_n * (TILE_N // 64) + i) * BLOCKS + block) * 64
            copy_in(wd, [row, 0], bar, ws.index(slot * (TILE_N // 64) + i), pred=there)
    copy_in(xd, [tile_m * TILE_M, block * P * 32 + PART * SPAN], bar, xs.index(slot * PARTS + PART), pred=there)


@gluon.jit
def bring(
    ring, tiles_n, tiles_m, BLOCKS,
    P: gl.constexpr, TILE_N: gl.constexpr, TILE_M: gl.constexpr, SPAN: gl.constexpr, STAGES: gl.constexpr,
    SPLIT: gl.constexpr,
):  # fmt: skip
    """Fill the stages with blocks of one piece, tile after tile."""
    empty = ring[5]
    gl.static_assert(P * 32 == SPAN)
    slot = 0
    # Nobody waits for the first phase of an empty stage.
    phase = 1
    for unit in range(gl.program_id(0), tiles_n * tiles_m * SPLIT, gl.num_programs(0)):
        tile_n, tile_m, begin, end = tile_of(unit, tiles_n, tiles_m, BLOCKS, SPLIT)
        for block in range(begin, end):
            mbarrier.wait(empty.index(slot), phase)
            _piece(ring, slot, tile_n, tile_m, block, BLOCKS, True, 0, P, TILE_N, TILE_M, SPAN)
            slot += 1
            if slot == STAGES:
                slot = 0
                phase ^= 1


@gluon.jit
def _after(ahead, tiles_n, tiles_m, BLOCKS, SPLIT: gl.constexpr):
    """Return the unit, its tile and the block that follow those of ``ahead``, and the block past the tile's last."""
    unit, tile_n, tile_m, block, end = ahead
    block += 1
    if block == end:
        unit += gl.num_programs(0)
        tile_n, tile_m, block, end = tile_of(unit, tiles_n, tiles_m, BLOCKS, SPLIT)
    return unit, tile_n, tile_m, block, end


@gluon.jit
def bring_first(
    ring, tiles_n, tiles_m, BLOCKS,
    MINE: gl.constexpr, P: gl.constexpr, TILE_N: gl.constexpr, TILE_M: gl.constexpr, SPAN: gl.constexpr,
    STAGES: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """Fill the stages of the piece MINE for the first time, and return what comes next: see :func:`_after`."""
    unit = gl.program_id(0)
    tile_n, tile_m, block, end = tile_of(unit, tiles_n, tiles_m, BLOCKS, SPLIT)
    ahead = (unit, tile_n, tile_m, block, end)
    for i in gl.static_range(STAGES):
        there = ahead[0] < tiles_n * tiles_m * SPLIT
        _piece(ring, i, ahead[1], ahead[2], ahead[3], BLOCKS, there, MINE, P, TILE_N, TILE_M, SPAN)
        ahead = _after(ahead, tiles_n, tiles_m, BLOCKS, SPLIT)
    return ahead


@gluon.jit
def bring_next(
    ring, ahead, begun, slot, phase, tiles_n, tiles_m, BLOCKS,
    BEFORE: gl.constexpr, MINE: gl.constexpr, P: gl.constexpr, TILE_N: gl.constexpr, TILE_M: gl.constexpr,
    SPAN: gl.constexpr, STAGES: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """Wait until the piece MINE of the stage ``slot``, or of the one BEFORE it, has been given back, ask for what
    ``ahead`` says, and return what comes next; before it has ``begun`` there is none to wait for, and nothing is
    asked for."""
    empty = ring[5]
    PARTS: gl.constexpr = P * 32 // SPAN
    there = (ahead[0] < tiles_n * tiles_m * SPLIT) & begun
    if BEFORE:
        free = (slot + STAGES - 1) % STAGES
        turn = phase ^ (slot == 0).to(gl.int32)
    else:
        free = slot
        turn = phase
    mbarrier.wait(empty.index(free * PARTS + MINE), turn, pred=there)
    _piece(ring, free, ahead[1], ahead[2], ahead[3], BLOCKS, there, MINE, P, TILE_N, TILE_M, SPAN)
    if BEFORE:
        if begun:
            ahead = _after(ahead, tiles_n, tiles_m, BLOCKS, SPLIT)
    else:
        ahead = _after(ahead, tiles_n, tiles_m, BLOCKS, SPLIT)
    return ahead
