"""gemlite's Triton kernels for codes of 1, 2, 4 and 8 bits with 16-bit inputs (0.6 and later).

Its split sums are added with bfloat16 atomics by default, which costs 1 to 3 % of accuracy at few rows; qhub switches
that off for the process (``gemlite.set_native_atomic_bfp16``). Configurations that gemlite does not bring for a card
and shape are tuned by it at the first call, which takes seconds to minutes.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from qhub.kernels import Problem
from qhub.layouts import Affine, Layout, Parts
from qhub_bridges.terms import affine_of, group_of, grouping_refusal, terms

__all__ = ["accepts", "bind", "linear", "prepare"]


def accepts(problem: Problem) -> str | None:
    """Return why ``problem`` cannot be computed; None when it can."""
    layout = affine_of(problem.layout)
    if not isinstance(layout, Affine) or layout.bits not in (1, 2, 4, 8):
        return f"takes affine codes of 1, 2, 4 and 8 bits, not {layout.kind}"
    reason = grouping_refusal(layout)
    if reason is not None:
        return reason
    n, k, group = layout.out_features, layout.in_features, group_of(layout)
    if group < 16 or group >= k:
        return f"takes groups of 16 and more that are less than a row, here of {group}"
    if k % 32 or n % 32:
        return f"needs N and K to be multiples of 32, this is {n}x{k}"
    if importlib.util.find_spec("gemlite") is None:
        return "gemlite is not installed"
    import gemlite.core

    return None if hasattr(gemlite.core, "forward_functional") else "needs gemlite 0.6 or later"


def prepare(layout: Layout, parts: Parts, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors that gemlite packs, and its description of them as numbers on the CPU."""
    import gemlite.core as gemlite
    from gemlite.dtypes import TORCH_TO_DTYPE

    own = affine_of(layout)
    assert isinstance(own, Affine)
    gemlite.set_native_atomic_bfp16(False)
    q, scale, shift = terms(layout, parts)
    # w = (q - zero) * scale, which gemlite packs as q * scale + zeros.
    zero = -shift / torch.where(scale == 0, torch.ones_like(scale), scale)
    kind = TORCH_TO_DTYPE[dtype]
    held = gemlite.GemLiteLinearTriton(own.bits, group_of(own), own.in_features, own.out_features, kind, kind)
    held.pack(q, scale.to(dtype), zero.to(dtype), None)
    names = ("codes", "scales", "zeros", "factor")
    tensors = dict(zip(names, (one.detach() for one in held.get_tensor_args()), strict=True))
    if tensors["zeros"].numel():
        # gemlite rounds zero and scale before it multiplies them: the exact product, rounded once.
        tensors["zeros"] = shift.t().to(tensors["zeros"].dtype).contiguous()
    return {**tensors, "described": torch.tensor(held.get_meta_args(), device="cpu")}


def bind(layout: Layout, parts: Parts, dtype: torch.dtype) -> Callable[[Tensor, Tensor | None], Tensor]:
    """Return the product with ``parts`` as :func:`prepare` made them."""
    from gemlite.core import forward_functional

    tensors = [parts[name] for name in ("codes", "scales", "zeros", "factor")]
    described = parts["described"].tolist()
    return lambda x, bias: forward_functional(x, bias, tensors, described)


def linear(x: Tensor, layout: Layout, parts: Parts, bias: Tensor | None = None) -> Tensor:
    """Return ``x @ W.T + bias`` for x (M, K)."""
    return bind(layout, parts, x.dtype)(x, bias)
