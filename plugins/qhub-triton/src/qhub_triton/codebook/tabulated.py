"""The product of one row with two books of 256 vectors, by tables of what every vector is worth.

32 blocks of the input have, for each book, 256 dot products each: 32 KB. A program makes them, and then a row of the
weight is two look-ups a block instead of two vectors and eight multiplications. Lanes lie along the blocks, and block i
of a table lies in bank i of shared memory: each lane reads a bank of its own, whatever the codes are, and writes one.

Several programs share the columns of a row; the last of them to finish adds up all parts in their order.

Written in Gluon, where layouts decide which lane holds what; other GPUs have :mod:`qhub_triton.codebook.portable`.
"""

# mypy: ignore-errors

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = ["BLOCKS", "tabulated_kernel", "tabulated_shapes"]

# Blocks of a table: one for each lane.
BLOCKS = 32
# Parts of a sum that are read at once, at most.
_PARTS = 64


def tabulated_shapes(rows: int, warps: int, splits: int) -> dict[str, object]:
    """Return the layouts of a program of ``rows`` rows and 8 to 32 warps, and how many of ``splits`` parts it reads at
    once if it is the last."""
    bits = warps.bit_length() - 1
    across = [8 * warps << bit for bit in range(5 - bits)]
    columns = min(warps, max(1, rows // 128))
    each = max(1, 32 * warps // rows)
    lanes = [[1, 0], [2, 0], [4, 0]]
    down = [[0, 8 << bit] for bit in range(bits)]
    return {
        "LT": gl.BlockedLayout([1, 1], [32, 1], [1, warps], [0, 1]),
        "LR": gl.BlockedLayout([32 // each, 1], [each, 32 // each], [1, warps], [0, 1]),
        # A product (32, 256) has entries 2 and 4 in its lower lanes, and blocks 8 and 16 in registers. With those
        # changed round, lanes lie along the blocks. By one pair at a time, it is done in exchanges between lanes;
        # two pairs would go through shared memory.
        "LM": gl.DistributedLinearLayout(
            [[0, 1], [0, 2], [16, 0], *([0, entry] for entry in across)], [[8, 0], [0, 4], *lanes], down, [], [32, 256]
        ),
        "LS": gl.DistributedLinearLayout(
            [[0, 1], [0, 2], [0, 4], *([0, entry] for entry in across)], [[8, 0], [16, 0], *lanes], down, [], [32, 256]
        ),
        # (32, 8): rows 0 to 7 by lanes, the next ones in registers.
        "LX": gl.DistributedLinearLayout(
            [[0, 1], [8, 0], [16, 0]], [[0, 2], [0, 4], *lanes], [[0, 0]] * bits, [], [32, 8]
        ),
        # (256, 8): eight vectors by lanes, the next by warps.
        "LB": gl.DistributedLinearLayout(
            [[0, 1], *([entry, 0] for entry in across)], [[0, 2], [0, 4], *lanes],
            [[8 << bit, 0] for bit in range(bits)], [], [256, 8],
        ),
        "LF": gl.BlockedLayout([1, 4], [1, 32], [warps // columns, columns], [1, 0]),
        "MMA": gl.NVMMADistributedLayout([2, 0], [1, warps], [16, 8]),
        "DEEP": max(warps // columns, min(_PARTS, 1 << (splits - 1).bit_length())),
    }  # fmt: skip


@gluon.jit
def _operand(books, at, MMA: gl.constexpr, HALF: gl.constexpr):
    """Return the vectors at ``books + at`` (256, 8) float16 as (16, 256).

    Matrix units multiply 16 numbers: the vectors and, in bfloat16, what they lack of themselves. ``HALF``: nothing.
    """
    v = gl.load(books + at)
    if HALF:
        high = v
        low = gl.zeros_like(v)
    else:
        high = v.to(gl.bfloat16)
        low = (v.to(gl.float32) - high.to(gl.float32)).to(gl.bfloat16)
    both = gl.reshape(gl.permute(gl.join(high, low), [2, 1, 0]), [16, 256])
    return gl.convert_layout(both, gl.DotOperandLayout(1, MMA, 2), assert_trivial=True)


@gluon.jit
def _table(inputs, book, LM: gl.constexpr, LS: gl.constexpr, MMA: gl.constexpr):
    """Return the products (32, 256) of ``inputs`` (32, 16), twice the same eight, with a book's vectors (16, 256)."""
    t = mma_v2(inputs, book, gl.zeros([32, 256], gl.float32, MMA))
    return gl.convert_layout(gl.convert_layout(t, LM), LS)


@gluon.jit
def tabulated_kernel(
    x, books, codes, scales, bias, y, shares, counters, n_rows, scale_rows,
    BLOCKS: gl.constexpr, PACK: gl.constexpr, SPLITS: gl.constexpr, BN: gl.constexpr, MERGED: gl.constexpr,
    EVEN: gl.constexpr, HAS_BIAS: gl.constexpr, OVERLAP: gl.constexpr, DEEP: gl.constexpr, LT: gl.constexpr,
    LR: gl.constexpr, LM: gl.constexpr, LS: gl.constexpr, LX: gl.constexpr, LB: gl.constexpr, LF: gl.constexpr,
    MMA: gl.constexpr,
):  # fmt: skip
    """Write ``y`` (N,): x (BLOCKS * 8,) times the stored matrix, scaled, biased; a program: ``BN`` rows, 32 * ``PACK``
    blocks.

    ``codes``: (N, BLOCKS / PACK) int16 or, if ``PACK`` is 2, int32, two codes a block. ``MERGED``: both tables lie in
    shared memory together. ``EVEN``: neither the last blocks nor the last rows are fewer. ``SPLITS``: programs that
    share a row; if there are more than one, ``shares``: tiles x SPLITS x BN float32, and ``counters``: one for each
    tile, int32, 0 before and after.
    """
    HALF: gl.constexpr = x.dtype.element_ty == gl.float16
    WORDS: gl.constexpr = BLOCKS // PACK
    OUT: gl.constexpr = gl.SliceLayout(0, LF if SPLITS > 1 else LR)
    # Programs next to each other share a tile, so that all but the last tiles are added up while others are made.
    tile = gl.program_id(0) // SPLITS
    part = gl.program_id(0) % SPLITS
    n0 = tile * BN
    w = part * 32 + gl.arange(0, 32, gl.SliceLayout(1, LT))
    r = gl.arange(0, BN, gl.SliceLayout(0, LT))
    at = w[:, None] + r[None, :] * WORDS
    base = codes + n0.to(gl.int64) * WORDS
    if EVEN:
        word = gl.load(base + at).to(gl.int32)
    else:
        word = gl.load(base + at, mask=(w < WORDS)[:, None] & (n0 + r < n_rows)[None, :], other=0).to(gl.int32)
    entry = gl.arange(0, 256, gl.SliceLayout(1, LB))[:, None] * 8 + gl.arange(0, 8, gl.SliceLayout(0, LB))[None, :]
    first = _operand(books, entry, MMA, HALF)
    second = _operand(books + 2048, entry, MMA, HALF)
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    block = (part * 32 + gl.arange(0, 32, gl.SliceLayout(1, LX))[:, None]) * PACK
    j = gl.arange(0, 8, gl.SliceLayout(0, LX))[None, :]
    read = ()  # of inputs
    for turn in gl.static_range(PACK):
        inside = (block + turn < BLOCKS) & (j >= 0)
        read = read + (gl.load(x + (block + turn) * 8 + j, mask=inside, other=0.0),)
    for turn in gl.static_range(PACK):
        twice = gl.reshape(gl.permute(gl.join(read[turn], read[turn]), [0, 2, 1]), [32, 16])
        twice = gl.convert_layout(twice, gl.DotOperandLayout(0, MMA, 2), assert_trivial=True)
        one = _table(twice, first, LM, LS, MMA)
        other = _table(twice, second, LM, LS, MMA)
        low = (word >> (16 * turn)) & 255
        high = (word >> (16 * turn + 8)) & 255
        if MERGED:
            both = gl.reshape(gl.permute(gl.join(one, other), [0, 2, 1]), [32, 512])
            index = gl.reshape(gl.permute(gl.join(low, high | 256), [0, 2, 1]), [32, 2 * BN])
            found = gl.permute(gl.reshape(gl.gather(both, index, 1), [32, 2, BN]), [0, 2, 1])
            one, other = gl.split(found)
            found = gl.convert_layout(one + other, LT, assert_trivial=True)
        else:
            found = gl.gather(one, low, 1)
        if turn == 0:
            acc = found
        else:
            acc += found
        if not MERGED:
            acc += gl.gather(other, high, 1)
    total = gl.sum(gl.convert_layout(acc, LR), 0)
    mine = shares + tile.to(gl.int64) * (SPLITS * BN)
    if SPLITS > 1:
        gl.store(mine + part * BN + gl.arange(0, BN, gl.SliceLayout(0, LR)), total)
    n = n0 + gl.arange(0, BN, OUT)
    scale = gl.load(scales + n // scale_rows, mask=n < n_rows, other=0.0).to(gl.float32)
    if HAS_BIAS:
        shift = gl.load(bias + n, mask=n < n_rows, other=0.0).to(gl.float32)
    if SPLITS > 1:
        gl.thread_barrier()
        # Release our part, and acquire those of the others if we are the last.
        arrived = gl.atomic_add(counters + tile, 1, sem="acq_rel")
        if arrived < SPLITS - 1:
            return
        s = gl.arange(0, DEEP, gl.SliceLayout(1, LF))[:, None]
        cell = s * BN + gl.arange(0, BN, OUT)[None, :]
        total = gl.zeros([BN], gl.float32, OUT)
        for start in gl.static_range(0, SPLITS, DEEP):
            there = (start + s < SPLITS) & (cell >= 0)
            total += gl.sum(gl.load(mine + start * BN + cell, mask=there, other=0.0, cache_modifier=".cg"), 0)
        gl.store(counters + tile, 0)
    out = total * scale
    if HAS_BIAS:
        out += shift
    gl.store(y + n, out.to(y.dtype.element_ty), mask=n < n_rows)
