"""LLM.int8() with integer dot products: what torch and the processor have for int8 matrices, outlier columns apart.

Dettmers et al. 2022, eq. 8. The conventions (which entries count for a row's absmax, what is rounded) are those of
:func:`qhub.kernels.reference.linear_int8`; the integer sums are exact where the reference adds float32.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from numba import float32
from torch import Tensor

from qhub.layouts import Affine, Parts
from qhub_cpu.compiled import entry, seal
from qhub_cpu.inputs import int8_codes
from qhub_cpu.memory import load_f32, load_i32, store_bf16, store_f32
from qhub_cpu.plans import FLOAT_KINDS
from qhub_cpu.variants import BF16, NONE
from qhub_cpu.weights import number

if TYPE_CHECKING:
    from qhub.kernels import Problem

__all__ = ["accepts", "int8_product"]


def accepts(problem: Problem) -> str | None:
    """Return why the kernel cannot take ``problem``; None when it can."""
    from qhub_cpu.admission import machine_reason

    layout = problem.layout
    assert isinstance(layout, Affine)
    one_scale = layout.grid.kind == "block" and layout.grid.rows == 1 and layout.grid.cols >= layout.in_features
    plain = layout.signed and layout.zero == "constant" and layout.zero_point == 0 and layout.scales_nested is None
    if not (one_scale and plain and layout.math == "float32"):
        return "needs signed codes under one scale a row and no zero"
    return machine_reason()


def int8_product(x: Tensor, layout: Affine, parts: Parts, bias: Tensor | None = None) -> Tensor:
    """Return ``x @ W.T + bias`` (M, N) in x's dtype, for x (M, K) float32, bfloat16 or float16 rounded to int8."""
    (m, k), n = x.shape, layout.out_features
    weight, scales = parts["qweight"].contiguous(), parts["scales"].contiguous()
    codes = torch.empty((m, k), dtype=torch.int8)
    # Steps of the rows, and behind them a byte a column.
    work = torch.empty(m + -(-k // 4), dtype=torch.float32)
    columns, kind = work.data_ptr() + 4 * m, FLOAT_KINDS[x.dtype]
    count = _rounding()(
        x.data_ptr(), kind, m, k, layout.activation.threshold, columns, codes.data_ptr(), work.data_ptr()
    )
    sums = torch._int_mm(codes, weight.t())
    rest = _outlier_product(x, weight, work[m:].view(torch.uint8)[:k]) if count else None
    half = x.dtype is torch.float16
    y = torch.empty((m, n), dtype=torch.float32 if half else x.dtype)
    added = (0, NONE) if bias is None else (bias.data_ptr(), FLOAT_KINDS[bias.dtype])
    _scaling()(
        m, n, sums.data_ptr(), work.data_ptr(), 0 if rest is None else rest.data_ptr(), scales.data_ptr(),
        FLOAT_KINDS[scales.dtype], layout.unit, *added, y.data_ptr(), FLOAT_KINDS[y.dtype],
    )  # fmt: skip
    return y.to(x.dtype) if half else y


def _outlier_product(x: Tensor, weight: Tensor, columns: Tensor) -> Tensor:
    """Return the product (M, N) float32 of the marked columns alone, in units of the rows' scales."""
    picked = columns.nonzero().squeeze(1)
    return x.index_select(1, picked).float() @ weight.index_select(1, picked).float().t()


@cache
def _rounding() -> Any:
    key = seal()

    @entry
    def rounding(x, kind, m, k, threshold, columns, codes, steps):
        _ = key
        return int8_codes(x, kind, m, k, float32(threshold), columns, codes, steps)

    return rounding


@cache
def _scaling() -> Any:
    key = seal()

    @entry
    def scaling(m, n, sums, steps, rest, scales, scale_kind, unit, bias, bias_kind, out, out_kind):
        _ = key
        for i in range(m):
            step = load_f32(steps + 4 * i)
            for row in range(n):
                index = i * n + row
                value = float32(load_i32(sums + 4 * index)) * step
                if rest != 0:
                    value += load_f32(rest + 4 * index)
                value = value * number(scales, scale_kind, row) * float32(unit)
                if bias_kind != NONE:
                    value += number(bias, bias_kind, row)
                if out_kind == BF16:
                    store_bf16(out + 2 * index, value)
                else:
                    store_f32(out + 4 * index, value)

    return scaling
