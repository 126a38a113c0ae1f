"""Attention of one query token a row over the filled part of a static cache (flash decoding).

One program takes the query heads that share a key head, and a share of the positions; shares are split evenly over what
is filled, so the work follows the text, not the cache. The last program of a head to finish adds the shares up, always in
the same order: results do not depend on who was last. Source: Dao et al., "Flash-Decoding for long-context inference"
(2023), for the split; Dao et al., FlashAttention (2022), section 3.1, for the running softmax.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qhub_triton.decoding.overlapping import early

__all__ = ["attend"]

# Positions read at once, and the fewest blocks worth a program of their own.
_BLOCK = 64
_LEAST = 2
_counters: dict[tuple[torch.device, int], Tensor] = {}


@triton.jit
def _attend(
    q_ptr,
    keys_ptr,
    values_ptr,
    y_ptr,
    position_ptr,
    start_ptr,
    shares_ptr,
    tops_ptr,
    counter_ptr,
    batch_stride,
    head_stride,
    place_stride,
    scale,
    softcap,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLITS: tl.constexpr,
    LEAST: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY_START: tl.constexpr,
):
    if EARLY_START:
        tl.extra.cuda.gdc_launch_dependents()
    if EARLY_START:
        tl.extra.cuda.gdc_wait()
    which = tl.program_id(0)
    split = tl.program_id(1)
    row = (which // KV_HEADS).to(tl.int64)
    head = which % KV_HEADS
    last = tl.load(position_ptr)
    first = tl.load(start_ptr + row)
    if WINDOW > 0:
        first = tl.maximum(first, last - WINDOW + 1)
    first_block = first // BLOCK
    blocks = last // BLOCK + 1 - first_block
    share = tl.maximum(LEAST, tl.cdiv(blocks, SPLITS))
    active = tl.cdiv(blocks, share)
    if split < active:
        g = tl.arange(0, ROWS)
        d = tl.arange(0, WIDE)
        j = tl.arange(0, BLOCK)
        real = (g[:, None] < GROUP) & (d[None, :] < SIZE)
        q_at = (which.to(tl.int64) * GROUP + g[:, None]) * SIZE + d[None, :]
        q = tl.load(q_ptr + q_at, mask=real, other=0.0)
        base = row * batch_stride + head.to(tl.int64) * head_stride
        top = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        mixed = tl.zeros((ROWS, WIDE), tl.float32)
        begin = first_block + split * share
        end = tl.minimum(begin + share, first_block + blocks)
        for block in range(begin, end):
            place = block * BLOCK + j
            seen = (place >= first) & (place <= last)
            at = base + place[:, None] * place_stride + d[None, :]
            read = seen[:, None] & (d[None, :] < SIZE)
            k = tl.load(keys_ptr + at, mask=read, other=0.0)
            v = tl.load(values_ptr + at, mask=read, other=0.0)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
            if CAPPED:
                z = s / softcap
                # tanh, written so that it cannot overflow to NaN
                e = tl.exp(-2.0 * tl.abs(z))
                s = softcap * tl.where(z < 0, -1.0, 1.0) * (1.0 - e) / (1.0 + e)
            s = tl.where(seen[None, :], s, float("-inf"))
            higher = tl.maximum(top, tl.max(s, 1))
            fade = tl.exp(top - higher)
            p = tl.exp(s - higher[:, None])
            total = total * fade + tl.sum(p, 1)
            mixed = mixed * fade[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
            top = higher
        if active == 1:
            tl.store(y_ptr + q_at, (mixed / total[:, None]).to(y_ptr.dtype.element_ty), mask=real)
        else:
            slot = which.to(tl.int64) * SPLITS + split
            at = slot * ROWS * WIDE + g[:, None] * WIDE + d[None, :]
            tl.store(shares_ptr + at, mixed)
            tl.store(tops_ptr + slot * 2 * ROWS + g, top)
            tl.store(tops_ptr + slot * 2 * ROWS + ROWS + g, total)
            # All threads' shares are written before the count is raised.
            tl.debug_barrier()
            before = tl.atomic_add(counter_ptr + which, 1, sem="acq_rel", scope="gpu")
            if before == active - 1:
                tl.store(counter_ptr + which, 0)
                top = tl.full((ROWS,), float("-inf"), tl.float32)
                total = tl.zeros((ROWS,), tl.float32)
                mixed = tl.zeros((ROWS, WIDE), tl.float32)
                for other in range(0, active):
                    slot = which.to(tl.int64) * SPLITS + other
                    own = tl.load(tops_ptr + slot * 2 * ROWS + g, cache_modifier=".cg")
                    weight = tl.load(tops_ptr + slot * 2 * ROWS + ROWS + g, cache_modifier=".cg")
                    at = slot * ROWS * WIDE + g[:, None] * WIDE + d[None, :]
                    part = tl.load(shares_ptr + at, cache_modifier=".cg")
                    higher = tl.maximum(top, own)
                    fade, rise = tl.exp(top - higher), tl.exp(own - higher)
                    total = total * fade + weight * rise
                    mixed = mixed * fade[:, None] + part * rise[:, None]
                    top = higher
                tl.store(y_ptr + q_at, (mixed / total[:, None]).to(y_ptr.dtype.element_ty), mask=real)


def attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    start: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Attend over the cached positions; see :func:`qhub.decoding.operations.attend`."""
    batch, heads, size = q.shape
    kv_heads, capacity = keys.shape[1:3]
    group = heads // kv_heads
    if size > 256 or group > 64 or keys.stride() != values.stride() or keys.stride(-1) != 1:
        raise NotImplementedError("heads of up to 256 features, 64 of them a key head, a plain cache")
    if q.dtype != keys.dtype:
        raise NotImplementedError("a cache of the query's dtype")
    q = q.contiguous()
    y = torch.empty_like(q)
    count = batch * kv_heads
    splits = _splits(q.device, count, capacity)
    rows, wide = max(16, triton.next_power_of_2(group)), max(16, triton.next_power_of_2(size))
    shares = torch.empty(count * splits * rows * wide, dtype=torch.float32, device=q.device)
    tops = torch.empty(count * splits * 2 * rows, dtype=torch.float32, device=q.device)
    _attend[(count, splits)](
        q,
        keys,
        values,
        y,
        position,
        start,
        shares,
        tops,
        _counter(q.device, count),
        keys.stride(0),
        keys.stride(1),
        keys.stride(2),
        scale,
        softcap or 1.0,
        KV_HEADS=kv_heads,
        GROUP=group,
        SIZE=size,
        WINDOW=window or 0,
        CAPPED=softcap is not None,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        SPLITS=splits,
        LEAST=_LEAST,
        ROWS=rows,
        WIDE=wide,
        BLOCK=_BLOCK,
        num_warps=4,
        num_stages=2,
        **early(q.device),
    )
    return y.view(batch, heads * size)


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
