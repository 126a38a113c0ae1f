"""Queries and keys of one token a row: normed, rotated, keys and values written into the cache. A head each program."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qhub_triton.decoding.norms import normed
from qhub_triton.decoding.overlapping import early

__all__ = ["rotate_store"]


@triton.jit
def _rotate_store(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    q_ptr,
    keys_ptr,
    values_ptr,
    position_ptr,
    q_weight_ptr,
    k_weight_ptr,
    qkv_stride,
    rotary_stride,
    batch_stride,
    head_stride,
    place_stride,
    q_eps,
    k_eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    ROTARY: tl.constexpr,
    Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr,
    Q_OFFSET: tl.constexpr,
    K_OFFSET: tl.constexpr,
    Q_EARLY: tl.constexpr,
    K_EARLY: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY_START: tl.constexpr,
):
    if EARLY_START:
        tl.extra.cuda.gdc_launch_dependents()
    if EARLY_START:
        tl.extra.cuda.gdc_wait()
    head = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < SIZE
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    half: tl.constexpr = ROTARY // 2
    source = qkv_ptr + row * qkv_stride + head * SIZE
    place = tl.load(position_ptr)
    if head >= HEADS + KV_HEADS:
        to = values_ptr + row * batch_stride + (head - HEADS - KV_HEADS) * head_stride + place * place_stride
        tl.store(to + at, tl.load(source + at, mask=inside), mask=inside)
    else:
        # The partner of a feature in the other half; features past ROTARY stay as they are.
        turned = at < ROTARY
        partner = tl.where(at < half, at + half, at - half)
        partner = tl.where(turned, partner, at)
        x = tl.load(source + at, mask=inside, other=0.0).to(tl.float32)
        z = tl.load(source + partner, mask=inside, other=0.0).to(tl.float32)
        cos = tl.load(cos_ptr + row * rotary_stride + at, mask=turned, other=1.0).to(tl.float32)
        sin = tl.load(sin_ptr + row * rotary_stride + at, mask=turned, other=0.0).to(tl.float32)
        if head < HEADS:
            if Q_NORM:
                mean = tl.sum(x * x, 0) / SIZE
                w = tl.load(q_weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
                x = normed(x, w, mean, q_eps, Q_OFFSET, Q_EARLY, dtype).to(tl.float32)
                w = tl.load(q_weight_ptr + partner, mask=inside, other=0.0).to(tl.float32)
                z = normed(z, w, mean, q_eps, Q_OFFSET, Q_EARLY, dtype).to(tl.float32)
            y = x * cos + tl.where(at < half, -z, z) * sin
            tl.store(q_ptr + (row * HEADS + head) * SIZE + at, y.to(dtype), mask=inside)
        else:
            if K_NORM:
                mean = tl.sum(x * x, 0) / SIZE
                w = tl.load(k_weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
                x = normed(x, w, mean, k_eps, K_OFFSET, K_EARLY, dtype).to(tl.float32)
                w = tl.load(k_weight_ptr + partner, mask=inside, other=0.0).to(tl.float32)
                z = normed(z, w, mean, k_eps, K_OFFSET, K_EARLY, dtype).to(tl.float32)
            y = x * cos + tl.where(at < half, -z, z) * sin
            to = keys_ptr + row * batch_stride + (head - HEADS) * head_stride + place * place_stride
            tl.store(to + at, y.to(dtype), mask=inside)


def rotate_store(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    heads: int,
    q_norm: tuple[Tensor, Any] | None,
    k_norm: tuple[Tensor, Any] | None,
) -> Tensor:
    """Rotate one token a row into the cache, return its queries; see :func:`qhub.decoding.operations.rotate_store`."""
    batch, kv_heads, _, size = keys.shape
    if qkv.dtype != keys.dtype or keys.dtype != values.dtype or keys.stride() != values.stride():
        raise NotImplementedError("a cache of the input's dtype whose keys and values lie alike")
    if cos.shape[-1] > size or cos.shape[-1] % 2 or cos.stride(-1) != 1 or sin.stride() != cos.stride():
        raise NotImplementedError("an even number of rotated features in plain rows")
    for norm in (q_norm, k_norm):
        if norm is not None and norm[0].dtype != qkv.dtype:
            raise NotImplementedError("norms of the input's dtype")
    qkv = qkv.contiguous()
    q = torch.empty(batch, heads, size, dtype=qkv.dtype, device=qkv.device)
    q_weight, q_rule = q_norm or (qkv, None)
    k_weight, k_rule = k_norm or (qkv, None)
    _rotate_store[(heads + 2 * kv_heads, batch)](
        qkv,
        cos,
        sin,
        q,
        keys,
        values,
        position,
        q_weight,
        k_weight,
        qkv.stride(0),
        cos.stride(0) if cos.shape[0] > 1 else 0,
        keys.stride(0),
        keys.stride(1),
        keys.stride(2),
        q_rule.eps if q_rule else 0.0,
        k_rule.eps if k_rule else 0.0,
        HEADS=heads,
        KV_HEADS=kv_heads,
        SIZE=size,
        ROTARY=cos.shape[-1],
        Q_NORM=q_rule is not None,
        K_NORM=k_rule is not None,
        Q_OFFSET=q_rule.offset if q_rule else 0.0,
        K_OFFSET=k_rule.offset if k_rule else 0.0,
        Q_EARLY=q_rule.early if q_rule else False,
        K_EARLY=k_rule.early if k_rule else False,
        BLOCK=triton.next_power_of_2(size),
        num_warps=1,
        **early(qkv.device),
    )
    return q
