"""The sum over a token's experts, weighted by the router: in float32, in the order of the router, one rounding."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qhub_triton.grouped.routing import Routes

__all__ = ["combined"]


@triton.jit
def _combine(
    y, ids, weights, position, out, N, E, TOP: tl.constexpr, SINGLE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < N
    acc = tl.zeros((BLOCK,), tl.float32)
    for choice in range(TOP):
        pair = token * TOP + choice
        number = tl.load(ids + pair).to(tl.int32)
        # What is no expert's was not written.
        known = (number >= 0) & (number < E)
        place = pair if SINGLE else tl.load(position + pair).to(tl.int64)
        value = tl.load(y + place * N + column, mask=mask & known, other=0.0).to(tl.float32)
        acc += value * tl.load(weights + pair).to(tl.float32)
    tl.store(out + token * N + column, acc.to(out.dtype.element_ty), mask=mask)


def combined(y: Tensor, ids: Tensor, weights: Tensor, routes: Routes, experts: int) -> Tensor:
    """Return (T, N) in y's dtype from y (S, N) in the routes' order, the router's ``ids`` and ``weights`` (T, top)."""
    tokens, top = ids.shape
    n = y.shape[1]
    out = torch.empty(tokens, n, dtype=y.dtype, device=y.device)
    block = min(1024, triton.next_power_of_2(n))
    if tokens <= 16:
        block = min(block, 256)
    _combine[(tokens, triton.cdiv(n, block))](
        y, ids, weights, routes.position, out, n, experts, TOP=top, SINGLE=routes.single, BLOCK=block, num_warps=4
    )
    return out
