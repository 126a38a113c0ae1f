"""The product of few rows on any GPU: vectors are looked up, put together to a tile, and multiplied by matrix units.

What is looked up is split into two numbers of the input's dtype, so that sums of vectors, which need more bits than
that, are multiplied as they are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qhub_triton.codebook.expansion import code_of, vectors

__all__ = ["finish_kernel", "product_kernel"]


@triton.jit(do_not_specialize=["m_rows"])
def product_kernel(
    x, codes, books, partial, m_rows, n_rows, blocks, stride_codes, depth,
    PLACES: tl.constexpr, STRIDE: tl.constexpr, NBITS: tl.constexpr, SHIFTS: tl.constexpr, DIVISORS: tl.constexpr,
    E: tl.constexpr, G: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BB: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Write ``partial`` (splits, M, N) float32: x (M, K) times the stored matrix, scales left out.

    ``depth``: blocks of a program, a multiple of ``BB``. ``WIDE``: multiply in float32.
    """
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(2) * BM + tl.arange(0, BM)
    first = tl.program_id(1) * depth
    row = codes + n.to(tl.int64)[:, None] * stride_codes
    line = x + m.to(tl.int64)[:, None] * (blocks * G)
    acc = tl.zeros([BM, BN], tl.float32)
    for start in range(first, tl.minimum(first + depth, blocks), BB):
        block = start + tl.arange(0, BB)
        inside = (n < n_rows)[:, None] & (block < blocks)[None, :]
        value = tl.zeros([BN, BB, G], tl.float32)
        for c in tl.static_range(len(NBITS)):
            code = code_of(row, block[None, :], inside, PLACES[c][0], PLACES[c][1], STRIDE, NBITS[c])
            vector = vectors(books + c * E * G, code, G, SHIFTS[c], DIVISORS[c])
            value = vector if c == 0 else value + vector
        w = tl.trans(tl.reshape(value, [BN, BB * G]))
        k = start * G + tl.arange(0, BB * G)
        v = tl.load(line + k[None, :], mask=(m < m_rows)[:, None] & (k < blocks * G)[None, :], other=0.0)
        if WIDE:
            acc = tl.dot(v.to(tl.float32), w, acc, input_precision="ieee")
        else:
            high = w.to(v.dtype)
            low = (w - high.to(tl.float32)).to(v.dtype)
            acc = tl.dot(v, high, tl.dot(v, low, acc))
    at = (tl.program_id(1).to(tl.int64) * m_rows + m[:, None]) * n_rows + n[None, :]
    tl.store(partial + at, acc, mask=(m < m_rows)[:, None] & (n < n_rows)[None, :])


@triton.jit(do_not_specialize=["m_rows", "splits"])
def finish_kernel(
    partial, scales, lengths, bias, out, m_rows, n_rows, scale_rows, splits,
    HAS_SCALES: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_BIAS: tl.constexpr, OVERLAP: tl.constexpr,
    BS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Write ``out`` (M, N): the sum of ``partial`` (splits, M, N) in a fixed order, scaled, biased."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1)
    live = n < n_rows
    total = tl.zeros([BN], tl.float32)
    step = m_rows.to(tl.int64) * n_rows
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    for start in range(0, splits, BS):
        s = start + tl.arange(0, BS)
        at = partial + s.to(tl.int64)[:, None] * step + m.to(tl.int64) * n_rows + n[None, :]
        total += tl.sum(tl.load(at, mask=(s < splits)[:, None] & live[None, :], other=0.0), 0)
    y = total
    if HAS_SCALES:
        y = y * tl.load(scales + n // scale_rows, mask=live, other=0.0).to(tl.float32)
    if HAS_LENGTHS:
        y = y * tl.load(lengths + m)
    if HAS_BIAS:
        y = y + tl.load(bias + n, mask=live, other=0.0).to(tl.float32)
    tl.store(out + m.to(tl.int64) * n_rows + n, y.to(out.dtype.element_ty), mask=live)
