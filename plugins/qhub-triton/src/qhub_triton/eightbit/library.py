"""Products of float8 codes by cuBLAS (``torch._scaled_mm``), for many rows: one kernel rounds, one multiplies."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qhub.layouts import Float8, Layout, Parts
from qhub_triton.eightbit.accepting import columns_of
from qhub_triton.eightbit.rounded import Rounder
from qhub_triton.eightbit.scheme import CODES, scheme_of

__all__ = ["Library", "LibraryProduct", "takes"]

# cuBLAS's blocks: 128 inputs of a row, 128 x 128 weights; the scales of a row of blocks 16 bytes apart.
_BLOCK, _BLOCKS = 128, 4

_tried: dict[tuple[torch.device, torch.dtype, bool, bool], bool] = {}


class Library(NamedTuple):
    """Says how cuBLAS adds up: ``fast``: all along K at the matrix unit's precision, some 14 bits on Hopper; otherwise
    128 products at a time, as it always does under scales of blocks."""

    fast: bool = True


def takes(layout: Layout, parts: Parts, dtype: torch.dtype) -> bool:
    """Return whether cuBLAS multiplies with ``layout`` here, on a GPU, for inputs and outputs of ``dtype``."""
    if not isinstance(layout, Float8) or layout.out_features % 16 or layout.in_features % 16:
        return False
    if (layout.format, layout.activation.format) == ("e5m2", "e5m2"):
        return False
    blocks = columns_of(layout) > 0
    if blocks:
        cut = (layout.grid.rows, layout.grid.cols, layout.activation.group)
        # A narrower input would need its scales spread out.
        if cut != (_BLOCK,) * 3 or layout.in_features % (_BLOCK * _BLOCKS) or parts["scales"].dtype != torch.float32:
            return False
    return _tries(parts["qweight"].device, dtype, blocks, False)


def _tries(device: torch.device, dtype: torch.dtype, blocks: bool, biased: bool) -> bool:
    """Return whether this version of torch and this GPU multiply a small example; they refuse before they compute."""
    key = (device, dtype, blocks, biased)
    if key not in _tried:
        _tried[key] = _refusal(*key) is None
    return _tried[key]


def _refusal(device: torch.device, dtype: torch.dtype, blocks: bool, biased: bool) -> str | None:
    """Return what torch says to the example; None where it multiplies."""
    k = _BLOCK * _BLOCKS
    codes = torch.zeros(16, k, dtype=torch.float8_e4m3fn, device=device)
    weight = torch.zeros(_BLOCK, k, dtype=torch.float8_e4m3fn, device=device)
    rows = torch.ones(_BLOCKS, 16, device=device).t() if blocks else torch.ones(16, 1, device=device)
    own = torch.ones(1, _BLOCKS, device=device).t() if blocks else torch.ones(1, _BLOCK, device=device)
    bias = torch.zeros(_BLOCK, dtype=dtype, device=device) if biased else None
    try:
        torch._scaled_mm(codes, weight.t(), rows, own, bias=bias, out_dtype=dtype)
    except (RuntimeError, ValueError) as error:
        return str(error)
    return None


class LibraryProduct:
    """Computes ``x @ W.T + bias`` for x (M, K)."""

    def __init__(self, layout: Layout, parts: Parts, config: Library) -> None:
        assert isinstance(layout, Float8)
        self.scheme = scheme_of(layout)
        self.n, self.k, self.index = layout.out_features, layout.in_features, parts["qweight"].device.index or 0
        self.blocks = columns_of(layout) > 0
        self.fast = config.fast and not self.blocks
        # Views: they stay what the weight's tensors are.
        self.weight, self.own = parts["qweight"].t(), parts["scales"]
        self.row = self.own.t() if self.blocks else None
        if not self.blocks and self.own.dtype == torch.float32 and self.own.numel() == self.n:
            self.row = self.own.view(1, self.n)
        self.stored = parts["input_scale"] if self.scheme.scale == 1 else None
        self.rounder = Rounder(self.scheme, self.k, each=32, row=8192)

    def _spread(self) -> Tensor:
        """Return the weight's scales (1, N), made from those of a tensor or of rows of blocks."""
        own = self.own.float().reshape(-1)
        own = own.repeat_interleave(self.scheme.rows)[: self.n] if own.numel() > 1 else own.expand(self.n)
        return own.unsqueeze(0).contiguous()

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return (M, N) in x's dtype."""
        m = rows = x.shape[0]
        if self.blocks:
            # The scales of a column of blocks must begin at a multiple of 16 bytes. Rows nobody wrote harm no others.
            rows = -(-m // _BLOCKS) * _BLOCKS
        codes = torch.empty(rows, self.k, dtype=CODES[self.scheme.kind], device=x.device)
        shape = (self.k // _BLOCK, rows) if self.blocks else (rows, 1)
        steps = torch.empty(shape, dtype=torch.float32, device=x.device)
        self.rounder(x, self.stored, codes, steps, steps, 0, self.index, padded=rows)
        inside = bias is not None and _tries(x.device, x.dtype, self.blocks, True)
        y = torch._scaled_mm(
            codes, self.weight, steps.t() if self.blocks else steps, self._spread() if self.row is None else self.row,
            bias=bias if inside else None, out_dtype=x.dtype, use_fast_accum=self.fast,
        )  # fmt: skip
        y = y if rows == m else y[:m].clone()
        return y if bias is None or inside else y + bias
