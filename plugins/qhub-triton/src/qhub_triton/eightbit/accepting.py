"""Which layouts the kernels of this area take."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from qhub.layouts import Affine, Float8
from qhub.layouts.activations import Activation

if TYPE_CHECKING:
    from qhub.kernels import Problem

__all__ = ["columns_of", "float8", "int8"]

# A matrix unit multiplies 32 bytes at a time.
_LEAST, _MOST = 32, 4096


def columns_of(layout: Affine | Float8) -> int:
    """Return how many neighbours along K share scales, of the weight and of the input; 0: all of them."""
    group = layout.activation.group
    cols = layout.grid.cols if layout.scale_shape[-1] > 1 else 0
    return math.gcd(group, cols)


def float8(problem: Problem) -> str | None:
    """Return why ``problem`` cannot be computed with inputs in float8; None when it can."""
    layout = problem.layout
    assert isinstance(layout, Float8)
    activation = layout.activation
    if activation.kind != "float8":
        return f"multiplies inputs rounded to float8, here their scheme is {activation.scheme!r}"
    if layout.format not in ("e4m3fn", "e5m2") or activation.format not in ("e4m3fn", "e5m2"):
        return f"multiplies E4M3FN and E5M2, not {layout.format} with {activation.format}"
    if problem.device == "cuda" and torch.cuda.is_available():
        if torch.version.cuda is None:
            return "needs a GPU of NVIDIA's: others have float8 formats of their own"
        capability = torch.cuda.get_device_capability()
        if capability < (8, 9):
            return f"needs compute capability 8.9, this GPU has {capability[0]}.{capability[1]}"
    return _shared(layout, activation)


def int8(problem: Problem) -> str | None:
    """Return why ``problem`` cannot be computed with inputs in int8; None when it can."""
    layout = problem.layout
    assert isinstance(layout, Affine)
    activation = layout.activation
    if activation.kind != "int8":
        return f"multiplies inputs rounded to int8, here their scheme is {activation.scheme!r}"
    if not activation.symmetric:
        return "multiplies symmetric inputs, these have a zero"
    if not layout.signed or layout.zero != "constant" or layout.zero_point:
        return "multiplies signed 8-bit weights without a zero"
    if layout.scales_nested is not None:
        return "takes plain scales, these are quantized in turn"
    if layout.math != "float32":
        return f"computes in float32, this layout in the dtype of its {layout.math}"
    if activation.threshold > 0 and layout.scale_shape[-1] > 1:
        return "keeps columns with outliers aside under one scale per row of the weight, not groups"
    return _shared(layout, activation)


def _shared(layout: Affine | Float8, activation: Activation) -> str | None:
    if layout.grid.kind != "block":
        return f"takes scales of blocks, not {layout.grid.kind} ones"
    if activation.scale_format == "e4m3fn":
        return "takes input scales in float32 and powers of two, not E4M3"
    group = activation.group
    if group and (group & (group - 1) or not _LEAST <= group <= _MOST):
        return f"takes inputs in groups of a power of two from {_LEAST} to {_MOST}, not {group}"
    shared = columns_of(layout)
    if shared and shared % _LEAST:
        return f"needs {_LEAST} neighbours along K under the same scales, here it is {shared}"
    return None
