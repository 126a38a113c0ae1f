"""Entries of torchao's tensors that pack 4-bit codes.

* ``Int4Tensor``: ``_weight_qdata`` (N, K/2) int8, the even column in the low nibble, codes from -8 to 7 in two's
  complement; ``_weight_scale`` and ``_weight_zero_point`` (K/size, N).
* ``Int4TilePackedTo4dTensor``: ``_weight_qdata`` in tinygemm's tiles, N filled up to a multiple of 8 and K to one of
  1024; ``_weight_scale_and_zero`` (K/size, N, 2) bfloat16, filled up alike.
* ``Int4PlainInt32Tensor`` (of Intel's GPUs): ``_weight_qdata`` (N, K/8) int32, the first column in the lowest nibble;
  ``_weight_scale`` (K/size, N), ``_weight_zero_point`` (K/size, N) int8.

Sources: torchao 0.18, ``quantization/quantize_/workflows/int4``; ``pack_int4`` of FBGEMM
(fbgemm_gpu/experimental/gen_ai/quantize.py).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qhub.formats import Entry
from qhub.layouts import Affine
from qhub_torchao.int4 import tinygemm
from qhub_torchao.names import QDATA, SCALE, SCALE_AND_ZERO, ZERO
from qhub_torchao.settings import TILE_K, Settings
from qhub_torchao.tiles import from_tiles, to_tiles

__all__ = ["entries", "pack", "unpack"]

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def entries(layout: Affine, settings: Settings) -> dict[str, Entry]:
    """Return the entries of a weight of ``layout``."""
    n, k = layout.out_features, layout.in_features
    groups = layout.scale_shape[1]
    if settings.storage == "tiles":
        rows, columns = _filled(layout)
        size = (rows // 8, columns // 128, 32, 4)
        both = (columns // layout.grid.cols, rows, 2)
        return {QDATA: Entry(size, (torch.int32,)), SCALE_AND_ZERO: Entry(both, (torch.bfloat16,))}
    scale = Entry((groups, n), _FLOATS)
    if settings.storage == "words":
        return {QDATA: Entry((n, k // 8), (torch.int32,)), SCALE: scale, ZERO: Entry((groups, n), (torch.int8,))}
    return {QDATA: Entry((n, k // 2), (torch.int8, torch.uint8)), SCALE: scale, ZERO: scale}


def _filled(layout: Affine) -> tuple[int, int]:
    return layout.out_features + -layout.out_features % 8, layout.in_features + -layout.in_features % TILE_K


def pack(layout: Affine, settings: Settings, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the entries for ``parts``."""
    if settings.storage == "tiles":
        return _pack_tiles(layout, parts)
    packed = parts["qweight"]
    zeros = parts["zeros"].to(torch.int8) if settings.storage == "words" else parts["zeros"]
    # Both have the layout's own nibble order; two's complement flips the highest bit of a code less 8.
    codes = packed.contiguous().view(torch.int32) if settings.storage == "words" else (packed ^ 0x88).view(torch.int8)
    return {QDATA: codes, SCALE: parts["scales"].t().contiguous(), ZERO: zeros.t().contiguous()}


def unpack(layout: Affine, settings: Settings, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the parts for the entries ``found``."""
    if settings.storage == "tiles":
        return _unpack_tiles(layout, found)
    packed = found[QDATA].contiguous().view(torch.uint8)
    zeros = found[ZERO].t().contiguous()
    if settings.storage == "words":
        return {"qweight": packed, "scales": found[SCALE].t().contiguous(), "zeros": zeros.view(torch.uint8)}
    return {"qweight": packed ^ 0x88, "scales": found[SCALE].t().contiguous(), "zeros": zeros}


def _pack_tiles(layout: Affine, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    rows, columns = _filled(layout)
    groups = layout.scale_shape[1]
    # What is filled up are zeros, quantized as everything else: code 0 under the least scale.
    nothing = torch.zeros(1, layout.grid.cols, dtype=torch.bfloat16, device=parts["scales"].device)
    _, scale, zero = tinygemm(nothing)
    more = (0, columns // layout.grid.cols - groups, 0, rows - layout.out_features)
    pad = torch.nn.functional.pad
    both = [
        pad(parts[name].to(torch.bfloat16), more, value=float(one))
        for name, one in (("scales", scale), ("zeros", zero))
    ]
    codes = pad(layout.codes(parts), (0, columns - layout.in_features, 0, rows - layout.out_features))
    return {QDATA: to_tiles(codes), SCALE_AND_ZERO: torch.stack(both, dim=-1).transpose(0, 1).contiguous()}


def _unpack_tiles(layout: Affine, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    n, k, groups = layout.out_features, layout.in_features, layout.scale_shape[1]
    both = found[SCALE_AND_ZERO][:groups, :n].transpose(0, 1)
    return {
        "qweight": layout.pack_codes(from_tiles(found[QDATA])[:n, :k]),
        "scales": both[..., 0].contiguous(),
        "zeros": both[..., 1].contiguous(),
    }
