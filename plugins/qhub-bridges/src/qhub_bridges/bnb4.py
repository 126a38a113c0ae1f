"""bitsandbytes' product with NF4 and FP4, ``bitsandbytes::gemm_4bit`` (0.50 and later).

It picks a kernel for few rows, one for matrix units, or decoding and cuBLAS by itself. Of two codes in a byte the first
is the high one (bitsandbytes csrc/kernels.cu), the low one in a qhub layout.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from qhub.errors import UnsupportedError
from qhub.kernels import Problem
from qhub.layouts import Layout, Lookup, Parts
from qhub_bridges.terms import affine_of

__all__ = ["accepts", "bind", "linear", "prepare"]

_BLOCKS = frozenset({32, 64, 128, 256, 512, 1024, 2048, 4096})
_NAMES = ("nf4", "fp4")


def accepts(problem: Problem) -> str | None:
    """Return why ``problem`` cannot be computed; None when it can."""
    layout = affine_of(problem.layout)
    if not isinstance(layout, Lookup) or layout.bits != 4:
        return f"takes lookup codes of 4 bits, not {layout.kind}"
    grid = layout.grid
    if grid.kind != "block" or grid.rows != 1 or grid.cols not in _BLOCKS or layout.in_features % grid.cols:
        return f"takes blocks of {'/'.join(map(str, sorted(_BLOCKS)))} weights that divide a row"
    return missing()


def missing() -> str | None:
    """Return why bitsandbytes cannot be used; None when it can."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return "bitsandbytes is not installed"
    import bitsandbytes

    if not hasattr(torch.ops.bitsandbytes, "gemm_4bit"):
        return f"needs bitsandbytes 0.50 or later, {bitsandbytes.__version__} is installed"
    return None


def prepare(layout: Layout, parts: Parts, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the codes under the name of their table, and ``absmax`` in float32, plain."""
    own = layout
    if not isinstance(layout, Lookup):
        own, parts = layout.plain(parts)  # type: ignore[attr-defined]
    assert isinstance(own, Lookup)
    packed = parts["qweight"]
    swapped = (packed << 4 | packed >> 4).reshape(-1, 1)
    return {_name_of(parts["table"]): swapped, "absmax": own.scales(parts).reshape(-1).contiguous()}


def _name_of(table: Tensor) -> str:
    from bitsandbytes.functional import get_4bit_type

    for name in _NAMES:
        if torch.allclose(table.detach().cpu(), get_4bit_type(name, device="cpu"), rtol=0.0, atol=1e-6):
            return name
    raise UnsupportedError("takes the tables of NF4 and FP4, this is another one")


def bind(layout: Layout, parts: Parts, dtype: torch.dtype) -> Callable[[Tensor, Tensor | None], Tensor]:
    """Return the product with ``parts`` as :func:`prepare` made them."""
    name = next(one for one in _NAMES if one in parts)
    codes, absmax = parts[name], parts["absmax"]
    block, shape = affine_of(layout).grid.cols, [layout.out_features, layout.in_features]  # type: ignore[attr-defined]
    product = torch.ops.bitsandbytes.gemm_4bit.default
    return lambda x, bias: product(x, codes, shape, absmax, block, name, bias)


def linear(x: Tensor, layout: Layout, parts: Parts, bias: Tensor | None = None) -> Tensor:
    """Return ``x @ W.T + bias`` for x (M, K)."""
    return bind(layout, parts, x.dtype)(x, bias)
