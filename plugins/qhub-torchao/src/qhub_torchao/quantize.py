"""One dense weight into the parts of its layout, by the settings that the layout came from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qhub.layouts import Affine, Float8, Layout
from qhub.layouts.chunks import row_chunks
from qhub_torchao import float8, hqq, int4, integers
from qhub_torchao.reading import settings_for
from qhub_torchao.settings import Settings

__all__ = ["quantize"]


def quantize(weight: Tensor, layout: Layout, config: Any) -> dict[str, Tensor]:
    """Return the parts of ``layout`` for ``weight`` (N, K) of any float dtype: the numbers that torchao chooses."""
    settings = settings_for(config, layout)
    grid = layout.grid  # type: ignore[attr-defined]
    # Half-quadratic fits stop by the error of the whole matrix; scales for more than one row need the whole too.
    if grid.rows > 1 or settings.algorithm in ("hqq", "hqq_scale_only"):
        return _quantize(weight, layout, settings)
    pieces = [
        _quantize(weight[rows], layout.with_rows(weight[rows].shape[0]), settings)
        for rows in row_chunks(weight.shape[0], weight.shape[1], weight.device)
    ]
    if len(pieces) == 1:
        return pieces[0]
    return {
        name: torch.cat([_bytes(piece[name]) for piece in pieces]).view(pieces[0][name].dtype) for name in pieces[0]
    }


def _bytes(part: Tensor) -> Tensor:
    # Few operators take float8.
    return part.view(torch.uint8) if part.element_size() == 1 else part


def _quantize(weight: Tensor, layout: Layout, settings: Settings) -> dict[str, Tensor]:
    if isinstance(layout, Float8):
        return _float8(weight, layout)
    assert isinstance(layout, Affine)
    return _integers(weight, layout, settings) if layout.zero != "offset" else _int4(weight, layout, settings)


def _float8(weight: Tensor, layout: Float8) -> dict[str, Tensor]:
    grid = layout.grid
    split = grid.split(weight)
    scales = float8.scales_of(split.abs().amax(grid.member_dims), layout.dtype)
    q = float8.rounded(split, grid.spread(scales), layout.dtype)
    return {"qweight": _joined(q.view(torch.uint8), layout).view(layout.dtype), "scales": scales}


def _integers(weight: Tensor, layout: Affine, settings: Settings) -> dict[str, Tensor]:
    grid, code_range = layout.grid, settings.code_range
    split = grid.split(weight)
    zero: Tensor | None = None
    if settings.algorithm == "hqq_scale_only":
        q, scale = hqq.scale_only(split.squeeze(-3), code_range)
        q, scale = q.unsqueeze(-3), scale.to(_scale_dtype(settings, weight))
    else:
        low, high = split.amin(grid.member_dims), split.amax(grid.member_dims)
        mapping = "asymmetric" if settings.storage == "words" else settings.mapping
        eps = {"int8": torch.finfo(torch.float32).eps, "words": 1e-6}.get(settings.storage)
        scale, zero = integers.scales_and_zeros(low, high, code_range, mapping, eps)
        scale = scale.to(torch.float32 if settings.storage == "int8" else _scale_dtype(settings, weight))
        # The zero is stored as a byte before it is used.
        zero = None if zero is None else zero.to(torch.int8)
        q = integers.codes(split, grid.spread(scale), None if zero is None else grid.spread(zero), code_range)
    shift = 0 if layout.signed or settings.storage == "words" else 2 ** (settings.bits - 1)
    parts = {"qweight": layout.pack_codes(_joined(q.float() + shift, layout)), "scales": scale}
    if zero is not None:
        parts["zeros"] = zero if layout.signed else (zero.to(torch.int16) + shift).to(torch.uint8)
    return parts


def _scale_dtype(settings: Settings, weight: Tensor) -> torch.dtype:
    return weight.dtype if settings.scale_dtype is None else getattr(torch, settings.scale_dtype)


def _int4(weight: Tensor, layout: Affine, settings: Settings) -> dict[str, Tensor]:
    if settings.storage == "tiles":
        # tinygemm knows bfloat16 alone.
        weight = weight.to(torch.bfloat16)
    groups = layout.grid.split(weight).squeeze(-3)
    if settings.storage == "tiles":
        q, scale, zero = hqq.scale_and_zero(groups) if settings.algorithm == "hqq" else int4.tinygemm(groups)
    else:
        q, scale, zero = (int4.plain if settings.activation.kind == "none" else int4.plain_symmetric)(groups)
    codes = q.reshape(weight.shape)
    return {"qweight": layout.pack_codes(codes), "scales": scale.to(weight.dtype), "zeros": zero.to(weight.dtype)}


def _joined(split: Tensor, layout: Layout) -> Tensor:
    return layout.grid.join(split, layout.out_features, layout.in_features)  # type: ignore[attr-defined]
