"""What a layout in tiles says to the kernels: its tensors in their order, and the values they are compiled for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qhub.layouts import Float8, Nested, Parts
from qhub.layouts.tiled import Tiled
from qhub_triton.launch import hopper, memory, native, processors
from qhub_triton.tiled import decode
from qhub_triton.tiled.plans import Size

__all__ = ["bytes_of", "constants_of", "many_constants", "size_of", "tensors_of"]


def many_constants(layout: Tiled, parts: Parts) -> dict[str, bool]:
    """Return what a product for many rows is compiled for besides: WHOLE, whether zeros are whole numbers, and EARLY,
    whether weights are scaled before the product, not the product after it.

    Nested scales are put together a block ahead, which only the latter waits for. Zeros that are no whole numbers are
    rounded once only together with their scales.
    """
    whole = getattr(layout.of, "zero", None) == "value" and not parts["zeros"].is_floating_point()
    fractional = not whole
    if getattr(layout.of, "zero", "constant") == "constant":
        fractional = getattr(layout.of, "zero_point", 0.0) % 1 != 0
    return {"WHOLE": whole, "EARLY": fractional or not any(layout.scale_tensors().values())}


def size_of(layout: Tiled, device: torch.device) -> Size:
    """Return what plans for a weight on ``device`` are made by."""
    nested = any(layout.scale_tensors().values())
    zeros = getattr(layout.of, "zero", "constant") != "constant"
    looked_up = layout.bits == 4 and "table" in layout.part_specs()
    return Size(
        layout.out_features,
        layout.blocks,
        layout.per_word * 32,
        processors(device),
        memory(device),
        nested,
        zeros,
        looked_up,
        banks=looked_up and hopper(device),
    )


def bytes_of(table: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``table`` (16,) float32 in 16 bits of ``dtype``, as 264 int32.

    The first 8: four low bytes each, then four high bytes (:mod:`qhub_triton.tiled.registers`). Then all pairs of
    numbers, the first code of a pair its lower bits (:mod:`qhub_triton.tiled.banks`).
    """
    short = table.to(dtype)
    apart = short.view(torch.uint8).reshape(4, 4, 2)
    pairs = torch.stack([short.repeat(16), short.repeat_interleave(16)], dim=-1)
    return torch.cat([apart[..., 0].reshape(-1), apart[..., 1].reshape(-1), pairs.view(torch.uint8).reshape(-1)]).view(
        torch.int32
    )


def tensors_of(layout: Tiled, parts: Parts, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return words, scales, zeros, table, second-level scales and their table and offset, second-level zeros."""
    none = parts["qweight"]
    scales = parts["scales"]
    if scales.dtype == torch.float8_e8m0fnu:
        scales = scales.view(torch.uint8)
    table = parts.get("table", none)
    if table is not none and layout.bits == 4 and native(none.device):
        table = bytes_of(table, dtype)
    parts = {**parts, "table": table}
    names = ("zeros", "table", "scales_super", "scales_table", "scales_offset", "zeros_super")
    return (parts["qweight"], scales, *(parts.get(name, none) for name in names))


def constants_of(layout: Tiled, parts: Parts) -> dict[str, Any]:
    """Return the compile-time values that the layout decides."""
    of: Any = layout.of
    kind = decode.INTEGER
    if isinstance(of, Float8):
        kind = {"e4m3fn": decode.E4M3, "e5m2": decode.E5M2}[of.format]
    elif "table" in parts:
        kind = decode.TABLE
    zero_point = float(getattr(of, "zero_point", 0.0)) + (128.0 if getattr(of, "signed", False) else 0.0)
    per_block = layout.per_word * 32
    group = layout.group_size if layout.groups > 1 else layout.blocks * per_block
    zero = {"constant": 0, "value": 1, "offset": 2}[getattr(of, "zero", "constant")]
    return {
        "BITS": layout.bits, "KIND": kind.value, "GROUP": group, "ZERO": zero, "ZERO_POINT": zero_point,
        "UNIT": float(getattr(of, "unit", 1.0)), "NESTED": _nested(layout.scale_tensors().get("scales")),
        "ZERO_NESTED": _nested(layout.scale_tensors().get("zeros")),
    }  # fmt: skip


def _nested(nested: Nested | None) -> tuple[int, bool, bool, bool] | None:
    if nested is None:
        return None
    return nested.group, nested.table, nested.offset, nested.divide
