"""Entries of torchao's tensors with one code a byte: ``Int8Tensor``, ``IntxUnpackedToInt8Tensor``, ``Float8Tensor``.

``_weight_qdata`` (N, K) int8 or float8, ``_weight_scale`` and ``_weight_zero_point`` (N / rows, K / columns). Source:
torchao 0.18, ``quantization/quantize_/workflows/{int8,intx,float8}``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from qhub.errors import LayoutError
from qhub.formats import Entry
from qhub.layouts import Affine, Float8, Layout
from qhub_torchao.names import QDATA, SCALE, ZERO
from qhub_torchao.settings import Settings

__all__ = ["entries", "pack", "unpack"]

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def entries(layout: Layout, settings: Settings) -> dict[str, Entry]:
    """Return the entries of a weight of ``layout``."""
    assert isinstance(layout, (Affine, Float8))
    size, scales = (layout.out_features, layout.in_features), layout.scale_shape
    if isinstance(layout, Float8):
        return {QDATA: Entry(size, (layout.dtype,)), SCALE: Entry(scales, (torch.float32,))}
    # torchao before 0.15 wrote int8 weights without zeros.
    zero = Entry(scales, (torch.int8,), required=settings.storage == "intx")
    return {QDATA: Entry(size, (torch.int8,)), SCALE: Entry(scales, _FLOATS), ZERO: zero}


def pack(layout: Layout, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the entries for ``parts``; codes and zeros are counted from -2**(bits-1) there."""
    if isinstance(layout, Float8):
        return {QDATA: parts["qweight"], SCALE: parts["scales"].float()}
    assert isinstance(layout, Affine)
    shift = 0 if layout.signed else 2 ** (layout.bits - 1)
    codes, scales = layout.codes(parts), parts["scales"]
    if not layout.signed:
        codes = (codes.to(torch.int16) - shift).to(torch.int8)
    if layout.zero == "constant":
        zero = torch.full(scales.shape, int(layout.zero_point) - shift, dtype=torch.int8, device=scales.device)
    else:
        wide = parts["zeros"].to(torch.int16) - shift
        least, most = (int(one) for one in wide.aminmax())
        if least < -128 or most > 127:
            raise LayoutError(f"zeros from {least} to {most}, counted from -2**(bits-1), do not fit torchao's bytes")
        zero = wide.to(torch.int8)
    return {QDATA: codes, SCALE: scales, ZERO: zero}


def unpack(layout: Layout, found: Mapping[str, Tensor]) -> tuple[Layout, dict[str, Tensor]]:
    """Return layout and parts; zeros where the config would have none make a layout with zeros."""
    if isinstance(layout, Float8):
        return layout, {"qweight": found[QDATA], "scales": found[SCALE]}
    assert isinstance(layout, Affine)
    codes, zero = found[QDATA], found.get(ZERO)
    shift = 0 if layout.signed else 2 ** (layout.bits - 1)
    if not layout.signed:
        least, most = (int(one) for one in codes.aminmax())
        if least < -shift or most >= shift:
            raise LayoutError(
                f"entry {QDATA!r} holds codes from {least} to {most}, int{layout.bits} has {-shift} to {shift - 1}"
            )
        codes = (codes.to(torch.int16) + shift).to(torch.uint8)
    parts = {"qweight": layout.pack_codes(codes), "scales": found[SCALE]}
    if layout.zero == "constant":
        if zero is None or not bool((zero != 0).any()):
            return layout, parts
        layout = dataclasses.replace(layout, zero="value", zero_point=0.0)
    if zero is None:
        zero = torch.zeros(found[SCALE].shape, dtype=torch.int8, device=codes.device)
    if not layout.signed:
        if int(zero.min()) < -shift:
            raise LayoutError(
                f"entry {ZERO!r} holds {int(zero.min())}, the zeros of int{layout.bits} begin at {-shift}"
            )
        zero = (zero.to(torch.int16) + shift).to(torch.uint8)
    return layout, {**parts, "zeros": zero}
