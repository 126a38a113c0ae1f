"""From a config's JSON to settings, one for each name of a FqnToConfig.

Source: torchao 0.18, ``quantization/quant_api.py``, the ``_..._quantize_tensor`` functions of the kinds.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

from qhub.errors import ConfigError
from qhub.layouts import Activation, Layout
from qhub_torchao.kinds import complete, parts_of
from qhub_torchao.settings import Grain, Settings
from qhub_torchao.words import dtype_word, encoded, fields_of, word

__all__ = ["ANY", "settings_by_name", "settings_for"]

# The name under which a config that is no FqnToConfig is found.
ANY = "*"

_MAPPINGS = ("symmetric", "symmetric_no_clipping_err", "asymmetric")
_FLOATS = ("float32", "float16", "bfloat16")
_FLOAT8 = {"float8_e4m3fn": "e4m3fn", "float8_e5m2": "e5m2"}
_PACKINGS = {"plain": "int4", "preshuffled": "int4", "tile_packed_to_4d": "tiles", "plain_int32": "words"}


def settings_by_name(config: Any) -> Mapping[str, Settings | None]:
    """Return the settings of a TorchAoConfig by the names of its FqnToConfig, None where that says so, or under
    :data:`ANY`.

    Raises :class:`ConfigError` on values that are not offered.
    """
    return _read(_text(config))


def _text(config: Any) -> str:
    given = config.quant_type
    return json.dumps(given if isinstance(given, Mapping) else encoded(given))


def settings_for(config: Any, layout: Layout) -> Settings:
    """Return the settings that gave a weight its ``layout``; raises :class:`ConfigError` when none would."""
    found = _find(_text(config), layout)
    if found is not None:
        return found
    raise ConfigError(
        f"this torchao config has no tensors for a weight stored as {layout.describe()}: convert the model to a config "
        "that has"
    )


@functools.lru_cache(maxsize=32)
def _read(text: str) -> Mapping[str, Settings | None]:
    value = complete(json.loads(text))
    parts = parts_of(value)
    if parts is None:
        return {ANY: _settings(value)}
    return {name: None if one is None else _settings(one) for name, one in parts.items()}


@functools.lru_cache(maxsize=256)
def _find(text: str, layout: Layout) -> Settings | None:
    # Names by the hundred have a few settings among them.
    distinct = dict.fromkeys(one for one in _read(text).values() if one is not None)
    return next((settings for settings in distinct if settings.holds(layout)), None)


def _settings(value: Mapping[str, Any]) -> Settings:
    kind, data, _ = fields_of(value)
    try:
        return _READERS[kind](data)
    except ConfigError as error:
        raise ConfigError(f"quant_type of a torchao config, {kind}: {error}") from error


def _int8(data: Mapping[str, Any]) -> Settings:
    if data["group_size"] is not None:
        raise ConfigError(f"group_size={data['group_size']!r}: say granularity=PerGroup({data['group_size']})")
    return Settings("int8", _grain(data["granularity"], "tensor", "row", "group"))


def _int8_dynamic(data: Mapping[str, Any]) -> Settings:
    act, weight = _pair(data["granularity"], "tensor", "row")
    reduced = _flag(data, "reduce_range")
    if _flag(data, "weight_only_decode"):
        raise ConfigError("weight_only_decode=True: inputs are rounded for one row as for many")
    mapping = _one_of(data, "act_mapping_type", ("symmetric", "asymmetric"))
    activation = _int8_inputs(act, mapping, 7 if reduced else 8)
    said = {
        "granularity": _first(data["granularity"]), "mapping_type": data["act_mapping_type"], "reduce_range": reduced,
    }  # fmt: skip
    return Settings("int8", weight, reduced=reduced, activation=activation, said=json.dumps(said))


def _int8_inputs(grain: Grain, mapping: str, bits: int) -> Activation:
    """Return how int8 inputs are rounded: a symmetric scale is absmax over half the range of codes, 127.5."""
    if grain.kind == "row" and grain.sizes[0] != -1:
        raise ConfigError("granularity of inputs: rows are along the last dimension, PerRow(dim=-1)")
    symmetric = mapping == "symmetric"
    top = (2**bits - 1) / 2 if symmetric else None
    granularity: Any = "tensor" if grain.kind == "tensor" else "row"
    return Activation(kind="int8", granularity=granularity, symmetric=symmetric, bits=bits, top=top)


def _intx(data: Mapping[str, Any]) -> Settings:
    return _intx_weight(data, "granularity", "mapping_type", "scale_dtype", Activation())


def _intx_dynamic(data: Mapping[str, Any]) -> Settings:
    _one_of(data, "act_mapping_type", ("asymmetric",))
    inputs = Activation(kind="int8", symmetric=False)
    return _intx_weight(data, "weight_granularity", "weight_mapping_type", "weight_scale_dtype", inputs)


def _intx_weight(data: Mapping[str, Any], grain: str, mapping: str, scale: str, inputs: Activation) -> Settings:
    name = dtype_word(data["weight_dtype"])
    if name not in {f"int{bits}" for bits in range(1, 9)}:
        raise ConfigError(f"weight_dtype={name!r}: it is torch.int1 to torch.int8")
    # Opaque formats say how a CPU kernel lays weights out in memory; a file holds the plain one.
    packing = word(data["intx_packing_format"])
    if packing != "unpacked_to_int8" and not packing.startswith("opaque_"):
        raise ConfigError(f"intx_packing_format={packing!r}: it is unpacked_to_int8")
    dtype = None if data[scale] is None else dtype_word(data[scale])
    if dtype is not None and dtype not in _FLOATS:
        raise ConfigError(f"{scale}={dtype!r}: it is one of {_FLOATS}")
    bits, chosen = int(name[3:]), _one_of(data, mapping, _MAPPINGS)
    if bits == 1 and chosen == "symmetric_no_clipping_err":
        raise ConfigError(f"{mapping}={chosen!r} with one bit: the codes -1 and 0 have no positive side")
    algorithm = _one_of(data, "intx_choose_qparams_algorithm", ("affine", "hqq_scale_only"))
    if algorithm == "hqq_scale_only":
        # Its zeros are 0 whatever the mapping says.
        chosen = "symmetric"
    grains = _grain(data[grain], "group", "axis")
    if grains.kind == "axis" and grains.sizes[0] != 0:
        raise ConfigError(f"{grain}=PerAxis({grains.sizes[0]}): the axis is 0")
    return Settings(
        "intx", grains, bits=bits, mapping=chosen, algorithm=algorithm, scale_dtype=dtype, activation=inputs
    )


def _float8(data: Mapping[str, Any]) -> Settings:
    said = {"kernel_preference": {"_type": "KernelPreference", "_data": "AUTO"}}
    grain = _grain(data["granularity"], "tensor", "row", "group")
    return Settings("float8", grain, format=_float8_format(data, "weight_dtype"), said=json.dumps(said))


def _float8_dynamic(data: Mapping[str, Any]) -> Settings:
    if word(data["packing_format"] or "plain") != "plain":
        raise ConfigError(f"packing_format={word(data['packing_format'])!r}: sparse weights are not offered")
    act, weight = _pair(data["granularity"] or [_TENSOR, _TENSOR], "tensor", "row", "block")
    if act.kind != weight.kind or (act.kind == "block" and (act.sizes[0] != 1)):
        raise ConfigError(
            "granularity: PerTensor or PerRow for inputs and weights alike, or PerBlock([1, 128]) with "
            f"PerBlock([128, 128]), found {act} and {weight}"
        )
    if data["activation_value_lb"] is not None:
        raise ConfigError("activation_value_lb: a smallest input scale is not offered, leave it out")
    limit = data["activation_value_ub"]
    if limit is not None and not (isinstance(limit, (int, float)) and limit > 0):
        raise ConfigError(f"activation_value_ub={limit!r}: it is a number above 0")
    activation = Activation(
        kind="float8",
        granularity={"tensor": "tensor", "row": "row", "block": "group"}[act.kind],  # type: ignore[arg-type]
        group=act.sizes[1] if act.kind == "block" else 0,
        format=_float8_format(data, "activation_dtype"),  # type: ignore[arg-type]
        limit=limit,
    )
    granularity = data["granularity"] or _TENSOR
    said = {
        "mm_config": data["mm_config"], "kernel_preference": data["kernel_preference"],
        "float8_dtype": data["activation_dtype"], "granularity": _first(granularity),
        "hp_value_lb": None, "hp_value_ub": limit,
    }  # fmt: skip
    weights = _float8_format(data, "weight_dtype")
    return Settings("float8", weight, format=weights, activation=activation, said=json.dumps(said))


_TENSOR: Mapping[str, Any] = {"_type": "PerTensor", "_data": {}}


def _float8_format(data: Mapping[str, Any], name: str) -> Any:
    dtype = dtype_word(data[name])
    if dtype not in _FLOAT8:
        raise ConfigError(f"{name}={dtype!r}: it is one of {sorted(_FLOAT8)}")
    return _FLOAT8[dtype]


def _int4(data: Mapping[str, Any]) -> Settings:
    storage: Any = _PACKINGS[_one_of(data, "int4_packing_format", tuple(_PACKINGS))]
    algorithm = _one_of(data, "int4_choose_qparams_algorithm", ("tinygemm", "hqq"))
    if algorithm == "hqq" and storage != "tiles":
        raise ConfigError("int4_choose_qparams_algorithm='hqq' goes with int4_packing_format='tile_packed_to_4d' alone")
    if storage == "tiles" and data["int4_tile_packed_ntile"] != 8:
        raise ConfigError(f"int4_tile_packed_ntile={data['int4_tile_packed_ntile']!r}: tiles of 8 rows are offered")
    return Settings(storage, Grain("group", (_size(data["group_size"]),)), bits=4, algorithm=algorithm)


def _float8_int4(data: Mapping[str, Any]) -> Settings:
    _one_of(data, "int4_packing_format", ("preshuffled", "plain"))
    return Settings("int4", Grain("group", (128,)), bits=4, activation=Activation(kind="float8"))


_READERS: Mapping[str, Callable[[Mapping[str, Any]], Settings]] = {
    "Int8WeightOnlyConfig": _int8,
    "Int8DynamicActivationInt8WeightConfig": _int8_dynamic,
    "IntxWeightOnlyConfig": _intx,
    "Int8DynamicActivationIntxWeightConfig": _intx_dynamic,
    "Float8WeightOnlyConfig": _float8,
    "Float8DynamicActivationFloat8WeightConfig": _float8_dynamic,
    "Int4WeightOnlyConfig": _int4,
    "Float8DynamicActivationInt4WeightConfig": _float8_int4,
}


def _grain(value: Any, *allowed: str) -> Grain:
    """Return which weights share a scale, from a granularity's JSON."""
    kind, data, _ = fields_of(value)
    known = {"PerTensor": "tensor", "PerRow": "row", "PerAxis": "axis", "PerGroup": "group", "PerBlock": "block"}
    name = known.get(kind)
    if name is None or name not in allowed:
        names = [one for one, short in known.items() if short in allowed]
        raise ConfigError(f"granularity {kind}: it is one of {', '.join(names)}")
    if name == "tensor":
        return Grain("tensor")
    if name == "group":
        return Grain("group", (_size(data.get("group_size")),))
    if name == "block":
        sizes = data.get("block_size")
        if not isinstance(sizes, list) or len(sizes) != 2:
            raise ConfigError(f"PerBlock({sizes!r}): it has rows and columns")
        return Grain("block", (_size(sizes[0]), _size(sizes[1])))
    along = data.get("dim", -1) if name == "row" else data.get("axis", 0)
    if type(along) is not int or not -2 <= along <= 1:
        raise ConfigError(f"{kind}({along!r}): a weight has the dimensions 0 and 1 (or -1)")
    return Grain(name, (along,))  # type: ignore[arg-type]


def _pair(value: Any, *allowed: str) -> tuple[Grain, Grain]:
    """Return the granularities of inputs and weights."""
    both = value if isinstance(value, list) else [value, value]
    if len(both) != 2:
        raise ConfigError(f"granularity={value!r}: one for both, or a list of two, inputs and weights")
    return _grain(both[0], *allowed), _grain(both[1], *allowed)


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list) else value


def _size(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ConfigError(f"group_size={value!r}: it is a whole number above 0")
    return value


def _flag(data: Mapping[str, Any], name: str) -> bool:
    if data[name] not in (True, False, None):
        raise ConfigError(f"{name}={data[name]!r}: it is true or false")
    return bool(data[name])


def _one_of(data: Mapping[str, Any], name: str, allowed: tuple[str, ...]) -> str:
    found = word(data[name])
    if found not in allowed:
        raise ConfigError(f"{name}={found!r}: it is one of {', '.join(allowed)}")
    return found
