"""The product of one row with two books of 256 vectors, by tables of what every vector is worth.

32 blocks of the input have, for each book, 256 dot products each: 32 KB. A program makes them, and then a row of the
weight is two look-ups a block instead of two vectors and eight multiplications. Lanes lie along the blocks, and block i
of a table lies in bank i of shared memory: each lane reads a bank of its own, whatever the codes are.

Written in Gluon, where layouts decide which lane holds what; other GPUs have :mod:`qhub_triton.codebook.portable`.
"""

# mypy: ignore-errors

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = ["BLOCKS", "tabulated_kernel", "tabulated_shapes"]

# Blocks of a program's tables: one for each lane.
BLOCKS = 32


def tabulated_shapes(warps: int) -> dict[str, object]:
    """Return the layouts of a program of 8 or 16 warps."""
    bits = warps.bit_length() - 1
    mma = gl.NVMMADistributedLayout([2, 0], [1, warps], [16, 8])
    return {
        "LT": gl.BlockedLayout([1, 1], [32, 1], [1, warps], [0, 1]),
        "LR": gl.BlockedLayout([32, 1], [1, 32], [1, warps], [0, 1]),
        # (32, 8): rows 0 to 7 by lanes, the next ones in registers.
        "LX": gl.DistributedLinearLayout(
            [[0, 1], [8, 0], [16, 0]], [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]], [[0, 0]] * bits, [], [32, 8]
        ),
        # (256, 8): eight vectors by lanes, the next by warps.
        "LB": gl.DistributedLinearLayout(
            [[0, 1], *([8 << bit, 0] for bit in range(bits, 5))], [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]],
            [[8 << bit, 0] for bit in range(bits)], [], [256, 8],
        ),
        "MMA": mma,
    }  # fmt: skip


@gluon.jit
def _table(books, at, inputs, LT: gl.constexpr, MMA: gl.constexpr, HALF: gl.constexpr):
    """Return the products (32, 256) of the vectors at ``books + at`` (256, 8) float16 with ``inputs`` (32, 16), twice
    the same eight.

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
    both = gl.convert_layout(both, gl.DotOperandLayout(1, MMA, 2), assert_trivial=True)
    t = mma_v2(inputs, both, gl.zeros([32, 256], gl.float32, MMA))
    return gl.convert_layout(t, LT)


@gluon.jit
def _load(base, at, rows, lane, n_rows, blocks, EVEN: gl.constexpr):
    if EVEN:
        return gl.load(base + at)
    else:
        return gl.load(base + at, mask=(lane < blocks)[:, None] & (rows < n_rows)[None, :], other=0)


@gluon.jit
def tabulated_kernel(
    x, books, codes, partial, n_rows, blocks,
    BN: gl.constexpr, TURNS: gl.constexpr, AHEAD: gl.constexpr, MERGED: gl.constexpr, EVEN: gl.constexpr,
    OVERLAP: gl.constexpr, LT: gl.constexpr, LR: gl.constexpr, LX: gl.constexpr, LB: gl.constexpr, MMA: gl.constexpr,
):  # fmt: skip
    """Write ``partial`` (slabs, N) float32: the inputs of 32 blocks times their columns of the stored matrix.

    ``codes``: (N, blocks) int16, two codes each. ``BN``: rows at a time, ``TURNS`` times; codes are read ``AHEAD``
    turns before they are used. ``MERGED``: both tables lie in shared memory together. ``EVEN``: neither the last blocks
    nor the last rows are fewer.
    """
    ROW: gl.constexpr = gl.SliceLayout(0, LT)
    LANE: gl.constexpr = gl.SliceLayout(1, LT)
    HALF: gl.constexpr = x.dtype.element_ty == gl.float16
    slab = gl.program_id(1)
    lane = slab * 32 + gl.arange(0, 32, LANE)
    r = gl.arange(0, BN, ROW)
    n0 = gl.program_id(0) * (BN * TURNS)
    at = lane[:, None] + r[None, :] * blocks
    base = codes + n0.to(gl.int64) * blocks
    read = ()  # of pieces of codes
    for turn in gl.static_range(AHEAD if AHEAD < TURNS else TURNS):
        read = read + (_load(base + turn * BN * blocks, at, n0 + turn * BN + r, lane, n_rows, blocks, EVEN),)
    entry = gl.arange(0, 256, gl.SliceLayout(1, LB))[:, None] * 8 + gl.arange(0, 8, gl.SliceLayout(0, LB))[None, :]
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    block = slab * 32 + gl.arange(0, 32, gl.SliceLayout(1, LX))
    j = gl.arange(0, 8, gl.SliceLayout(0, LX))
    inside = (block < blocks)[:, None] & (j >= 0)[None, :]
    v = gl.load(x + block[:, None] * 8 + j[None, :], mask=inside, other=0.0)
    twice = gl.reshape(gl.permute(gl.join(v, v), [0, 2, 1]), [32, 16])
    twice = gl.convert_layout(twice, gl.DotOperandLayout(0, MMA, 2), assert_trivial=True)
    first = _table(books, entry, twice, LT, MMA, HALF)
    second = _table(books + 2048, entry, twice, LT, MMA, HALF)
    if MERGED:
        both = gl.reshape(gl.permute(gl.join(first, second), [0, 2, 1]), [32, 512])
    out = gl.arange(0, BN, gl.SliceLayout(0, LR))
    for turn in gl.static_range(TURNS):
        word = read[turn].to(gl.int32)
        if turn + AHEAD < TURNS:
            start = (turn + AHEAD) * BN
            read = read + (_load(base + start * blocks, at, n0 + start + r, lane, n_rows, blocks, EVEN),)
        if MERGED:
            index = gl.join(word & 255, ((word >> 8) & 255) | 256)
            index = gl.reshape(gl.permute(index, [0, 2, 1]), [32, 2 * BN])
            found = gl.permute(gl.reshape(gl.gather(both, index, 1), [32, 2, BN]), [0, 2, 1])
            one, other = gl.split(found)
            total = gl.convert_layout(one + other, LR)
        else:
            total = gl.gather(first, word & 255, 1) + gl.gather(second, (word >> 8) & 255, 1)
            total = gl.convert_layout(total, LR)
        y = gl.sum(total, 0)
        n = n0 + turn * BN + out
        gl.store(partial + slab * n_rows + n, y, mask=n < n_rows)
