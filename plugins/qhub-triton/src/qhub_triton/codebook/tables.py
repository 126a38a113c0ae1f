"""Products with one row by tables of partial sums (experimental)."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["finish_kernel", "gather_kernel", "lookup_kernel", "tables_kernel"]


@triton.jit
def _table(x, books, block, inside, entry, E: tl.constexpr, G: tl.constexpr, TRANS: tl.constexpr):
    """Return the products of each of ``block``'s inputs with each entry: (S, E), or (E, S) with ``TRANS``."""
    v = tl.load(x + block * G, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(books + entry * G).to(tl.float32)
    total = v[None, :] * b[:, None] if TRANS else v[:, None] * b[None, :]
    for j in tl.static_range(1, G):
        v = tl.load(x + block * G + j, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(books + entry * G + j).to(tl.float32)
        total += v[None, :] * b[:, None] if TRANS else v[:, None] * b[None, :]
    return total


@triton.jit
def tables_kernel(
    x, books, tables, blocks, C: tl.constexpr, E: tl.constexpr, G: tl.constexpr, S: tl.constexpr
):
    """Write ``tables`` (blocks, C, E) float32."""
    block = tl.program_id(0) * S + tl.arange(0, S)
    c = tl.program_id(1)
    entry = tl.arange(0, E)
    t = _table(x, books + c * E * G, block, block < blocks, entry, E, G, False)
    tl.store(tables + (block * C + c)[:, None] * E + entry[None, :], t, mask=(block < blocks)[:, None])


@triton.jit
def finish_kernel(partial, scales, out, n_rows, SPLITS: tl.constexpr, SP: tl.constexpr, BN: tl.constexpr):
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    s = tl.arange(0, SP)
    live = n < n_rows
    p = tl.load(partial + s[:, None] * n_rows + n[None, :], mask=(s < SPLITS)[:, None] & live[None, :], other=0.0)
    y = tl.sum(p, 0) * tl.load(scales + n, mask=live, other=0.0).to(tl.float32)
    tl.store(out + n, y.to(out.dtype.element_ty), mask=live)


@triton.jit
def _last(counter, total):
    tl.debug_barrier()
    done = tl.atomic_add(counter, 1, sem="acq_rel")
    return done == total - 1


@triton.jit
def lookup_kernel(
    tables,
    codes,
    partial,
    n_rows,
    blocks,
    C: tl.constexpr,
    E: tl.constexpr,
    S: tl.constexpr,
    ROWS: tl.constexpr,
    BN: tl.constexpr,
    VEC: tl.constexpr,
    STAGES: tl.constexpr,
):
    """tables (blocks, C, E) float32 in global memory; codes (N, blocks) words of C bytes; partial (splits, N)."""
    block = tl.program_id(1) * S + tl.max_contiguous(tl.arange(0, S), VEC)
    base = tables + block * (C * E)
    for start in tl.range(0, ROWS, BN, num_stages=STAGES):
        n = tl.program_id(0) * ROWS + start + tl.arange(0, BN)
        live = n < n_rows
        row = tl.where(live, n, 0)
        code = tl.load(codes + row[:, None] * blocks + block[None, :]).to(tl.int32)
        total = tl.load(base[None, :] + (code & 255))
        for c in tl.static_range(1, C):
            total += tl.load(base[None, :] + c * E + ((code >> (8 * c)) & 255))
        tl.store(partial + tl.program_id(1) * n_rows + n, tl.sum(total, 1), mask=live)


@triton.jit
def gather_kernel(
    x,
    books,
    codes,
    partial,
    n_rows,
    blocks,
    depth,
    C: tl.constexpr,
    E: tl.constexpr,
    G: tl.constexpr,
    S: tl.constexpr,
    BN: tl.constexpr,
    VEC: tl.constexpr,
    LANES: tl.constexpr,
):
    """As lookup_kernel, tables built here and held in shared memory. ``depth``: blocks of a program."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    live = n < n_rows
    row = tl.where(live, n, 0)
    entry = tl.arange(0, E)
    first = tl.program_id(1) * depth
    total = tl.zeros([BN, S], tl.float32)
    for start in range(first, first + depth, S):
        block = start + tl.max_contiguous(tl.arange(0, S), VEC)
        code = tl.load(codes + row[:, None] * blocks + block[None, :]).to(tl.int32)
        for c in tl.static_range(0, C):
            t = _table(x, books + c * E * G, block, block < blocks, entry, E, G, LANES)
            index = (code >> (8 * c)) & 255
            if LANES:
                total += tl.gather(t, index, 0)
            else:
                total += tl.trans(tl.gather(t, tl.trans(index), 1))
    tl.store(partial + tl.program_id(1) * n_rows + n, tl.sum(total, 1), mask=live)
