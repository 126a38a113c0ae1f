"""A residual sum and the RMS norm of it, in one kernel: a row each program."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qhub_triton.decoding.overlapping import aligned, early, launches_on
from qhub_triton.launch import Launch

__all__ = ["add_norm", "normed"]


@triton.jit
def normed(x, weight, mean, eps, OFFSET: tl.constexpr, EARLY: tl.constexpr, dtype: tl.constexpr):
    """Return the RMS norm of ``x`` (float32) whose mean of squares is ``mean``, as float32 holding ``dtype`` values."""
    y = x * tl.rsqrt(mean + eps)
    if EARLY:
        # The weight is in the dtype of x, and so is the product.
        return ((weight + OFFSET).to(dtype).to(tl.float32) * y.to(dtype).to(tl.float32)).to(dtype)
    return (y * (weight + OFFSET)).to(dtype)


@triton.jit
def _add_norm(
    x_ptr,
    delta_ptr,
    weight_ptr,
    total_ptr,
    y_ptr,
    SIZE: tl.constexpr,
    EPS: tl.constexpr,
    DELTA: tl.constexpr,
    OFFSET: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY_START: tl.constexpr,
):
    if EARLY_START:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < SIZE
    where = row * SIZE + at
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if EARLY_START:
        tl.extra.cuda.gdc_wait()
    x = tl.load(x_ptr + where, mask=inside, other=0.0).to(tl.float32)
    if DELTA:
        x += tl.load(delta_ptr + where, mask=inside, other=0.0).to(tl.float32)
        total = x.to(dtype)
        tl.store(total_ptr + where, total, mask=inside)
        x = total.to(tl.float32)
    mean = tl.sum(x * x, 0) / SIZE
    tl.store(y_ptr + where, normed(x, weight, mean, EPS, OFFSET, EARLY, dtype), mask=inside)


def add_norm(x: Tensor, delta: Tensor | None, weight: Tensor, rule: Any) -> tuple[Tensor, Tensor]:
    """Return ``x + delta`` and its norm; see :func:`qhub.decoding.operations.add_norm`."""
    size = x.shape[-1]
    if size > 65536 or weight.dtype != x.dtype:
        raise NotImplementedError("rows of up to 65536 features, weights of the input's dtype")
    x, weight = aligned(x), aligned(weight)
    delta = None if delta is None else aligned(delta)
    y = torch.empty_like(x)
    total = x if delta is None else torch.empty_like(x)
    rows = x.numel() // size if size else 0
    if rows:
        device = x.device
        launch = _launch(device, size, rule.eps, rule.offset, rule.early, delta is not None, x.dtype)
        launch((rows, 1, 1), launches_on(device), x, x if delta is None else delta, weight, total, y)
    return total, y


@cache
def _launch(
    device: torch.device, size: int, eps: float, offset: float, rounds: bool, delta: bool, dtype: torch.dtype
) -> Launch:
    block = triton.next_power_of_2(size)
    constants = {"SIZE": size, "EPS": eps, "DELTA": delta, "OFFSET": offset, "EARLY": rounds, "BLOCK": block}
    start, options = early(device)
    return Launch(_add_norm, {**constants, **start}, {"num_warps": min(8, max(1, block // 512)), **options})
