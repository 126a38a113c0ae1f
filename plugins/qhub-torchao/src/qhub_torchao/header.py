"""What the header of a file says of torchao's tensors: class and attributes of each, as JSON, and all names.

Source: torchao 0.18, ``TensorSubclassAttributeJSONEncoder`` and ``flatten_tensor_state_dict``
(prototype/safetensors): without these entries torchao does not load a file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from qhub.layouts import Layout
from qhub_torchao.names import ACT_PRE_SCALE, QDATA, SCALE, SCALE_AND_ZERO, ZERO, attribute
from qhub_torchao.settings import Settings
from qhub_torchao.words import named

__all__ = ["contradictions", "describe", "written"]

_CLASSES = {
    "int8": "Int8Tensor",
    "intx": "IntxUnpackedToInt8Tensor",
    "float8": "Float8Tensor",
    "int4": "Int4Tensor",
    "tiles": "Int4TilePackedTo4dTensor",
    "words": "Int4PlainInt32Tensor",
}
_HELD = {
    "int8": (ZERO, QDATA, SCALE),
    "float8": (QDATA, SCALE),
    "tiles": (QDATA, SCALE_AND_ZERO),
}


def describe(layout: Layout, settings: Settings, dtype: torch.dtype | None, fused: bool = False) -> dict[str, Any]:
    """Return class, attributes and tensors of a weight.

    ``dtype``: of the dense weight, None leaves it out; ``fused``: it is one of the experts of a parameter.
    """
    held: list[str] = list(_HELD.get(settings.storage, (QDATA, SCALE, ZERO)))
    if layout.transforms:
        # Optional tensors come first, of which the zeros of int8 are one.
        held.insert(1 if held[0] == ZERO else 0, ACT_PRE_SCALE)
    attributes = _attributes(layout, settings, dtype)
    if fused:
        attributes["block_size"] = [1, *attributes["block_size"]]
    if dtype is None:
        attributes.pop("dtype", None)
    return {
        "_type": _CLASSES[settings.storage],
        "_data": attributes,
        "_tensor_data_names": [attribute(name) for name in held],
    }


def _attributes(layout: Layout, settings: Settings, dtype: torch.dtype | None) -> dict[str, Any]:
    block = list(settings.grain.block(layout.out_features, layout.in_features))
    said, rounds = json.loads(settings.said), layout.activation.kind != "none"
    kind = _dtype(str(dtype).removeprefix("torch."))
    if settings.storage == "int8":
        names: tuple[str, ...] = ("granularity", "mapping_type", "reduce_range")
        inputs = _of("QuantizeTensorToInt8Kwargs", {n: _bare(said[n]) for n in names}) if rounds else None
        return {
            "act_quant_kwargs": inputs, "reduce_range": settings.reduced, "block_size": block, "dtype": kind,
        }  # fmt: skip
    if settings.storage == "intx":
        return {
            "target_dtype": _dtype(f"int{settings.bits}"),
            "block_size": block,
            "dtype": kind,
            "activation_quantization": "int8_asym_per_token" if rounds else None,
        }
    if settings.storage == "float8":
        names = ("float8_dtype", "granularity", "mm_config", "hp_value_lb", "hp_value_ub", "kernel_preference")
        given = {**said, "mm_config": None}
        inputs = _of("QuantizeTensorToFloat8Kwargs", {n: _bare(given[n]) for n in names}) if rounds else None
        return {
            "block_size": block,
            "mm_config": _bare(said.get("mm_config")),
            "act_quant_kwargs": inputs,
            "kernel_preference": _bare(said["kernel_preference"]),
            "dtype": kind,
        }
    size = {"block_size": block, "shape": [layout.out_features, layout.in_features]}
    if settings.storage == "int4":
        return {"activation_dtype": _dtype("float8_e4m3fn" if rounds else "bfloat16"), **size}
    return size


def _of(kind: str, data: dict[str, Any]) -> dict[str, Any]:
    return named(kind, data, None)


def _dtype(name: str) -> dict[str, Any]:
    return named("torch.dtype", name, None)


def _bare(value: Any) -> Any:
    """Return JSON of a config as a header has it: without versions."""
    if isinstance(value, Mapping):
        return {key: _bare(one) for key, one in value.items() if key != "_version"}
    return [_bare(one) for one in value] if isinstance(value, list) else value


def written(described: Mapping[str, dict[str, Any]], dense: Iterable[str]) -> dict[str, str]:
    """Return the header's entries for quantized and dense parameters."""
    plain = json.dumps({"_type": "Tensor"})
    entries = {**dict.fromkeys(dense, plain), **{name: json.dumps(one) for name, one in described.items()}}
    return {**entries, "tensor_names": json.dumps(list(entries))}


def contradictions(name: str, said: str, expected: Mapping[str, Any]) -> list[str]:
    """Return what the header's entry ``said`` for the parameter ``name`` has otherwise than ``expected``.

    Which kernel is preferred does not matter here, and older releases of torchao said less.
    """
    try:
        found = json.loads(said)
        kind, data = found["_type"], dict(found.get("_data", {}))
    except (ValueError, TypeError, KeyError):
        return [f"{name}: the header describes it as {said[:80]!r}, which is not what torchao writes"]
    if kind != expected["_type"]:
        return [f"{name} is a {kind} by the file's header, the config makes it a {expected['_type']}"]
    problems = []
    for key, wanted in expected["_data"].items():
        if key in ("kernel_preference", "mm_config") or key not in data:
            continue
        if key == "act_quant_kwargs":
            agrees = (data[key] is None) == (wanted is None) and _agree(data[key], wanted)
        else:
            agrees = data[key] == wanted
        if not agrees:
            problems.append(
                f"{name} has {key}={_short(data[key])} in the file's header, {_short(wanted)} by the config"
            )
    return problems


def _agree(found: Any, wanted: Any) -> bool:
    """Return whether the attributes that both have are equal."""
    if found is None or wanted is None:
        return found is wanted
    try:
        found, wanted = found["_data"], wanted["_data"]
        ignored = ("kernel_preference", "mm_config")
        return all(found[key] == wanted[key] for key in found.keys() & wanted.keys() if key not in ignored)
    except (TypeError, KeyError, AttributeError):
        return False


def _short(value: Any) -> str:
    return json.dumps(value)[:120]
