"""torch's own int4 product, ``torch._weight_int4pack_mm``: ``w = scale * (q - 8) + zero``, both terms in x's dtype.

Source: torch aten/src/ATen/native/cuda/int4mm.cu and native/cpu/int4mm_kernel.cpp; the formula and the order of codes
in a byte as torchao's quantize_ passes them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qhub.kernels import Problem
from qhub.layouts import Layout, Parts
from qhub_bridges.terms import affine_of, group_of, grouping_refusal, terms

__all__ = ["accepts", "bind", "linear", "prepare"]

_GROUPS = frozenset({32, 64, 128, 256})
# Where the formula takes the middle of the codes.
_MIDDLE = 8.0


def accepts(problem: Problem) -> str | None:
    """Return why ``problem`` cannot be computed; None when it can."""
    layout = affine_of(problem.layout)
    if layout.kind != "affine" or getattr(layout, "bits", 0) != 4:
        return f"takes affine codes of 4 bits, not {layout.kind}"
    reason = grouping_refusal(layout, _GROUPS)
    if reason is not None:
        return reason
    n, k = layout.out_features, layout.in_features
    if problem.device == "cpu":
        if not hasattr(torch, "_weight_int4pack_mm_for_cpu"):
            return "this torch has no int4 product for CPUs"
        return f"needs N to be a multiple of 16, this is {n}" if n % 16 else None
    if torch.version.cuda is None or torch.cuda.get_device_capability() < (8, 0):
        return "needs a GPU by NVIDIA of compute capability 8.0 or later"
    if problem.dtype != torch.bfloat16:
        return "takes bfloat16 on a GPU"
    if n % 8 or k % 32:
        return f"needs N to be a multiple of 8 and K of 32, this is {n}x{k}"
    return None


def prepare(layout: Layout, parts: Parts, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the codes in torch's order, and (K / group, N, 2) of scale and zero in ``dtype``."""
    q, scale, shift = terms(layout, parts)
    pairs = torch.stack([scale, shift + _MIDDLE * scale], dim=-1).transpose(0, 1).to(dtype).contiguous()
    if q.device.type == "cpu":
        packed = torch._convert_weight_to_int4pack_for_cpu(q.to(torch.int32), 2)
    else:
        # Of two neighbours in a byte the first is the high one; a tile takes 16 columns, as many as K lets it up to 8.
        pairs_of_codes = (q[:, ::2] << 4 | q[:, 1::2]).contiguous()
        tiles = next(count for count in (8, 4, 2) if layout.in_features % (16 * count) == 0)
        packed = torch._convert_weight_to_int4pack(pairs_of_codes, tiles)
    return {"packed": packed, "scales_and_zeros": pairs}


def bind(layout: Layout, parts: Parts, dtype: torch.dtype) -> Callable[[Tensor, Tensor | None], Tensor]:
    """Return the product with ``parts`` as :func:`prepare` made them."""
    packed, pairs = parts["packed"], parts["scales_and_zeros"]
    group = group_of(affine_of(layout))  # type: ignore[arg-type]
    product = torch._weight_int4pack_mm_for_cpu if packed.device.type == "cpu" else torch._weight_int4pack_mm

    def run(x: Tensor, bias: Tensor | None) -> Tensor:
        y = product(x, packed, group, pairs)
        return y if bias is None else y + bias

    return run


def linear(x: Tensor, layout: Layout, parts: Parts, bias: Tensor | None = None) -> Tensor:
    """Return ``x @ W.T + bias`` for x (M, K)."""
    return bind(layout, parts, x.dtype)(x, bias)
