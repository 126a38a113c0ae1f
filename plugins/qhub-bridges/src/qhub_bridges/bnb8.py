"""bitsandbytes' LLM.int8(): inputs rounded to int8 per row, columns with outliers multiplied in 16 bits.

Rounding takes float16 inputs only, and looking for outliers waits for the GPU: ``bitsandbytes::int8_vectorwise_quant``,
``int8_scaled_mm`` and ``int8_mixed_scaled_mm`` (0.45 and later).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from qhub.kernels import Problem
from qhub.layouts import Affine, Layout, Parts

__all__ = ["accepts", "bind", "linear", "prepare"]


def accepts(problem: Problem) -> str | None:
    """Return why ``problem`` cannot be computed; None when it can."""
    layout = problem.layout
    assert isinstance(layout, Affine)
    if not layout.signed or layout.zero != "constant" or layout.zero_point:
        return "takes signed codes without a zero"
    if layout.grid.kind != "block" or layout.grid.rows != 1 or layout.grid.cols < layout.in_features:
        return "takes one scale for each row"
    if abs(layout.unit * 127 - 1) > 1e-6:
        return "takes scales that are the largest magnitude of a row"
    if importlib.util.find_spec("bitsandbytes") is None:
        return "bitsandbytes is not installed"
    import bitsandbytes

    if not hasattr(torch.ops.bitsandbytes, "int8_mixed_scaled_mm"):
        return f"needs bitsandbytes 0.45 or later, {bitsandbytes.__version__} is installed"
    return None


def prepare(layout: Layout, parts: Parts, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the codes as they are, and the largest magnitude of each row in float32."""
    return {"codes": parts["qweight"].contiguous(), "absmax": parts["scales"].reshape(-1).float()}


def bind(layout: Layout, parts: Parts, dtype: torch.dtype) -> Callable[[Tensor, Tensor | None], Tensor]:
    """Return the product with ``parts`` as :func:`prepare` made them."""
    codes, absmax, threshold = parts["codes"], parts["absmax"], layout.activation.threshold
    ops = torch.ops.bitsandbytes
    rounded, plain, mixed = (
        ops.int8_vectorwise_quant.default,
        ops.int8_scaled_mm.default,
        ops.int8_mixed_scaled_mm.default,
    )

    def run(x: Tensor, bias: Tensor | None) -> Tensor:
        inner, tops, outliers = rounded(x.half(), threshold)
        if threshold > 0.0:
            return mixed(x, inner, codes, tops, absmax, outliers, bias)[0].to(dtype)
        return plain(inner, codes, tops, absmax, bias, dtype)

    return run


def linear(x: Tensor, layout: Layout, parts: Parts, bias: Tensor | None = None) -> Tensor:
    """Return ``x @ W.T + bias`` for x (M, K)."""
    return bind(layout, parts, x.dtype)(x, bias)
