"""The dense weight of a quantized one, written in one pass over its codes; bit for bit what the layout says."""

from __future__ import annotations

import torch
from torch import Tensor

from qhub.errors import LayoutError
from qhub.kernels import Problem
from qhub.layouts import Layout, Parts, Stacked
from qhub_triton.dense.launching import TYPES, launch
from qhub_triton.dense.plan import Plan, planned

__all__ = ["accepts", "dequantize", "refusal", "write"]


def refusal(layout: Layout, dtype: torch.dtype) -> str | None:
    """Return why the kernel cannot write ``layout`` in ``dtype``; None when it can."""
    if dtype not in TYPES:
        return f"writes float32, bfloat16 and float16, not {dtype}"
    if isinstance(layout, Stacked):
        return next((reason for band in layout.bands if (reason := refusal(band, dtype))), None)
    plan = planned(layout)
    return plan if isinstance(plan, str) else None


def accepts(problem: Problem) -> str | None:
    """Return why the kernel cannot write the problem's weight in its dtype; None when it can."""
    return refusal(problem.layout, problem.dtype)


def dequantize(layout: Layout, parts: Parts, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the dense weight (..., N, K) in ``dtype`` (float32, bfloat16, float16), as ``layout.dequantize`` does.

    Raises :class:`LayoutError` for what :func:`refusal` refuses.
    """
    found = None if isinstance(layout, Stacked) else planned(layout)
    # The short way of one matrix, in which no part is asked for what the plan knows.
    if isinstance(found, Plan) and dtype in TYPES and parts["qweight"].ndim == found.rank:
        out = torch.empty(layout.out_features, layout.in_features, dtype=dtype, device=parts["qweight"].device)
        _write_planned(found, parts, out)
        return out
    reason = refusal(layout, dtype)
    if reason is not None:
        raise LayoutError(f"the Triton dequantizer {reason}")
    batch = layout.batch_shape(parts)
    device = next(iter(parts.values())).device
    out = torch.empty(*batch, layout.out_features, layout.in_features, dtype=dtype, device=device)
    if not batch:
        _write(layout, parts, out)
        return out
    specs = layout.part_specs()
    flat = {
        name: part.reshape(-1, *spec.shape) if (spec := specs[name]).batched else part for name, part in parts.items()
    }
    for index, matrix in enumerate(out.flatten(0, -3)):
        _write(layout, {name: part[index] if specs[name].batched else part for name, part in flat.items()}, matrix)
    return out


def _write(layout: Layout, parts: Parts, out: Tensor) -> None:
    """Write one matrix to ``out`` (N, K), contiguous along K."""
    if isinstance(layout, Stacked):
        top = 0
        for band, own in layout.each(parts):
            _write(band, own, out[top : top + band.out_features])
            top += band.out_features
        return
    plan = planned(layout)
    assert not isinstance(plan, str)
    _write_planned(plan, parts, out)


def _write_planned(plan: Plan, parts: Parts, out: Tensor) -> None:
    if plan.permute is None:
        write(plan, parts, out)
        return
    perm = parts["in_perm"]
    inverse = torch.empty_like(perm)
    inverse[perm.long()] = torch.arange(perm.shape[0], dtype=perm.dtype, device=perm.device)
    moved = torch.empty(out.shape, dtype=out.dtype, device=out.device)
    write(plan, parts, moved)
    torch.index_select(moved, 1, inverse, out=out)


def write(plan: Plan, parts: Parts, out: Tensor, first_row: int = 0, first_column: int = 0) -> None:
    """Write the stored matrix from (first_row, first_column) on to ``out`` (rows, columns), contiguous along K.

    Columns are scaled and rows too, but not moved. ``first_column``: a multiple of eight; in tiles, of a block's
    columns, and ``first_row`` of 64.
    """
    if plan.whole:
        if out.shape != (plan.layout.out_features, plan.layout.in_features) or not out.is_contiguous():
            raise LayoutError("a matrix whose groups are strided can only be written whole")
        out = out.view(plan.rows, plan.columns)
    rows, columns = out.shape
    if rows == 0 or columns == 0:
        return
    launch(plan, parts, out, first_row, first_column)
