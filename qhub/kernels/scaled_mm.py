"""Products of float8 codes on a GPU's 8-bit matrix units: ``torch._scaled_mm``, inputs rounded just before.

Takes :class:`qhub.layouts.Float8` with scales per tensor or per row, inputs in float8 per tensor (dynamic or static) or
per row. Blocks along K and inputs in groups are left to the reference, which dequantizes: cuBLAS wants their scales in
an order of its own, on some GPUs only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qhub.kernels.spec import Cost, KernelSpec, Problem
from qhub.layouts import Float8, Layout, Parts
from qhub.layouts.activations import float8_input

__all__ = ["SPEC", "accepts", "linear"]

# 8-bit floats are multiplied from Ada (8.9) on; scales of rows by CUTLASS kernels for Hopper and later.
_CAPABILITY, _ROWS_CAPABILITY = (8, 9), (9, 0)

SPEC = KernelSpec(
    name="scaled-mm",
    impl=f"{__name__}:linear",
    layout="float8",
    devices=frozenset({"cuda"}),
    dtypes=frozenset({"bfloat16", "float16"}),
    divides=(("N", 16), ("K", 16)),
    activations=frozenset(),
    accepts=f"{__name__}:accepts",
    rank=20,
    # H100, the rounding of the input included: some launches, each of which reads and writes it. A third to a half of
    # the product's own speed at 2048 rows of 8192 to 14336.
    cost=Cost(bandwidth=0.75, rate=0.5, unit="byte", tile=64, launch=15e-6),
    packages=("torch",),
)


def accepts(problem: Problem) -> str | None:
    """Return why ``problem`` cannot be computed in 8 bits; None when it can."""
    layout = problem.layout
    assert isinstance(layout, Float8)
    activation = layout.activation
    if activation.kind != "float8":
        return f"multiplies inputs rounded to float8, here their scheme is {activation.scheme!r}"
    if activation.granularity == "group":
        return f"takes one scale per row or tensor of the input, not one for each {activation.group} of a row"
    if layout.scale_shape[-1] != 1 or layout.grid.kind != "block":
        return "takes one scale per row or tensor of the weight, not blocks along K"
    formats = (layout.format, activation.format)
    if any(one.endswith("fnuz") for one in formats):
        return f"multiplies E4M3FN and E5M2, not {formats[0]} with {formats[1]}"
    if formats == ("e5m2", "e5m2"):
        return "multiplies E5M2 with E4M3 only"
    if torch.version.cuda is None:
        return "needs CUDA"
    capability = torch.cuda.get_device_capability()
    if capability < _CAPABILITY:
        return f"needs compute capability 8.9, this GPU has {capability[0]}.{capability[1]}"
    return None


def linear(x: Tensor, layout: Layout, parts: Parts, bias: Tensor | None = None) -> Tensor:
    """Return ``x @ W.T + bias`` for x (M, K), codes multiplied as they are and sums scaled in float32."""
    assert isinstance(layout, Float8)
    codes, scale = float8_input(x, layout.activation, parts)
    own = parts["scales"].float().reshape(-1)
    native = x.dtype == torch.bfloat16 and torch.cuda.get_device_capability(x.device) >= _ROWS_CAPABILITY
    if own.numel() > 1:
        own = own.repeat_interleave(min(layout.grid.rows, layout.out_features))[: layout.out_features]
    weight = parts["qweight"].t()
    if native:
        rows = scale.expand(x.shape[0], 1).contiguous()
        columns = own.expand(layout.out_features).reshape(1, -1).contiguous()
        y = torch._scaled_mm(codes, weight, rows, columns, out_dtype=torch.bfloat16)
        return y if bias is None else y + bias.to(y.dtype)
    one = torch.ones((), dtype=torch.float32, device=x.device)
    y = torch._scaled_mm(codes, weight, one, one, out_dtype=torch.float32) * scale * own
    return (y if bias is None else y + bias.float()).to(x.dtype)
