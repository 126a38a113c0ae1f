"""One token's attention a row, whole: norms and rotation of queries and keys, the cache written, the cache read.

One program takes the query heads that share a key head, and a share of the positions; shares are split evenly over
what is filled, so the work follows the text, not the cache. Where a cache is long enough for several shares, a second
kernel adds them up, in order: results do not depend on who was first. The new key and value come from the projections,
not from the cache, so no program waits for another. Source: Dao et al., "Flash-Decoding for long-context inference"
(2023), for the split; Dao et al., FlashAttention (2022), section 3.1, for the running softmax.
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

# Positions read at once; caches up to so many blocks are read by one program a head; the fewest blocks of a share.
_BLOCK = 128
_ALONE = 2
_LEAST = 1
_WARPS = 8


@triton.jit
def _shares(
    position_ptr, start_ptr, row, WINDOW: tl.constexpr, SPLITS: tl.constexpr, LEAST: tl.constexpr, BLOCK: tl.constexpr
):
    """Return the new position, the first one seen, the first block, how many there are, how many make a share, and how
    many shares there are. Of the cached positions; the new one is added by the program with the last share."""
    last = tl.load(position_ptr)
    first = tl.load(start_ptr + row)
    if WINDOW > 0:
        first = tl.maximum(first, last - WINDOW + 1)
    first_block = first // BLOCK
    blocks = tl.where(last > first, (last - 1) // BLOCK + 1 - first_block, 0)
    share = tl.maximum(LEAST, tl.cdiv(blocks, SPLITS))
    return last, first, first_block, blocks, share, tl.maximum(tl.cdiv(blocks, share), 1)


@triton.jit
def _turned(
    x,
    z,
    w,
    u,
    cos,
    sin,
    d,
    eps,
    AXIS: tl.constexpr,
    SIZE: tl.constexpr,
    HALF: tl.constexpr,
    NORM: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUND: tl.constexpr,
    dtype: tl.constexpr,
):
    """Return heads ``x`` normed with weight ``w`` and rotated; ``z`` and ``u`` are their other halves."""
    x, z = x.to(tl.float32), z.to(tl.float32)
    if NORM:
        mean = tl.sum(x * x, AXIS) / SIZE
        w, u = w.to(tl.float32), u.to(tl.float32)
        if AXIS == 1:
            mean, w, u = mean[:, None], w[None, :], u[None, :]
        x = normed(x, w, mean, eps, OFFSET, ROUND, dtype).to(tl.float32)
        z = normed(z, u, mean, eps, OFFSET, ROUND, dtype).to(tl.float32)
    sign = tl.where(d < HALF, -1.0, 1.0)
    cos, sin = cos.to(tl.float32), sin.to(tl.float32)
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
    position_ptr,
    start_ptr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLITS: tl.constexpr,
    LEAST: tl.constexpr,
    PADDED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    MANY: tl.constexpr,
    EARLY_START: tl.constexpr,
):
    """Write one query head from its shares."""
    if EARLY_START:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    which = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1)
    _, _, _, _, _, active = _shares(position_ptr, start_ptr, which // KV_HEADS, WINDOW, SPLITS, LEAST, BLOCK)
    split, d = tl.arange(0, MANY), tl.arange(0, WIDE)
    there = split < active
    slot = which * SPLITS + split
    top = tl.load(tops_ptr + slot * 2 * PADDED + g, mask=there, other=float("-inf"))
    total = tl.load(tops_ptr + slot * 2 * PADDED + PADDED + g, mask=there, other=0.0)
    at = slot[:, None] * PADDED * WIDE + g * WIDE + d[None, :]
    share = tl.load(shares_ptr + at, mask=there[:, None] & (d < SIZE)[None, :], other=0.0)
    weight = tl.exp(top - tl.max(top, 0))
    mixed = tl.sum(share * weight[:, None], 0) / tl.sum(total * weight, 0)
    tl.store(y_ptr + (which * GROUP + g) * SIZE + d, mixed.to(y_ptr.dtype.element_ty), mask=d < SIZE)


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
    g = tl.arange(0, ROWS)
    d = tl.arange(0, WIDE)
    half: tl.constexpr = ROTARY // 2
    # Features past ROTARY are their own partners and stay as they are.
    other = tl.where(d < half, d + half, tl.where(d < ROTARY, d - half, d))
    real = (g[:, None] < GROUP) & (d[None, :] < SIZE)
    # All that does not depend on the position is asked for before the position is known.
    source = qkv_ptr + row * qkv_stride
    heads = (head * GROUP + g[:, None]) * SIZE
    q = tl.load(source + heads + d[None, :], mask=real, other=0.0)
    q_other = tl.load(source + heads + other[None, :], mask=real, other=0.0)
    own = (KV_HEADS * GROUP + head) * SIZE
    new_k = tl.load(source + own + d, mask=d < SIZE, other=0.0)
    k_other = tl.load(source + own + other, mask=d < SIZE, other=0.0)
    new_v = tl.load(source + own + KV_HEADS * SIZE + d, mask=d < SIZE, other=0.0)
    cos = tl.load(cos_ptr + row * rotary_stride + d, mask=d < ROTARY, other=1.0)
    sin = tl.load(sin_ptr + row * rotary_stride + d, mask=d < ROTARY, other=0.0)
    q_w, q_u, k_w, k_u = cos, cos, cos, cos
    if Q_NORM:
        q_w = tl.load(q_weight_ptr + d, mask=d < SIZE, other=0.0)
        q_u = tl.load(q_weight_ptr + other, mask=d < SIZE, other=0.0)
    if K_NORM:
        k_w = tl.load(k_weight_ptr + d, mask=d < SIZE, other=0.0)
        k_u = tl.load(k_weight_ptr + other, mask=d < SIZE, other=0.0)
    last, first, first_block, blocks, share, active = _shares(
        position_ptr, start_ptr, row, WINDOW, SPLITS, LEAST, BLOCK
    )
    if split < active:
        j = tl.arange(0, BLOCK)
        q = _turned(
            q, q_other, q_w, q_u, cos, sin, d, q_eps, 1, SIZE, half, Q_NORM, Q_OFFSET, Q_ROUND, dtype
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
            new_k = _turned(
                new_k, k_other, k_w, k_u, cos, sin, d, k_eps, 0, SIZE, half, K_NORM, K_OFFSET, K_ROUND, dtype
            )  # fmt: skip
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
        if SPLITS == 1:
            y_at = (which.to(tl.int64) * GROUP + g[:, None]) * SIZE + d[None, :]
            tl.store(y_ptr + y_at, (mixed / total[:, None]).to(dtype), mask=real)
        else:
            slot = which.to(tl.int64) * SPLITS + split
            at = slot * PADDED * WIDE + g[:, None] * WIDE + d[None, :]
            tl.store(shares_ptr + at, mixed, mask=g[:, None] < PADDED)
            tl.store(tops_ptr + slot * 2 * PADDED + g, top, mask=g < PADDED)
            tl.store(tops_ptr + slot * 2 * PADDED + PADDED + g, total, mask=g < PADDED)


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
    padded, wide = triton.next_power_of_2(group), max(16, triton.next_power_of_2(size))
    # Two stages of keys and values have to fit into shared memory.
    block = _BLOCK if wide * qkv.element_size() <= 256 else max(16, _BLOCK * 256 // (wide * qkv.element_size()))
    splits = _splits(device, count, triton.cdiv(capacity, block))
    shares = torch.empty(count * splits * padded * wide, dtype=torch.float32, device=device)
    tops = torch.empty(count * splits * 2 * padded, dtype=torch.float32, device=device)
    start_early, options = early(device)
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
        BLOCK=block,
        num_warps=_WARPS,
        num_stages=2,
        **start_early,
        **options,
    )
    if splits > 1:
        _add_up[(count, group)](
            shares,
            tops,
            y,
            position,
            start,
            KV_HEADS=kv_heads,
            GROUP=group,
            SIZE=size,
            WINDOW=window or 0,
            SPLITS=splits,
            LEAST=_LEAST,
            PADDED=padded,
            WIDE=wide,
            BLOCK=block,
            MANY=triton.next_power_of_2(splits),
            num_warps=4,
            **start_early,
            **options,
        )
    return y


def _splits(device: torch.device, count: int, blocks: int) -> int:
    """Return how many programs share the ``blocks`` of positions of a head: enough to fill the card twice."""
    if blocks <= _ALONE:
        return 1
    units = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
    return max(1, min(triton.next_power_of_2(triton.cdiv(2 * units, count)), triton.cdiv(blocks, _LEAST), 64))
