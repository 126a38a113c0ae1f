"""The entries that say how a layer's input is rounded: stored scales and zeros.

``input_scale`` (1,) in the dtype of the weight's scales, ``input_zero_point`` (1,) int8 where inputs have one, and for
4-bit floats ``input_global_scale`` (1,) float32, which divides. Source: compressed-tensors 0.20, ``initialize_qparams``
(compressed_tensors/quantization/lifecycle/initialize.py).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qhub.errors import LayoutError
from qhub.formats import Entry
from qhub.layouts import Activation

__all__ = ["FLOATS", "entries_of_inputs", "one_value", "pack_inputs", "unpack_inputs"]

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_INTEGERS = (torch.int8, torch.int32, torch.int64)


def entries_of_inputs(activation: Activation) -> dict[str, Entry]:
    """Return the entries that go with ``activation``."""
    entries = {}
    if activation.static:
        entries["input_scale"] = Entry(None, FLOATS)
        # Older files have one of 0 for symmetric inputs too.
        zeros = _INTEGERS if activation.kind == "int8" else (*_INTEGERS, torch.float8_e4m3fn)
        entries["input_zero_point"] = Entry(None, zeros, required=not activation.symmetric)
    if activation.scale_format == "e4m3fn":
        entries["input_global_scale"] = Entry(None, FLOATS)
    return entries


def unpack_inputs(activation: Activation, entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the parts of ``activation``; raises :class:`LayoutError` where an entry is not one number."""
    parts = {}
    if activation.static:
        parts["input_scale"] = one_value("input_scale", entries)
        if "input_zero_point" in entries:
            zero = one_value("input_zero_point", entries)
            if not activation.symmetric:
                parts["input_zero"] = zero
            elif float(zero) != 0:
                raise LayoutError(
                    f"entry 'input_zero_point' is {float(zero)}, and the config says that inputs are symmetric"
                )
    if activation.scale_format == "e4m3fn":
        parts["input_global_scale"] = one_value("input_global_scale", entries)
    return parts


def pack_inputs(activation: Activation, parts: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the entries for the parts of ``activation``; ``dtype``: of the scale, if that holds it exactly."""
    entries = {}
    if activation.static:
        scale = parts["input_scale"].reshape(1)
        entries["input_scale"] = scale.to(dtype) if torch.equal(scale.to(dtype).float(), scale) else scale.clone()
        if not activation.symmetric:
            entries["input_zero_point"] = parts["input_zero"].reshape(1).to(torch.int8)
    if activation.scale_format == "e4m3fn":
        entries["input_global_scale"] = parts["input_global_scale"].reshape(1).clone()
    return entries


def one_value(name: str, entries: Mapping[str, Tensor]) -> Tensor:
    """Return the entry ``name`` as () float32; raises :class:`LayoutError` where it is not one number."""
    entry = entries[name]
    if entry.numel() != 1:
        raise LayoutError(f"entry {name!r} has shape {tuple(entry.shape)}, expected one number")
    return entry.reshape(()).float()
