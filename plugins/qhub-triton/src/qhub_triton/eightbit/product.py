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


@triton.jit(do_not_specialize=["M"])
def multiply(
    w, codes, out, own, steps, bias, x, flags, pieces, work, counters, M, N, K, rows, cols, across,
    UNIT: tl.constexpr, GROUP: tl.constexpr, BLOCKS: tl.constexpr, OUTLIERS: tl.constexpr, BIAS: tl.constexpr,
    EXPONENTS: tl.constexpr, EVEN: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr, BN: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, IMPRECISE: tl.constexpr, BAND: tl.constexpr,
    PDL: tl.constexpr, AHEAD: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """Write ``out`` (M, N) = codes @ w.T, scaled, plus ``bias`` (N,).

    ``own``: scales of the weight, ``across`` to a row of blocks, one for ``rows`` x ``cols`` weights, times ``UNIT``;
    ``BLOCKS``: they change along K. ``steps``: those of the inputs, (M,) or (K / GROUP, M).
    ``OUTLIERS``: columns in ``flags`` (K,) are multiplied as ``x`` (M, K) has them; ``pieces`` says which runs of
    ``PIECE`` hold one, ``PIECES`` is their number up to a power of two. ``IMPRECISE``: along K, what a matrix unit may
    add up at its own precision (some 14 bits on Hopper); 0: all. ``BAND``: tiles of rows whose programs follow each other.
    ``PDL``: launched while the inputs are being rounded; ``AHEAD``: bytes of each row of weights to ask for before
    they are (a multiple of 32; K and the rows' addresses multiples of 16). ``CHAIN``: what follows may be launched at once.
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
    # Rows beyond the end are read as the last one and never written.
    w_row = tl.minimum(n, N - 1) - tile_n * BN
    x_row = tl.minimum(m, M - 1) - tile_m * BM
    w_at = w + (tile_n * BN).to(tl.int64) * K + w_row[:, None] * K + k[None, :]
    x_at = codes + (tile_m * BM).to(tl.int64) * K + x_row[:, None] * K + k[None, :]
    scale_row = tl.minimum(n, N - 1) // rows * across

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
        # The first weights come while the inputs are still being rounded.
        line = tl.arange(0, 2 * BN)
        row = tl.minimum(tile_n * BN + line // 2, N - 1)
        wanted = tl.minimum(AHEAD, (high - low) * BK) // 2
        from_k = low * BK + (line % 2) * wanted
        size = tl.maximum(tl.minimum(wanted, K - from_k), 0)
        prefetch(w, row, K, from_k, size, 2 * BN)
    if CHAIN:
        tl.extra.cuda.gdc_launch_dependents()
    if PDL:
        tl.extra.cuda.gdc_wait()
    for block in range(low, high):
        start = block * BK
        if EVEN:
            wt = tl.load(w_at + start)
            xt = tl.load(x_at + start)
        else:
            # Codes of 0, as bytes: an 8-bit float has no mask value of its own in every version.
            wt = tl.load(w_at + start, mask=(start + k < K)[None, :], other=0.0)
            xt = tl.load(x_at + start, mask=(start + k < K)[None, :], other=0.0)
        if SCALED:
            part = tl.dot(wt, tl.trans(xt), out_dtype=SUM).to(tl.float32)
            if BLOCKS:
                part = part * weight_scale(own, scale_row + start // cols, EXPONENTS)[:, None]
            if GROUP > 0:
                part = part * tl.load(steps + (start // GROUP).to(tl.int64) * M + tl.minimum(m, M - 1))[None, :]
            acc += part
        elif INTEGER:
            acc = tl.dot(wt, tl.trans(xt), acc, out_dtype=tl.int32)
        elif IMPRECISE > 0:
            acc = tl.dot(wt, tl.trans(xt), acc, max_num_imprecise_acc=IMPRECISE if IMPRECISE < BK else BK)
        else:
            acc = tl.dot(wt, tl.trans(xt), acc)
    total = acc.to(tl.float32)
    if GROUP == 0:
        total = total * tl.load(steps + tl.minimum(m, M - 1))[None, :]
    if OUTLIERS:
        some = tl.load(pieces + tl.arange(0, PIECES), mask=tl.arange(0, PIECES) * PIECE < K, other=0)
        if tl.max(some.to(tl.int32), axis=0) > 0:
            kept = tl.zeros([BN, BM], tl.float32)
            raw_at = x + (tile_m * BM).to(tl.int64) * K + x_row[:, None] * K + k[None, :]
            for block in range(low, high):
                start = block * BK
                inside = start + k < K
                column = tl.load(flags + start + k, mask=inside, other=0)
                if tl.max(column.to(tl.int32), axis=0) > 0:
                    wt = tl.load(w_at + start, mask=inside[None, :], other=0)
                    raw = tl.load(raw_at + start, mask=(inside & (column != 0))[None, :], other=0.0)
                    kept = tl.dot(wt.to(raw.dtype), tl.trans(raw), kept)
            total += kept

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
