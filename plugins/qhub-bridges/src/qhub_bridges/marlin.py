"""gptqmodel's Marlin: symmetric codes of 4 and 8 bits, sums in float32.

Its extension is compiled on the user's machine (minutes, with nvcc) the first time gptqmodel needs it; qhub uses one
that has been compiled and never starts that. Sources: gptqmodel 7.7 ``utils/marlin.py`` for the arguments and the order
of scales, ``gptqmodel_ext/marlin``; words as GPTQ packs them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qhub.kernels import Problem
from qhub.layouts import Affine, Layout, Parts
from qhub_bridges.terms import affine_of, grouping_refusal, terms

__all__ = ["accepts", "bind", "linear", "prepare", "scale_order", "words_along_k"]

_GROUPS = frozenset({32, 64, 128})


def accepts(problem: Problem) -> str | None:
    """Return why ``problem`` cannot be computed; None when it can."""
    layout = affine_of(problem.layout)
    if not isinstance(layout, Affine) or layout.bits not in (4, 8):
        return f"takes affine codes of 4 and 8 bits, not {layout.kind}"
    reason = grouping_refusal(layout, _GROUPS | {layout.in_features})
    if reason is not None:
        return reason
    middle = 2.0 ** (layout.bits - 1)
    if layout.zero != "constant" or layout.zero_point != middle:
        return f"takes codes around {middle:.0f}, without zeros of their own"
    n, k = layout.out_features, layout.in_features
    if not ((n % 64 == 0 and k % 128 == 0) or (n % 128 == 0 and k % 64 == 0)):
        return f"needs tiles of 64 x 128 or 128 x 64, this is {n}x{k}"
    if torch.version.cuda is None or torch.cuda.get_device_capability() < (8, 0):
        return "needs a GPU by NVIDIA of compute capability 8.0 or later"
    return _missing(problem.dtype)


def _missing(dtype: torch.dtype) -> str | None:
    if importlib.util.find_spec("gptqmodel") is None:
        return "gptqmodel is not installed"
    extension = _extension(dtype)
    if extension is None:
        return "this gptqmodel keeps Marlin elsewhere than 7.7 does"
    # Only what is compiled: loading would compile what is not.
    if not (extension._ops_available() or extension._try_load_prebuilt_library(extension.build_root())):
        return "gptqmodel's Marlin is not compiled here: load a GPTQ model with gptqmodel once"
    return None


def _extension(dtype: torch.dtype) -> Any:
    from gptqmodel.utils import marlin

    return getattr(marlin, f"_MARLIN_{_short(dtype).upper()}_TORCH_OPS_EXTENSION", None)


def _short(dtype: torch.dtype) -> str:
    return "bf16" if dtype == torch.bfloat16 else "fp16"


def _ops(dtype: torch.dtype) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Return the function that repacks and the one that multiplies."""
    short = _short(dtype)
    names = getattr(torch.ops, f"gptqmodel_marlin_{short}")
    return names.gptq_marlin_repack, getattr(names, f"gptq_marlin_gemm_{short}")


def _type_id(bits: int) -> int:
    from gptqmodel.utils.marlin_scalar_type import scalar_types

    return (scalar_types.uint4b8 if bits == 4 else scalar_types.uint8b128).id


def words_along_k(q: Tensor, bits: int) -> Tensor:
    """Return codes (N, K) as words (K * bits / 32, N) int32: neighbours along K in one, the first lowest (GPTQ)."""
    per_word = 32 // bits
    n, k = q.shape
    columns = q.t().reshape(k // per_word, per_word, n)
    words = torch.zeros(k // per_word, n, dtype=torch.int32, device=q.device)
    for index in range(per_word):
        words |= columns[:, index].to(torch.int32) << (bits * index)
    return words


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
    kind = _type_id(affine_of(layout).bits)  # type: ignore[attr-defined]
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
