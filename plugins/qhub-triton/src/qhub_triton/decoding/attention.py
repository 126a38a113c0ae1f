"""One token's attention a row, whole: norms and rotation of queries and keys, the cache written, the cache read.

One program takes the query heads that share a key head, and a share of the positions; shares are split evenly over
what is filled, so the work follows the text, not the cache. The last program of a head to finish adds the shares up,
always in the same order: results do not depend on who was last. The new key and value come from the projections, not
from the cache, so no program waits for another. Source: Dao et al., "Flash-Decoding for long-context inference" (2023),
for the split; Dao et al., FlashAttention (2022), section 3.1, for the running softmax.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qhub_triton.decoding.norms import normed
from qhub_triton.decoding.overlapping import early

__all__ = ["attend_token"]

# Positions read at once, and the fewest blocks worth a program of their own.
_BLOCK = 64
_LEAST = 2
_WARPS = 4
_counters: dict[tuple[torch.device, int], Tensor] = {}


@triton.jit
def _turned(
    source_ptr,
    at,
    partner,
    real,
    cos,
    sin,
    weight_ptr,
    d,
    other,
    eps,
    AXIS: tl.constexpr,
    SIZE: tl.constexpr,
    HALF: tl.constexpr,
    NORM: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUND: tl.constexpr,
    dtype: tl.constexpr,
):
    """Return heads read at ``at``, normed and rotated, in ``dtype``; ``partner``: where their other halves lie."""
    x = tl.load(source_ptr + at, mask=real, other=0.0).to(tl.float32)
    z = tl.load(source_ptr + partner, mask=real, other=0.0).to(tl.float32)
    if NORM:
        mean = tl.sum(x * x, AXIS) / SIZE
        w = tl.load(weight_ptr + d, mask=d < SIZE, other=0.0).to(tl.float32)
        u = tl.load(weight_ptr + other, mask=d < SIZE, other=0.0).to(tl.float32)
        if AXIS == 1:
            mean, w, u = mean[:, None], w[None, :], u[None, :]
        x = normed(x, w, mean, eps, OFFSET, ROUND, dtype).to(tl.float32)
        z = normed(z, u, mean, eps, OFFSET, ROUND, dtype).to(tl.float32)
    sign = tl.where(d < HALF, -1.0, 1.0)
    if AXIS == 1:
        cos, sin, sign = cos[None, :], sin[None, :], sign[None, :]
    return (x * cos + sign * z * sin).to(dtype)


@triton.jit
def _capped(s, softcap, CAPPED: tl.constexpr):
    if CAPPED:
        z = s / softcap
        # tanh, written so that it cannot overflow to NaN
        e = tl.exp(-2.0 * tl.abs(z))
        s = softcap * tl.where(z < 0, -1.0, 1.0) * (1.0 - e) / (1.0 + e)
    return s


@triton.jit
def _add_up(
    shares_ptr,
    tops_ptr,
    y_ptr,
    which,
    active,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    SPLITS: tl.constexpr,
    PADDED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Write the heads of ``which`` from the shares of its ``active`` programs: some at a time, in order."""
    COLUMNS: tl.constexpr = PADDED * WIDE
    AT_ONCE: tl.constexpr = max(1, 4096 // COLUMNS)
    column = tl.arange(0, COLUMNS)
    g, d = column // WIDE, column % WIDE
    top = tl.full((COLUMNS,), float("-inf"), tl.float32)
    total = tl.zeros((COLUMNS,), tl.float32)
    mixed = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, active, AT_ONCE):
        split = start + tl.arange(0, AT_ONCE)
        slot = (which * SPLITS + split)[:, None]
        read = (split < active)[:, None] & (column < COLUMNS)[None, :]
        tops = tops_ptr + slot * 2 * PADDED + g[None, :]
        high = tl.load(tops, mask=read, other=float("-inf"), cache_modifier=".cg")
        weight = tl.load(tops + PADDED, mask=read, other=0.0, cache_modifier=".cg")
        shares = shares_ptr + slot * COLUMNS + column[None, :]
        summand = tl.load(shares, mask=read, other=0.0, cache_modifier=".cg")
        higher = tl.maximum(top, tl.max(high, 0))
        fade, rise = tl.exp(top - higher), tl.exp(high - higher[None, :])
        total = total * fade + tl.sum(weight * rise, 0)
        mixed = mixed * fade + tl.sum(summand * rise, 0)
        top = higher
    y_at = (which * GROUP + g) * SIZE + d
    tl.store(y_ptr + y_at, (mixed / total).to(y_ptr.dtype.element_ty), mask=(g < GROUP) & (d < SIZE))


@triton.jit
def _attend_token(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    q_weight_ptr,
    k_weight_ptr,
    keys_ptr,
    values_ptr,
    y_ptr,
    position_ptr,
    start_ptr,
    shares_ptr,
    tops_ptr,
    counter_ptr,
    qkv_stride,
    rotary_stride,
    batch_stride,
    head_stride,
    place_stride,
    scale,
    softcap,
    q_eps,
    k_eps,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    ROTARY: tl.constexpr,
    Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr,
    Q_OFFSET: tl.constexpr,
    K_OFFSET: tl.constexpr,
    Q_ROUND: tl.constexpr,
    K_ROUND: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLITS: tl.constexpr,
    LEAST: tl.constexpr,
    ROWS: tl.constexpr,
    PADDED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY_START: tl.constexpr,
):
    if EARLY_START:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    which = tl.program_id(0)
    split = tl.program_id(1)
    row = (which // KV_HEADS).to(tl.int64)
    head = which % KV_HEADS
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    last = tl.load(position_ptr)
    first = tl.load(start_ptr + row)
    if WINDOW > 0:
        first = tl.maximum(first, last - WINDOW + 1)
    # The cached positions, first to last - 1; the new one is added by the program with the last share.
    first_block = first // BLOCK
    blocks = tl.where(last > first, (last - 1) // BLOCK + 1 - first_block, 0)
    share = tl.maximum(LEAST, tl.cdiv(blocks, SPLITS))
    active = tl.maximum(tl.cdiv(blocks, share), 1)
    if split < active:
        g = tl.arange(0, ROWS)
        d = tl.arange(0, WIDE)
        j = tl.arange(0, BLOCK)
        half: tl.constexpr = ROTARY // 2
        # Features past ROTARY are their own partners and stay as they are.
        other = tl.where(d < half, d + half, tl.where(d < ROTARY, d - half, d))
        cos = tl.load(cos_ptr + row * rotary_stride + d, mask=d < ROTARY, other=1.0).to(tl.float32)
        sin = tl.load(sin_ptr + row * rotary_stride + d, mask=d < ROTARY, other=0.0).to(tl.float32)
        real = (g[:, None] < GROUP) & (d[None, :] < SIZE)
        source = qkv_ptr + row * qkv_stride
        heads = (head * GROUP + g[:, None]) * SIZE
        q = _turned(
            source, heads + d[None, :], heads + other[None, :], real, cos, sin, q_weight_ptr, d, other, q_eps,
            1, SIZE, half, Q_NORM, Q_OFFSET, Q_ROUND, dtype,
        )  # fmt: skip
        base = row * batch_stride + head.to(tl.int64) * head_stride
        top = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        mixed = tl.zeros((ROWS, WIDE), tl.float32)
        begin = first_block + split * share
        end = tl.minimum(begin + share, first_block + blocks)
        for block in range(begin, end):
            place = block * BLOCK + j
            seen = (place >= first) & (place < last)
            at = base + place[:, None] * place_stride + d[None, :]
            read = seen[:, None] & (d[None, :] < SIZE)
            k = tl.load(keys_ptr + at, mask=read, other=0.0)
            v = tl.load(values_ptr + at, mask=read, other=0.0)
            s = _capped(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale, softcap, CAPPED)
            s = tl.where(seen[None, :], s, float("-inf"))
            higher = tl.maximum(top, tl.max(s, 1))
            fade = tl.exp(top - higher)
            p = tl.exp(s - higher[:, None])
            total = total * fade + tl.sum(p, 1)
            mixed = mixed * fade[:, None] + tl.dot(p.to(dtype), v, input_precision=PRECISION)
            top = higher
        if split == active - 1:
            own = (KV_HEADS * GROUP + head) * SIZE
            new_k = _turned(
                source, own + d, own + other, d < SIZE, cos, sin, k_weight_ptr, d, other, k_eps,
                0, SIZE, half, K_NORM, K_OFFSET, K_ROUND, dtype,
            )  # fmt: skip
            new_v = tl.load(source + own + KV_HEADS * SIZE + d, mask=d < SIZE, other=0.0)
            tl.store(keys_ptr + base + last * place_stride + d, new_k, mask=d < SIZE)
            tl.store(values_ptr + base + last * place_stride + d, new_v, mask=d < SIZE)
            s = tl.sum(q.to(tl.float32) * new_k.to(tl.float32)[None, :], 1) * scale
            s = _capped(s, softcap, CAPPED)
            higher = tl.maximum(top, s)
            fade, rise = tl.exp(top - higher), tl.exp(s - higher)
            total = total * fade + rise
            # The weight is rounded as those of the other positions are.
            mixed = mixed * fade[:, None] + rise.to(dtype).to(tl.float32)[:, None] * new_v.to(tl.float32)[None, :]
            top = higher
        if active == 1:
            y_at = (which.to(tl.int64) * GROUP + g[:, None]) * SIZE + d[None, :]
            tl.store(y_ptr + y_at, (mixed / total[:, None]).to(dtype), mask=real)
        else:
            slot = which.to(tl.int64) * SPLITS + split
            at = slot * PADDED * WIDE + g[:, None] * WIDE + d[None, :]
            tl.store(shares_ptr + at, mixed, mask=g[:, None] < PADDED)
            tl.store(tops_ptr + slot * 2 * PADDED + g, top, mask=g < PADDED)
            tl.store(tops_ptr + slot * 2 * PADDED + PADDED + g, total, mask=g < PADDED)
            # All threads' shares are written before the count is raised.
            tl.debug_barrier()
            before = tl.atomic_add(counter_ptr + which, 1, sem="acq_rel", scope="gpu")
            if before == active - 1:
                tl.store(counter_ptr + which, 0)
                _add_up(shares_ptr, tops_ptr, y_ptr, which.to(tl.int64), active, GROUP, SIZE, SPLITS, PADDED, WIDE)


def attend_token(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    start: Tensor,
    heads: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    q_norm: tuple[Tensor, Any] | None,
    k_norm: tuple[Tensor, Any] | None,
) -> Tensor:
    """Attend with one token a row; see :func:`qhub.decoding.operations.attend_token`."""
    batch, kv_heads, capacity, size = keys.shape
    group = heads // kv_heads
    if size > 256 or group > 64 or keys.stride() != values.stride() or keys.stride(-1) != 1:
        raise NotImplementedError("heads of up to 256 features, 64 of them a key head, a plain cache")
    if not qkv.dtype == keys.dtype == values.dtype:
        raise NotImplementedError("a cache of the input's dtype")
    if cos.shape[-1] > size or cos.shape[-1] % 2 or cos.stride(-1) != 1 or sin.stride() != cos.stride():
        raise NotImplementedError("an even number of rotated features in plain rows")
    if any(norm is not None and norm[0].dtype != qkv.dtype for norm in (q_norm, k_norm)):
        raise NotImplementedError("norms of the input's dtype")
    qkv = qkv.contiguous()
    device = qkv.device
    y = torch.empty(batch, heads * size, dtype=qkv.dtype, device=device)
    count = batch * kv_heads
    splits = _splits(device, count, capacity)
    padded, wide = triton.next_power_of_2(group), max(16, triton.next_power_of_2(size))
    shares = torch.empty(count * splits * padded * wide, dtype=torch.float32, device=device)
    tops = torch.empty(count * splits * 2 * padded, dtype=torch.float32, device=device)
    begin, options = early(device)
    q_weight, q_rule = q_norm or (qkv, None)
    k_weight, k_rule = k_norm or (qkv, None)
    _attend_token[(count, splits)](
        qkv,
        cos,
        sin,
        q_weight,
        k_weight,
        keys,
        values,
        y,
        position,
        start,
        shares,
        tops,
        _counter(device, count),
        qkv.stride(0),
        cos.stride(0) if cos.shape[0] > 1 else 0,
        keys.stride(0),
        keys.stride(1),
        keys.stride(2),
        scale,
        softcap or 1.0,
        q_rule.eps if q_rule else 0.0,
        k_rule.eps if k_rule else 0.0,
        KV_HEADS=kv_heads,
        GROUP=group,
        SIZE=size,
        ROTARY=cos.shape[-1],
        Q_NORM=q_rule is not None,
        K_NORM=k_rule is not None,
        Q_OFFSET=q_rule.offset if q_rule else 0.0,
        K_OFFSET=k_rule.offset if k_rule else 0.0,
        Q_ROUND=q_rule.early if q_rule else False,
        K_ROUND=k_rule.early if k_rule else False,
        WINDOW=window or 0,
        CAPPED=softcap is not None,
        PRECISION="ieee" if qkv.dtype == torch.float32 else "tf32",
        SPLITS=splits,
        LEAST=_LEAST,
        ROWS=max(16, padded),
        PADDED=padded,
        WIDE=wide,
        BLOCK=_BLOCK,
        num_warps=_WARPS,
        num_stages=2,
        **begin,
        **options,
    )
    return y


def _splits(device: torch.device, count: int, capacity: int) -> int:
    """Return how many programs share the positions of a head: enough to fill the card twice, a power of two."""
    units = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
    most = triton.cdiv(triton.cdiv(capacity, _BLOCK), _LEAST)
    return max(1, min(triton.next_power_of_2(triton.cdiv(2 * units, count)), most))


def _counter(device: torch.device, count: int) -> Tensor:
    """Return the counters of finished shares: zero before and after every launch."""
    size = triton.next_power_of_2(count)
    found = _counters.get((device, size))
    if found is None:
        found = _counters[device, size] = torch.zeros(size, dtype=torch.int32, device=device)
    return found
