"""gptqmodel's Machete, for Hopper GPUs: symmetric codes of 4 and 8 bits, sums in float32.

Source: gptqmodel 7.7 ``utils/machete.py`` and ``nn_modules/qlinear/machete.py``: words as GPTQ packs them, columns
together; scales as they are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qhub.kernels import Problem
from qhub.layouts import Layout, Parts
from qhub_bridges.extension import missing, symmetric_refusal, type_id, words_along_k
from qhub_bridges.terms import affine_of, group_of, layout_suffix, terms

__all__ = ["accepts", "bind", "linear", "prepare"]

_GROUPS = frozenset({64, 128})


def accepts(problem: Problem) -> str | None:
    """Return why ``problem`` cannot be computed; None when it can."""
    reason = symmetric_refusal(problem.layout, _GROUPS)
    if reason is not None:
        return reason
    n, k = problem.layout.out_features, problem.layout.in_features
    if n % 128 or k % 64:
        return f"needs N to be a multiple of 128 and K of 64, this is {n}x{k}"
    if torch.version.cuda is None or torch.cuda.get_device_capability() != (9, 0):
        return "needs a GPU of compute capability 9.0"
    return missing("machete" + layout_suffix(problem.layout), "machete")


def _ops() -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Return the function that repacks and the one that multiplies."""
    from gptqmodel import extension

    return extension.op("machete", "machete_prepack_B"), extension.op("machete", "machete_mm")


def prepare(layout: Layout, parts: Parts, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the codes in Machete's order, and the scales (K / group, N) in ``dtype``."""
    q, scale, _ = terms(layout, parts)
    bits = affine_of(layout).bits  # type: ignore[attr-defined]
    words = words_along_k(q, bits).t().contiguous().t()
    packed = _ops()[0](words, dtype, type_id(bits), dtype)
    return {"packed": packed, "scales": scale.t().to(dtype).contiguous()}


def bind(layout: Layout, parts: Parts, dtype: torch.dtype) -> Callable[[Tensor, Tensor | None], Tensor]:
    """Return the product with ``parts`` as :func:`prepare` made them."""
    packed, scales = parts["packed"], parts["scales"]
    own = affine_of(layout)
    kind, group = type_id(own.bits), group_of(own)  # type: ignore[attr-defined, arg-type]
    product = _ops()[1]

    def run(x: Tensor, bias: Tensor | None) -> Tensor:
        # In order: x, codes, type, output's dtype, scales, zeros, group, scales of columns and of rows, schedule.
        y = product(x, packed, kind, None, scales, None, group, None, None, None)
        return y if bias is None else y + bias

    return run


def linear(x: Tensor, layout: Layout, parts: Parts, bias: Tensor | None = None) -> Tensor:
    """Return ``x @ W.T + bias`` for x (M, K)."""
    return bind(layout, parts, x.dtype)(x, bias)
