"""The schemes that have a name, as plain data.

Source: compressed-tensors 0.20, ``PRESET_SCHEMES`` (compressed_tensors/quantization/quant_scheme.py): names and values.
"""

from __future__ import annotations

import copy
from typing import Any

__all__ = ["PRESETS", "numbers", "preset"]

_E4M3, _EXPONENTS = "torch.float8_e4m3fn", "torch.uint8"


def numbers(bits: int, kind: str, strategy: str, *, dynamic: bool | str = False, **others: Any) -> dict[str, Any]:
    """Return the keys of upstream's QuantizationArgs for symmetric numbers of ``bits`` bits."""
    return {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True, "dynamic": dynamic, **others}


def _grouped(bits: int, symmetric: bool = True) -> dict[str, Any]:
    return numbers(bits, "int", "group", group_size=128) | {"symmetric": symmetric}


def _float4(dynamic: bool | str = False) -> dict[str, Any]:
    return numbers(4, "float", "tensor_group", dynamic=dynamic, group_size=16, scale_dtype=_E4M3)


def _powers(bits: int, dynamic: bool = False) -> dict[str, Any]:
    return numbers(bits, "float", "group", dynamic=dynamic, group_size=32, scale_dtype=_EXPONENTS)


def _tokens(bits: int, kind: str) -> dict[str, Any]:
    return numbers(bits, kind, "token", dynamic=True)


def _scheme(weights: dict[str, Any], inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"weights": weights, "input_activations": inputs}


_FP8 = numbers(8, "float", "tensor")
_INT8 = _scheme(numbers(8, "int", "channel"), _tokens(8, "int"))
_BLOCKS = numbers(8, "float", "block", block_structure=[128, 128])

PRESETS: dict[str, dict[str, Any]] = {
    "W4A16": _scheme(_grouped(4)),
    "W4A16_ASYM": _scheme(_grouped(4, symmetric=False)),
    "W8A16": _scheme(_grouped(8)),
    "W8A8": _INT8,
    "INT8": _INT8,
    "FP8": _scheme(_FP8, _FP8),
    "FP8_DYNAMIC": _scheme(numbers(8, "float", "channel"), _tokens(8, "float")),
    "FP8_BLOCK": _scheme(_BLOCKS, numbers(8, "float", "group", dynamic=True, group_size=128)),
    "NVFP4A16": _scheme(_float4()),
    "NVFP4": _scheme(_float4(), _float4("local")),
    "MXFP4A16": _scheme(_powers(4)),
    "MXFP4": _scheme(_powers(4), _powers(4, dynamic=True)),
    "MXFP4XFP8": _scheme(_powers(4), numbers(8, "float", "group", dynamic=True, group_size=128)),
    "MXFP6A16": _scheme(_powers(6)),
    "MXFP6A8": _scheme(_powers(6), _powers(8, dynamic=True)),
    "MXFP8A16": _scheme(_powers(8)),
    "MXFP8": _scheme(_powers(8), _powers(8, dynamic=True)),
    "W4AFP8": _scheme(_grouped(4), _tokens(8, "float")),
    **{f"W{bits}A16": _scheme(_grouped(bits)) for bits in (2, 3, 5, 6, 7)},
    **{f"W{bits}A8": _scheme(_grouped(bits), _tokens(8, "int")) for bits in range(2, 8)},
    **{f"W{bits}A4": _scheme(_grouped(bits), _tokens(4, "int")) for bits in (2, 3, 4)},
}


def preset(name: str, targets: Any) -> dict[str, Any] | None:
    """Return the group that the preset ``name`` (in any case) stands for, for ``targets``; None for an unknown name."""
    found = PRESETS.get(name.upper())
    return None if found is None else {"targets": targets, **copy.deepcopy(found)}
