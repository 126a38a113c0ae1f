"""The strings that TorchAoConfig took until transformers 5 (``"int4_weight_only"``), as configs.

Source: transformers 4.57, ``TorchAoConfig`` (utils/quantization_config.py), which called torchao's functions of these
names with ``quant_type_kwargs``; the functions' arguments and defaults: torchao 0.9, ``quant_api.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from qhub.errors import ConfigError
from qhub_torchao.kinds import HQQ, TILES
from qhub_torchao.words import encoded, group, named, per_row, per_tensor

__all__ = ["ARGUMENTS", "STRINGS", "config_of"]

Arguments = dict[str, Any]


def config_of(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config that the string ``name`` stands for, called with ``arguments``.

    Raises :class:`ConfigError` for a string or an argument that is not known.
    """
    if name not in STRINGS:
        raise ConfigError(f"quant_type={name!r} of a torchao config: the strings are {', '.join(sorted(STRINGS))}")
    allowed, kind = STRINGS[name]
    unknown = sorted(set(arguments) - allowed - _MEMORY)
    if unknown:
        raise ConfigError(f"quant_type={name!r} of a torchao config takes {sorted(allowed)}, not {unknown}")
    given = {key: _readable(value) for key, value in arguments.items() if key in allowed and value is not None}
    return kind(given)


def _readable(value: Any) -> Any:
    """Return the JSON of an argument; a granularity may be named ("PerRow")."""
    named_grains = {"perrow": per_row(), "pertensor": per_tensor()}
    if isinstance(value, str):
        return named_grains.get(value.lower().replace("_", ""), value)
    return encoded(value)


def _int8(given: Arguments) -> dict[str, Any]:
    size = given.pop("group_size", None)
    return named("Int8WeightOnlyConfig", given if size is None else {**given, "granularity": group(size)}, 2)


def _int4(given: Arguments) -> dict[str, Any]:
    data = {"group_size": given.pop("group_size", 128), "int4_packing_format": TILES}
    if given.pop("use_hqq", False):
        data["int4_choose_qparams_algorithm"] = HQQ
    return named("Int4WeightOnlyConfig", {**data, **given}, 2)


def _int8_int4(given: Arguments) -> dict[str, Any]:
    data = {
        "weight_dtype": named("torch.dtype", "int4", None),
        "weight_granularity": group(given.pop("group_size", 32)),
    }
    if "mapping_type" in given:
        data["weight_mapping_type"] = given.pop("mapping_type")
    return named("Int8DynamicActivationIntxWeightConfig", {**data, **given}, 2)


def _plain(kind: str, version: int = 2) -> Callable[[Arguments], dict[str, Any]]:
    return lambda given: named(kind, given, version)


# Each string with the arguments it takes and the config that follows.
STRINGS: Mapping[str, tuple[frozenset[str], Callable[[Arguments], dict[str, Any]]]] = {
    "int8_weight_only": (frozenset({"group_size", "granularity"}), _int8),
    "int4_weight_only": (frozenset({"group_size", "use_hqq", "int4_packing_format"}), _int4),
    "int8_dynamic_activation_int8_weight": (
        frozenset({"act_mapping_type", "granularity", "reduce_range", "weight_only_decode"}),
        _plain("Int8DynamicActivationInt8WeightConfig"),
    ),
    "int8_dynamic_activation_int4_weight": (frozenset({"group_size", "mapping_type", "act_mapping_type"}), _int8_int4),
    "float8_weight_only": (frozenset({"weight_dtype", "granularity"}), _plain("Float8WeightOnlyConfig")),
    "float8_dynamic_activation_float8_weight": (
        frozenset(
            {
                "activation_dtype", "activation_value_lb", "activation_value_ub", "granularity", "kernel_preference",
                "mm_config", "weight_dtype",
            }
        ),
        _plain("Float8DynamicActivationFloat8WeightConfig"),
    ),
    "float8_dynamic_activation_int4_weight": (
        frozenset({"int4_packing_format"}),
        _plain("Float8DynamicActivationInt4WeightConfig", 1),
    ),
    "intx_weight_only": (
        frozenset({"granularity", "mapping_type", "scale_dtype", "weight_dtype"}),
        _plain("IntxWeightOnlyConfig"),
    ),
    "int8_dynamic_activation_intx_weight": (
        frozenset(
            {"act_mapping_type", "weight_dtype", "weight_granularity", "weight_mapping_type", "weight_scale_dtype"}
        ),
        _plain("Int8DynamicActivationIntxWeightConfig"),
    ),
}  # fmt: skip

# Arguments that said how torchao laid numbers out in memory, or how it compiled.
_MEMORY = frozenset({"inner_k_tiles", "layout", "preserve_zero", "set_inductor_config", "zero_point_domain"})

ARGUMENTS = frozenset().union(_MEMORY, *(allowed for allowed, _ in STRINGS.values()))
