"""The product for thousands of rows: the weight is written dense, a piece at a time that stays in the cache.

A piece is written on a second stream while the one before it is multiplied, so that it fills the processors that the
end of a product leaves idle, and the product finds it in the cache. For fewer rows a product of a piece has too few
tiles for the GPU, and the weight is written whole. Measured on an H100 with an 8192 x 8192 weight of 4 bits, as shares
of the speed of cuBLAS on a dense weight: 4096 rows 0.93 to 0.96 (whole: 0.92), 8192 rows 0.98 to 1.01 (whole: 0.95).
"""

from __future__ import annotations

import torch
from torch import Tensor

from qhub.kernels import Problem
from qhub.layouts import Layout, Parts
from qhub.layouts.tiled import ROWS
from qhub_triton.dense.dequantize import dequantize, refusal, write
from qhub_triton.dense.plan import planned

__all__ = ["accepts", "linear", "piece_rows"]

# Rows of input from which on a weight is worth cutting, and pieces from which on.
_LEAST_M = 4096
_LEAST_PIECES = 4
# Bytes of a piece: two fit into the second-level cache of an H100; more rows of input need fewer rows of weight.
_PIECE = 32 << 20

_sides: dict[torch.device, torch.cuda.Stream] = {}


def accepts(problem: Problem) -> str | None:
    """Return why ``problem`` is left to others; None when the kernel takes it."""
    reason = refusal(problem.layout, problem.dtype)
    if reason is not None:
        return reason
    layout = problem.layout
    if not piece_rows(layout, 2 * _LEAST_M, problem.dtype):
        return f"a weight of {layout.out_features}x{layout.in_features} is too small to be cut, or its rows are tied"
    return None


def piece_rows(layout: Layout, m: int, dtype: torch.dtype) -> int:
    """Return how many rows of the weight a piece has for ``m`` rows of input; 0: the weight stays whole."""
    plan = planned(layout)
    if m < _LEAST_M or isinstance(plan, str) or plan.whole or plan.permute is not None:
        return 0
    size = _PIECE if m < 2 * _LEAST_M else _PIECE // 2
    rows = size // (layout.in_features * dtype.itemsize) // (2 * ROWS) * (2 * ROWS)
    return rows if rows and layout.out_features >= _LEAST_PIECES * rows else 0


def linear(x: Tensor, layout: Layout, parts: Parts, bias: Tensor | None = None) -> Tensor:
    """Return ``x @ W.T + bias`` for x (M, K)."""
    rows = piece_rows(layout, x.shape[0], x.dtype)
    if not rows:
        return torch.nn.functional.linear(x, dequantize(layout, parts, x.dtype), bias)
    plan = planned(layout)
    assert not isinstance(plan, str)
    n = layout.out_features
    y = torch.empty(x.shape[0], n, dtype=x.dtype, device=x.device)
    main = torch.cuda.current_stream(x.device)
    side = _sides.get(x.device)
    if side is None:
        side = _sides[x.device] = torch.cuda.Stream(x.device)
    # Made before the side stream may write to them, and kept until it has ended.
    pieces = [torch.empty(rows, layout.in_features, dtype=x.dtype, device=x.device) for _ in range(2)]
    side.wait_stream(main)
    free: list[torch.cuda.Event | None] = [None, None]
    for index, start in enumerate(range(0, n, rows)):
        stop = min(start + rows, n)
        piece = pieces[index % 2][: stop - start]
        event = free[index % 2]
        if event is not None:
            side.wait_event(event)
        with torch.cuda.stream(side):
            write(plan, parts, piece, start)
        main.wait_event(side.record_event())
        if bias is None:
            torch.mm(x, piece.t(), out=y[:, start:stop])
        else:
            torch.addmm(bias[start:stop], x, piece.t(), out=y[:, start:stop])
        free[index % 2] = main.record_event()
    main.wait_stream(side)
    return y
