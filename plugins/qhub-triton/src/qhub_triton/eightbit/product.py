"""The product of 8-bit codes on matrix units: weights (N, K) and inputs (M, K), scaled in float32.

The weights are the left operand, so that a few rows of input need no padding beyond 8. ``SPLIT`` programs may share a
tile along K: each leaves its sum, and whichever comes last adds them up in their order, so the result is always the
same.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qhub_triton.eightbit.steps import power_value, prefetch

__all__ = ["multiply"]


@triton.jit
def weight_scale(own, at, EXPONENTS: tl.constexpr):
    """Return scales of weights in float32; ``EXPONENTS``: they are E8M0, as bytes."""
    if EXPONENTS:
        return power_value(tl.load(own + at).to(tl.int32) - 127)
    return tl.load(own + at).to(tl.float32)


@triton.jit
def _tile_scale(
    steps, tile_scales, m, M, start, wanted, cols,
    GROUP: tl.constexpr, FLAT: tl.constexpr, EXPONENTS: tl.constexpr,
):  # fmt: skip
    """Return what the sums over columns from ``start`` on are multiplied by, for each row of input."""
    scale = tl.full(m.shape, 1.0, tl.float32)
    if GROUP > 0:
        at = steps + (start // GROUP).to(tl.int64) * M + m
        scale = tl.load(at, mask=(m < M) & wanted, other=0.0)
    if FLAT:
        # Beyond the end nothing is multiplied any more; the first scale is as good as any.
        scale = scale * weight_scale(tile_scales, tl.where(wanted, start // cols, 0), EXPONENTS)
    return scale


@triton.jit(do_not_specialize=["M"])
def multiply(
    w, codes, out, own, steps, bias, x, columns, outliers, work, counters, M, N, K, rows, cols, across,
    UNIT: tl.constexpr, GROUP: tl.constexpr, BLOCKS: tl.constexpr, FLAT: tl.constexpr, OUTLIERS: tl.constexpr,
    BIAS: tl.constexpr, EXPONENTS: tl.constexpr, EVEN: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
    BK: tl.constexpr, SPLIT: tl.constexpr, IMPRECISE: tl.constexpr, BAND: tl.constexpr, PDL: tl.constexpr,
    AHEAD: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """Write ``out`` (M, N) = codes @ w.T, scaled, plus ``bias`` (N,).

    ``own``: scales of the weight, ``across`` to a row of blocks, one for ``rows`` x ``cols`` weights, times ``UNIT``;
    ``BLOCKS``: they change along K; ``FLAT``: but not within ``BN`` rows. ``steps``: those of the inputs, (M,) or
    (K / GROUP, M). ``OUTLIERS``: at a time, how many of the ``outliers`` () first entries of ``columns`` (K,) are
    multiplied as ``x`` (M, K) has them; their codes are 0. ``IMPRECISE``: along K, what a matrix unit may add up at its
    own precision (some 14 bits on Hopper); 0: all. ``BAND``: tiles of rows whose programs follow each other. ``PDL``:
    launched while the inputs are being rounded; ``AHEAD``: bytes of each row of weights to ask for before they are, a
    power of two from 64 on. ``CHAIN``: what follows may be launched at once.
    """
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    tile, split = tl.program_id(0), tl.program_id(1)
    band = tile // (BAND * tiles_n)
    height = tl.minimum(tiles_m - band * BAND, BAND)
    inner = tile - band * BAND * tiles_n
    tile_m, tile_n = band * BAND + inner % height, inner // height

    n = tile_n * BN + tl.arange(0, BN)
    m = tile_m * BM + tl.arange(0, BM)
    k = tl.arange(0, BK)
    present = m < M
    # Rows of the weight beyond its end are read as the last one and never written.
    w_row = w + (tile_n * BN).to(tl.int64) * K + ((tl.minimum(n, N - 1) - tile_n * BN) * K)[:, None]
    x_row = (tile_m * BM).to(tl.int64) * K + (tl.arange(0, BM) * K)[:, None]
    w_at, x_at = w_row + k[None, :], codes + x_row + k[None, :]
    scale_row = tl.minimum(n, N - 1) // rows * across
    tile_scales = own + (tile_n * BN) // rows * across

    steps_k = tl.cdiv(K, BK)
    share = tl.cdiv(steps_k, SPLIT)
    low, high = split * share, tl.minimum(split * share + share, steps_k)
    INTEGER: tl.constexpr = w.dtype.element_ty == tl.int8
    SUM: tl.constexpr = tl.int32 if INTEGER else tl.float32
    SCALED: tl.constexpr = BLOCKS or GROUP > 0
    if SCALED:
        acc = tl.zeros([BN, BM], tl.float32)
    else:
        acc = tl.zeros([BN, BM], SUM)
    if AHEAD > 0:
        # The first weights come while the inputs are still being rounded; into the cache alone, for they could be
        # written until then.
        line = low * BK + tl.arange(0, AHEAD // 64) * 64
        prefetch(w_row + tl.minimum(line, K - 1)[None, :])
    if CHAIN:
        tl.extra.cuda.gdc_launch_dependents()
    if PDL:
        tl.extra.cuda.gdc_wait()
    if SCALED:
        scale = _tile_scale(steps, tile_scales, m, M, low * BK, low < high, cols, GROUP, BLOCKS and FLAT, EXPONENTS)
    for block in range(low, high):
        start = block * BK
        if EVEN:
            wt = tl.load(w_at + start)
            xt = tl.load(x_at + start, mask=present[:, None], other=0.0)
        else:
            wt = tl.load(w_at + start, mask=(start + k < K)[None, :], other=0.0)
            xt = tl.load(x_at + start, mask=present[:, None] & (start + k < K)[None, :], other=0.0)
        if SCALED:
            # The next scales are on their way during this product.
            later = _tile_scale(
                steps, tile_scales, m, M, start + BK, block + 1 < high, cols, GROUP, BLOCKS and FLAT, EXPONENTS
            )
            if BLOCKS and not FLAT:
                each = weight_scale(own, scale_row + start // cols, EXPONENTS)
            part = tl.dot(wt, tl.trans(xt), out_dtype=SUM).to(tl.float32)
            if BLOCKS and not FLAT:
                part = part * each[:, None]
            acc += part * scale[None, :]
            scale = later
        elif INTEGER:
            acc = tl.dot(wt, tl.trans(xt), acc, out_dtype=tl.int32)
        elif IMPRECISE > 0:
            acc = tl.dot(wt, tl.trans(xt), acc, max_num_imprecise_acc=IMPRECISE if IMPRECISE < BK else BK)
        else:
            acc = tl.dot(wt, tl.trans(xt), acc)
    total = acc.to(tl.float32)
    if GROUP == 0:
        total = total * tl.load(steps + m, mask=present, other=0.0)[None, :]
    if OUTLIERS > 0:
        count = tl.load(outliers)
        for first in tl.range(split * OUTLIERS, count, SPLIT * OUTLIERS, num_stages=1):
            slot = first + tl.arange(0, OUTLIERS)
            column = tl.load(columns + slot, mask=slot < count, other=0)
            wt = tl.load(w_row + column[None, :], mask=(slot < count)[None, :], other=0)
            raw = tl.load(x + x_row + column[None, :], mask=present[:, None] & (slot < count)[None, :], other=0.0)
            total = tl.dot(wt.to(raw.dtype), tl.trans(raw), total)

    if SPLIT > 1:
        slot = work + tile.to(tl.int64) * (SPLIT * BN * BM)
        cell = tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]
        tl.store(slot + split * (BN * BM) + cell, total)
        # All of this program's sums are written before it counts itself.
        tl.debug_barrier()
        before = tl.atomic_add(counters + tile, 1, sem="acq_rel", scope="gpu")
        if before == SPLIT - 1:
            total = tl.zeros([BN, BM], tl.float32)
            for other in range(SPLIT):
                total += tl.load(slot + other * (BN * BM) + cell, cache_modifier=".cg")
            _finish(total, out, own, bias, m, n, M, N, scale_row, UNIT, BLOCKS, BIAS, EXPONENTS)
    else:
        _finish(total, out, own, bias, m, n, M, N, scale_row, UNIT, BLOCKS, BIAS, EXPONENTS)


@triton.jit
def _finish(
    total, out, own, bias, m, n, M, N, scale_row,
    UNIT: tl.constexpr, BLOCKS: tl.constexpr, BIAS: tl.constexpr, EXPONENTS: tl.constexpr,
):  # fmt: skip
    """Write a tile (BN, BM) of sums to ``out`` (M, N)."""
    if not BLOCKS:
        total = total * (weight_scale(own, scale_row, EXPONENTS) * UNIT)[:, None]
    else:
        total = total * UNIT
    if BIAS:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    at = m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out + at, tl.trans(total).to(out.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])
