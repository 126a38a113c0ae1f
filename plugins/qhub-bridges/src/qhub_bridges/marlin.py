"""gptqmodel's Marlin: symmetric codes of 4 and 8 bits, sums in float32.

Sources: gptqmodel 7.7 ``utils/marlin.py`` for the arguments and the order of scales, ``gptqmodel_ext/marlin``; words as
GPTQ packs them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qhub.kernels import Problem
from qhub.layouts import Layout, Parts
from qhub_bridges.extension import missing, symmetric_refusal, type_id, words_along_k
from qhub_bridges.terms import affine_of, layout_suffix, terms

__all__ = ["accepts", "bind", "linear", "prepare", "scale_order"]

_GROUPS = frozenset({32, 64, 128})


def accepts(problem: Problem) -> str | None:
    """Return why ``problem`` cannot be computed; None when it can."""
    reason = symmetric_refusal(problem.layout, _GROUPS)
    if reason is not None:
        return reason
    n, k = problem.layout.out_features, problem.layout.in_features
    if not ((n % 64 == 0 and k % 128 == 0) or (n % 128 == 0 and k % 64 == 0)):
        return f"needs tiles of 64 x 128 or 128 x 64, this is {n}x{k}"
    if torch.version.cuda is None or torch.cuda.get_device_capability() < (8, 0):
        return "needs a GPU by NVIDIA of compute capability 8.0 or later"
    return missing("marlin" + layout_suffix(problem.layout), f"marlin_{_short(problem.dtype)}")


def _short(dtype: torch.dtype) -> str:
    return "bf16" if dtype == torch.bfloat16 else "fp16"


def _ops(dtype: torch.dtype) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Return the function that repacks and the one that multiplies."""
    short = _short(dtype)
    names = getattr(torch.ops, f"gptqmodel_marlin_{short}")
    return names.gptq_marlin_repack, getattr(names, f"gptq_marlin_gemm_{short}")


def scale_order(whole_rows: bool, device: torch.device) -> Tensor:
    """Return where in a run of 64 (32 where a scale is for a whole row) consecutive rows' scales come from."""
    if whole_rows:
        order = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]
    else:
        order = [i + 8 * j for i in range(8) for j in range(8)]
    return torch.tensor(order, device=device)


def prepare(layout: Layout, parts: Parts, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the codes in Marlin's tiles, the scales in the order of its threads, and its workspace."""
    q, scale, _ = terms(layout, parts)
    bits = affine_of(layout).bits  # type: ignore[attr-defined]
    n, k = q.shape
    empty = torch.empty(0, dtype=torch.int32, device=q.device)
    packed = _ops(dtype)[0](words_along_k(q, bits), empty, k, n, bits)
    order = scale_order(scale.shape[1] == 1, q.device)
    scales = scale.t().to(dtype).reshape(-1, len(order))[:, order].reshape(-1, n).contiguous()
    blocks = max(torch.cuda.get_device_properties(q.device).multi_processor_count, 128)
    workspace = torch.zeros(blocks, dtype=torch.int32, device=q.device)
    return {"packed": packed, "scales": scales, "workspace": workspace}


def bind(layout: Layout, parts: Parts, dtype: torch.dtype) -> Callable[[Tensor, Tensor | None], Tensor]:
    """Return the product with ``parts`` as :func:`prepare` made them."""
    packed, scales, workspace = parts["packed"], parts["scales"], parts["workspace"]
    n, k = layout.out_features, layout.in_features
    kind = type_id(affine_of(layout).bits)  # type: ignore[attr-defined]
    product = _ops(dtype)[1]

    def run(x: Tensor, bias: Tensor | None) -> Tensor:
        # In order: x, output, codes, bias, scales, global scale, zeros, two for act-order, workspace, type, sizes, the
        # whole K, no atomics, sums in float32, whole zeros.
        y = product(
            x, None, packed, None, scales, None, None, None, None, workspace, kind, x.shape[0], n, k, True, False, True,
            False,
        )  # fmt: skip
        return y if bias is None else y + bias

    return run


def linear(x: Tensor, layout: Layout, parts: Parts, bias: Tensor | None = None) -> Tensor:
    """Return ``x @ W.T + bias`` for x (M, K)."""
    return bind(layout, parts, x.dtype)(x, bias)
