"""The product of a layer between rotations: the input is rotated, not the weight.

The reference makes the dense weight, which takes 22 passes over a matrix of 2048 x 2048. Rotating M inputs and outputs
instead takes as many passes over M rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qhub.kernels import Problem
from qhub.layouts import Layout, Parts
from qhub.layouts.transforms import transform_input, transform_output

__all__ = ["accepts", "linear"]


def accepts(problem: Problem) -> str | None:
    """Return why the kernel would gain nothing for ``problem``; None where it does."""
    if not any(transform.kind == "hadamard" for transform in problem.layout.transforms):
        return "rotates inputs and outputs, this layout has no rotation"
    return None


def linear(x: Tensor, layout: Layout, parts: Parts, bias: Tensor | None = None) -> Tensor:
    """Return ``out(S @ in(x)) + bias`` in x's dtype, computed in float32; ``x``: (M, K), S: the stored matrix."""
    rotated = transform_input(x.to(torch.float64 if x.dtype == torch.float64 else torch.float32), layout, parts)
    y = torch.nn.functional.linear(rotated, layout.decode(parts).to(rotated.dtype))
    y = transform_output(y, layout, parts)
    return (y if bias is None else y + bias.to(y.dtype)).to(x.dtype)
