"""The kinds of torchao config that are offered: their fields, the defaults, and what older versions called them.

Source: torchao 0.18, the dataclasses of ``torchao/quantization/quant_api.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qhub.errors import ConfigError
from qhub_torchao.words import fields_of, group, named, per_row, per_tensor

__all__ = ["KINDS", "complete", "parts_of"]

_ENUMERATIONS = frozenset(
    {
        "Float8PackingFormat", "Int4ChooseQParamsAlgorithm", "Int4PackingFormat", "IntxChooseQParamsAlgorithm",
        "IntxPackingFormat", "KernelPreference", "MappingType",
    }
)  # fmt: skip

_SYMMETRIC = named("MappingType", "SYMMETRIC", None)
_ASYMMETRIC = named("MappingType", "ASYMMETRIC", None)
_E4M3 = named("torch.dtype", "float8_e4m3fn", None)
_INTX = {
    "intx_packing_format": named("IntxPackingFormat", "UNPACKED_TO_INT8", None),
    "intx_choose_qparams_algorithm": named("IntxChooseQParamsAlgorithm", "AFFINE", None),
}
TILES = named("Int4PackingFormat", "TILE_PACKED_TO_4D", None)
HQQ = named("Int4ChooseQParamsAlgorithm", "HQQ", None)

# Every kind with its version and the defaults of its fields.
KINDS: Mapping[str, tuple[int, Mapping[str, Any]]] = {
    "Int8WeightOnlyConfig": (2, {"group_size": None, "granularity": per_row(), "set_inductor_config": True}),
    "Int8DynamicActivationInt8WeightConfig": (
        2,
        {
            "act_mapping_type": _SYMMETRIC,
            "weight_only_decode": False,
            "granularity": per_row(),
            "set_inductor_config": True,
            "reduce_range": False,
        },
    ),
    "Float8WeightOnlyConfig": (
        2,
        {"weight_dtype": _E4M3, "set_inductor_config": True, "granularity": per_row()},
    ),
    "Float8DynamicActivationFloat8WeightConfig": (
        2,
        {
            "activation_dtype": _E4M3,
            "weight_dtype": _E4M3,
            "granularity": [per_tensor(), per_tensor()],
            "packing_format": named("Float8PackingFormat", "PLAIN", None),
            "mm_config": named("Float8MMConfig", {"emulate": False, "use_fast_accum": True, "pad_inner_dim": False}),
            "activation_value_lb": None,
            "activation_value_ub": None,
            "kernel_preference": named("KernelPreference", "AUTO", None),
            "set_inductor_config": True,
            "alg_id": 0,
        },
    ),
    "IntxWeightOnlyConfig": (
        2,
        {
            "weight_dtype": named("torch.dtype", "int8", None),
            "granularity": named("PerAxis", {"axis": 0}),
            "mapping_type": _SYMMETRIC,
            "scale_dtype": None,
            **_INTX,
        },
    ),
    "Int8DynamicActivationIntxWeightConfig": (
        2,
        {
            "weight_dtype": named("torch.dtype", "int8", None),
            "weight_granularity": group(32),
            "weight_mapping_type": _SYMMETRIC,
            "weight_scale_dtype": None,
            "act_mapping_type": _ASYMMETRIC,
            **_INTX,
        },
    ),
    "Int4WeightOnlyConfig": (
        2,
        {
            "group_size": 128,
            "set_inductor_config": True,
            "int4_packing_format": named("Int4PackingFormat", "PLAIN", None),
            "int4_choose_qparams_algorithm": named("Int4ChooseQParamsAlgorithm", "TINYGEMM", None),
            "int4_tile_packed_ntile": 8,
        },
    ),
    "Float8DynamicActivationInt4WeightConfig": (1, {"int4_packing_format": "preshuffled"}),
    "FqnToConfig": (1, {"fqn_to_config": {}, "module_fqn_to_config": {}}),
}

# Fields of earlier versions that said how numbers lie in memory, not which numbers.
_FORMER = frozenset({"layout", "packing_format", "zero_point_domain", "preserve_zero", "inner_k_tiles"})


def complete(value: Any) -> dict[str, Any]:
    """Return the JSON of a config with every field of its kind, those of former versions told in today's.

    Raises :class:`ConfigError` for a kind or field that is not known.
    """
    kind, data, version = fields_of(value)
    kind, data = _todays(kind, data, version)
    if kind not in KINDS:
        raise ConfigError(
            f"quant_type of a torchao config: {kind!r} is not offered, there are {', '.join(sorted(KINDS))}"
        )
    current, defaults = KINDS[kind]
    unknown = sorted(set(data) - set(defaults))
    if unknown:
        raise ConfigError(
            f"quant_type of a torchao config: {kind} has no fields {unknown}; it has {', '.join(defaults)}"
        )
    found = {name: _typed(name, data.get(name, default), default) for name, default in defaults.items()}
    if kind == "FqnToConfig":
        found = _complete_parts(found)
    return named(kind, found, current)


def _typed(name: str, value: Any, default: Any) -> Any:
    """Return a word given as a plain string ("int4", "asymmetric") as the dtype or enumeration that the field has."""
    if not isinstance(value, str) or isinstance(default, str):
        return value
    if default is None:
        kind = "torch.dtype" if name.endswith("dtype") else None
    else:
        kind = default.get("_type") if isinstance(default, Mapping) else None
    if kind == "torch.dtype":
        return named(kind, value.lower().removeprefix("torch."), None)
    return value if kind is None or kind not in _ENUMERATIONS else named(kind, value.upper(), None)


def _complete_parts(data: Mapping[str, Any]) -> dict[str, Any]:
    given = [data[name] for name in ("fqn_to_config", "module_fqn_to_config") if data[name]]
    if not given or not all(isinstance(one, Mapping) for one in given) or any(one != given[0] for one in given):
        raise ConfigError(
            "quant_type of a torchao config: a FqnToConfig maps names to configs in fqn_to_config, of which "
            f"module_fqn_to_config, its former name, says the same where it is given; found {dict(data)!r}"
        )
    parts = {str(name): None if one is None else complete(one) for name, one in given[0].items()}
    if any(one is not None and one["_type"] == "FqnToConfig" for one in parts.values()):
        raise ConfigError(
            "quant_type of a torchao config: a FqnToConfig holds another one, list all names in the outer one"
        )
    return {"fqn_to_config": parts, "module_fqn_to_config": parts}


def parts_of(value: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the configs by name of a complete FqnToConfig; None for any other kind."""
    return value["_data"]["fqn_to_config"] if value["_type"] == "FqnToConfig" else None


def _todays(kind: str, data: dict[str, Any], version: int) -> tuple[str, dict[str, Any]]:
    """Return kind and fields in the words of torchao 0.18."""
    if kind == "ModuleFqnToConfig":
        return "FqnToConfig", data
    if kind == "Int8DynamicActivationInt4WeightConfig":
        return "Int8DynamicActivationIntxWeightConfig", {
            "weight_dtype": named("torch.dtype", "int4", None),
            "weight_granularity": group(data.get("group_size", 32)),
            "weight_mapping_type": data.get("mapping_type", _SYMMETRIC),
            "act_mapping_type": data.get("act_mapping_type", _ASYMMETRIC),
        }
    if version > 1 or kind not in KINDS or KINDS[kind][0] == 1:
        return kind, data
    first = {name: one for name, one in data.items() if name not in _FORMER or name in KINDS[kind][1]}
    if kind == "Int8WeightOnlyConfig" and first.get("group_size") is not None:
        first["granularity"] = group(first.pop("group_size"))
    if kind == "Int4WeightOnlyConfig":
        # Version 1 knew tinygemm's numbers and its tiles alone.
        first.setdefault("int4_packing_format", TILES)
        if first.pop("use_hqq", False):
            first["int4_choose_qparams_algorithm"] = HQQ
    return kind, first
