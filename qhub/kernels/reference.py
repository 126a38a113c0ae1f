"""The kernel without constraints: dequantize, then multiply. What every other kernel is held against."""

from __future__ import annotations

import torch
from torch import Tensor

from qhub.kernels.dense import dense
from qhub.layouts import Layout, Parts, Stacked
from qhub.layouts.activations import rounded_input
from qhub.layouts.transforms import transform_input, transform_output

__all__ = ["linear", "linear_int8", "linear_rounded"]


def linear(x: Tensor, layout: Layout, parts: Parts, bias: Tensor | None = None) -> Tensor:
    """Return ``x @ W.T + bias`` for x (M, K), with W dequantized to x's dtype; activation schemes included."""
    if layout.activation.kind == "none":
        return torch.nn.functional.linear(x, dense(layout, parts, x.dtype), bias)
    if layout.activation.scheme == "int8":
        return linear_int8(x, layout, parts, bias)
    return linear_rounded(x, layout, parts, bias)


def linear_rounded(x: Tensor, layout: Layout, parts: Parts, bias: Tensor | None = None) -> Tensor:
    """Multiply with inputs rounded as the layout's activation scheme says; what is rounded is what meets the stored
    matrix, after the transforms.

    Codes times their scale are exact in float32, and so is a stored weight; sums are in float32, as integer and float8
    matrix units add up.
    """
    if isinstance(layout, Stacked):
        # Each band has scales of its own where they are stored.
        y = torch.cat([linear_rounded(x, band, own) for band, own in layout.each(parts)], dim=-1)
    else:
        rounded = rounded_input(transform_input(x, layout, parts), layout.activation, parts)
        y = transform_output(torch.nn.functional.linear(rounded, layout.decode(parts)), layout, parts)
    return (y if bias is None else y + bias.float()).to(x.dtype)


def linear_int8(x: Tensor, layout: Layout, parts: Parts, bias: Tensor | None = None) -> Tensor:
    """Multiply with inputs rounded to int8 per row, outlier columns kept in x's dtype.

    LLM.int8() (Dettmers et al. 2022, eq. 8): columns of x that hold a magnitude of at least the threshold are
    multiplied unrounded with the dequantized columns of W; what is left is rounded to absmax/127 steps per row, outlier
    entries counting as zero.
    """
    weight = layout.decode(parts)
    x = transform_input(x, layout, parts)
    threshold = layout.activation.threshold
    if threshold > 0:
        large = x.abs() >= threshold
        columns = large.any(dim=0)
        inner = torch.where(large, torch.zeros((), dtype=x.dtype, device=x.device), x)
    else:
        columns, inner = None, x
    absmax = inner.abs().amax(dim=-1, keepdim=True).float()
    step = torch.where(absmax == 0, torch.ones_like(absmax), absmax) / 127.0
    codes = (inner.float() / step).round()
    if columns is not None:
        # An outlier column leaves the integer product whole, its small entries too: the second product below has them.
        codes = codes.masked_fill(columns, 0.0)
    # Integers up to 127 times a float32 weight: exact codes, one rounding per product as in float32 accumulation.
    y = torch.nn.functional.linear(codes, weight) * step
    if columns is not None:
        picked = torch.where(columns, x, torch.zeros((), dtype=x.dtype, device=x.device))
        y = y + torch.nn.functional.linear(picked.float(), weight)
    y = transform_output(y, layout, parts)
    return (y if bias is None else y + bias.float()).to(x.dtype)
