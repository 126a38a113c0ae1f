"""The dense weight of a quantized one: by a kernel made for it, or a few rows at a time, so that float32 temporaries
stay small beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qhub.kernels.dense_kernels import decoder
from qhub.layouts import Layout, Parts
from qhub.layouts.chunks import chunk_size
from qhub.layouts.keys import layout_key

if TYPE_CHECKING:
    from qhub.kernels.dense_kernels import DecodeFunction

__all__ = ["decoding", "dense"]

# Rows to decode at a time, by layout and device type; None where the layout cannot be cut into pieces that help.
_steps: dict[tuple[str, str], int | None] = {}


def dense(layout: Layout, parts: Parts, dtype: torch.dtype) -> Tensor:
    """Return what ``layout.dequantize(parts, dtype)`` returns, in less memory where rows can be cut.

    ``parts``: of one (N, K) matrix. On its way a decoded weight takes a dozen bytes; here only those of a piece do. The
    same bits, unless a kernel is there for it (:mod:`qhub.kernels.dense_kernels`): its may lie one rounding away.
    """
    return decoding(layout, parts, dtype)(layout, parts, dtype)


def decoding(layout: Layout, parts: Parts, dtype: torch.dtype) -> DecodeFunction:
    """Return what :func:`dense` calls for this layout and dtype, on the device of ``parts``, as ``function(layout,
    parts, dtype)``: the same while :data:`qhub.kernels.dispatch.epoch` is."""
    return decoder(layout, parts, dtype) or _in_pieces


def _in_pieces(layout: Layout, parts: Parts, dtype: torch.dtype) -> Tensor:
    device = next(iter(parts.values())).device
    rows, cols = layout.out_features, layout.in_features
    if rows * cols <= chunk_size(device) or device.type == "meta":
        return layout.dequantize(parts, dtype)
    key = (layout_key(layout), device.type)
    if key not in _steps:
        _steps[key] = _step(layout, parts, max(1, chunk_size(device) // cols))
    step = _steps[key]
    if step is None:
        return layout.dequantize(parts, dtype)
    weight = torch.empty(rows, cols, dtype=dtype, device=device)
    for start in range(0, rows, step):
        cut = layout.select_rows(parts, start, min(start + step, rows))
        assert cut is not None
        weight[start : start + step] = cut[0].dequantize(cut[1], dtype)
    return weight


def _step(layout: Layout, parts: Parts, wanted: int) -> int | None:
    """Return the first power of two from ``wanted`` rows on at whose multiples the matrix can be cut; None: nowhere."""
    rows = layout.out_features
    step = 1 << (wanted.bit_length() - 1)
    while step < rows:
        pieces = (layout.select_rows(parts, start, min(start + step, rows)) for start in range(0, rows, step))
        if all(piece is not None for piece in pieces):
            return step
        step *= 2
    return None
