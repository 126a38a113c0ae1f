"""What a config says of numbers: how wide they are, what shares a scale, which modules are meant, which format it is.

Source: compressed-tensors 0.20, ``QuantizationArgs`` and ``QuantizationScheme`` (compressed_tensors/quantization/
quant_args.py, quant_scheme.py): keys, allowed values, and what an absent key stands for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from qhub.errors import ConfigError

__all__ = ["FORMATS", "Numbers", "Scheme", "numbers_of", "scheme_of"]

FORMATS = (
    "dense", "float-quantized", "int-quantized", "mxfp4-pack-quantized", "mxfp6-pack-quantized", "mxfp8-quantized",
    "naive-quantized", "nvfp4-pack-quantized", "pack-quantized",
)  # fmt: skip
_LEGACY = ("marlin-24", "sparse-24-bitmask", "sparse-bitmask")

Strategy = Literal["tensor", "channel", "group", "block", "token", "tensor_group"]

_STRATEGIES = ("tensor", "channel", "group", "block", "token", "tensor_group")
# Steer how numbers are found, or say in another way what the tensors show by themselves.
_IGNORED = frozenset({"observer", "observer_kwargs", "zp_dtype"})
_KEYS = _IGNORED | {
    "actorder", "block_structure", "dynamic", "group_size", "num_bits", "scale_dtype", "strategy", "symmetric", "type",
}  # fmt: skip


@dataclass(frozen=True)
class Numbers:
    """Says how weights or inputs are stored.

    ``bits``, ``type``: ``"int"`` or ``"float"`` (8 bits: E4M3, 6: E2M3, 4: E2M1). ``strategy``: what shares a scale.
    ``group``: inputs of a group; 0 where there are none. ``block``: rows and columns of a block, or None. ``dynamic``:
    found while running; ``"local"``: but for one global scale. ``ordered``: features are assigned to groups by
    ``weight_g_idx``. ``powers``: scales are powers of two, stored as their exponents (E8M0).
    """

    bits: int = 8
    type: Literal["int", "float"] = "int"
    symmetric: bool = True
    strategy: Strategy = "tensor"
    group: int = 0
    block: tuple[int, int] | None = None
    dynamic: bool | Literal["local"] = False
    ordered: bool = False
    powers: bool = False


@dataclass(frozen=True)
class Scheme:
    """Is one entry of ``config_groups``. ``inputs``: None where they are left alone. ``format``: one of FORMATS."""

    name: str
    targets: tuple[str, ...]
    weights: Numbers
    inputs: Numbers | None
    format: str


def scheme_of(name: str, values: Mapping[str, Any], outer: str) -> Scheme | None:
    """Return the scheme that the group ``name`` describes; None for one that quantizes no weights or inputs.

    ``outer``: the config's own ``format``. Raises :class:`ConfigError` on unknown keys and impossible values.
    """
    where = f"config_groups[{name!r}] of a compressed-tensors config"
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: it is a dictionary, found {values!r}")
    unknown = sorted(set(values) - {"targets", "weights", "input_activations", "output_activations", "format"})
    if unknown:
        raise ConfigError(f"{where}: unknown keys {unknown}; correct the spelling, or update the plugin")
    targets = _targets(values.get("targets"), where)
    if values.get("output_activations") is not None:
        raise ConfigError(f"{where}: output_activations={values['output_activations']!r}: outputs are left alone here")
    given, inputs = values.get("weights"), values.get("input_activations")
    if given is None and inputs is None:
        return None
    if given is None:
        raise ConfigError(f"{where}: weights=None with input_activations: this plugin quantizes inputs of quantized "
                          "weights only")  # fmt: skip
    weights = numbers_of(given, f"{where}, weights")
    _check_weights(weights, f"{where}, weights")
    held = None if inputs is None else numbers_of(inputs, f"{where}, input_activations")
    if held is not None:
        _check_inputs(held, f"{where}, input_activations")
    fmt = values.get("format") or (None if outer == "mixed-precision" else outer) or inferred_format(weights, held)
    _check_format(fmt, weights, where)
    return Scheme(name, targets, weights, held, fmt)


def numbers_of(values: Any, where: str) -> Numbers:
    """Return what ``values``, the keys of upstream's QuantizationArgs, say; raises :class:`ConfigError`."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: it is a dictionary, found {values!r}")
    unknown = sorted(set(values) - _KEYS)
    if unknown:
        raise ConfigError(f"{where}: unknown keys {unknown}; correct the spelling, or update the plugin")
    kind: Any
    bits, kind, group = values.get("num_bits", 8), values.get("type", "int"), values.get("group_size")
    kind = kind.lower() if isinstance(kind, str) else kind
    if kind not in ("int", "float"):
        raise ConfigError(f"{where}: type={kind!r}, it is 'int' or 'float'")
    widths = range(1, 9) if kind == "int" else (4, 6, 8)
    if type(bits) is not int or bits not in widths:
        raise ConfigError(f"{where}: num_bits={bits!r}, with type={kind!r} it is one of {list(widths)}")
    if group is not None and (type(group) is not int or (group != -1 and group < 1)):
        raise ConfigError(f"{where}: group_size={group!r}, it is at least 1, or -1 for whole rows")
    block = _block(values.get("block_structure"), where)
    strategy = _strategy(values.get("strategy"), group, where)
    if (strategy == "block") != (block is not None):
        raise ConfigError(f"{where}: strategy={strategy!r} with block_structure={values.get('block_structure')!r}: one "
                          "needs the other")  # fmt: skip
    grouped = strategy in ("group", "tensor_group")
    if grouped != (group is not None and group > 0):
        raise ConfigError(f"{where}: strategy={strategy!r} with group_size={group!r}: groups have a size, and nothing "
                          "else has")  # fmt: skip
    symmetric, dynamic = values.get("symmetric", True), values.get("dynamic", False)
    if not isinstance(symmetric, bool):
        raise ConfigError(f"{where}: symmetric={symmetric!r}, it is true or false")
    if not symmetric and kind == "float":
        raise ConfigError(f"{where}: symmetric=False with type='float': float codes have no zero point")
    if not (isinstance(dynamic, bool) or (dynamic == "local" and strategy == "tensor_group")):
        raise ConfigError(f"{where}: dynamic={dynamic!r}, it is true or false (or 'local' for strategy='tensor_group')")
    powers = _powers(values.get("scale_dtype"), kind, bits, strategy, group, where)
    return Numbers(
        bits, kind, symmetric, strategy, group if grouped and group is not None else 0, block, dynamic,
        _ordered(values.get("actorder"), where), powers,
    )  # fmt: skip


def inferred_format(weights: Numbers, inputs: Numbers | None) -> str:
    """Return the format that upstream chooses where none is named (compressed_tensors/compressors/format.py)."""
    if weights.type == "float" and weights.bits < 8:
        return {16: "nvfp4-pack-quantized"}.get(weights.group, f"mxfp{weights.bits}-pack-quantized")
    if weights.type == "float":
        return "mxfp8-quantized" if weights.powers else "float-quantized" if inputs else "naive-quantized"
    return "int-quantized" if inputs else "pack-quantized"


def _targets(targets: Any, where: str) -> tuple[str, ...]:
    if not isinstance(targets, Sequence) or isinstance(targets, str) or not targets:
        raise ConfigError(f"{where}: targets={targets!r}, it is a list of names, classes or 're:' expressions")
    check_patterns(targets, f"{where}: targets")
    return tuple(targets)


def check_patterns(patterns: Any, where: str) -> None:
    """Raise :class:`ConfigError` unless ``patterns`` are names and valid ``re:`` expressions."""
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise ConfigError(f"{where}: {pattern!r} is no name")
        if pattern.startswith("re:"):
            try:
                re.compile(pattern[3:])
            except re.error as error:
                raise ConfigError(f"{where}: {pattern!r} is no regular expression: {error}") from error


def _strategy(strategy: Any, group: int | None, where: str) -> Strategy:
    if strategy is None:
        return "tensor" if group is None else "channel" if group == -1 else "group"
    name: Any = strategy.lower() if isinstance(strategy, str) else strategy
    if name not in _STRATEGIES:
        raise ConfigError(f"{where}: strategy={strategy!r}, it is one of {_STRATEGIES}")
    return name


def _block(value: Any, where: str) -> tuple[int, int] | None:
    if value is None:
        return None
    sizes = value.split("x") if isinstance(value, str) else value
    try:
        rows, columns = (int(size) if isinstance(size, str) else size for size in sizes)
    except (TypeError, ValueError):
        rows = columns = 0
    if not all(type(size) is int and size > 0 for size in (rows, columns)):
        raise ConfigError(f"{where}: block_structure={value!r}, it is [rows, columns], both at least 1")
    return rows, columns


def _ordered(value: Any, where: str) -> bool:
    # "weight" and "static" order features while calibrating and leave no trace in the file.
    if value in (None, False, "weight", "static"):
        return False
    if value in (True, "group", "dynamic"):
        return True
    raise ConfigError(f"{where}: actorder={value!r}, it is 'group', 'weight' or None")


def _powers(dtype: Any, kind: str, bits: int, strategy: str, group: int | None, where: str) -> bool:
    name = str(dtype).removeprefix("torch.")
    if dtype is not None and name not in ("uint8", "float8_e4m3fn", "float32", "float16", "bfloat16"):
        raise ConfigError(f"{where}: scale_dtype={dtype!r}: scales are uint8 (exponents), float8_e4m3fn or floats")
    if name == "uint8" and not (kind == "float" and strategy == "group" and group == 32):
        raise ConfigError(f"{where}: scale_dtype={dtype!r} is for floats in groups of 32")
    # Older files of 4-bit floats in groups of 32 do not name it.
    return name == "uint8" or (kind == "float" and bits in (4, 6) and strategy == "group")


def _check_weights(weights: Numbers, where: str) -> None:
    if weights.strategy == "token" or weights.dynamic:
        raise ConfigError(f"{where}: strategy={weights.strategy!r}, dynamic={weights.dynamic!r}: weights are static, "
                          "and have no tokens")  # fmt: skip
    if weights.type == "float" and weights.bits < 8:
        wanted = ("tensor_group", 16) if weights.bits == 4 and weights.strategy == "tensor_group" else ("group", 32)
        if (weights.strategy, weights.group) != wanted:
            raise ConfigError(
                f"{where}: num_bits={weights.bits} of type 'float' with strategy={weights.strategy!r} and "
                f"group_size={weights.group}: NVFP4 has strategy 'tensor_group' and 16, MXFP4 and MXFP6 'group' and 32"
            )
    elif weights.strategy == "tensor_group":
        raise ConfigError(f"{where}: strategy='tensor_group' is for 4-bit floats")
    if weights.ordered and (weights.strategy != "group" or weights.type != "int"):
        raise ConfigError(f"{where}: actorder='group' is for integers with strategy='group'")


def _check_inputs(inputs: Numbers, where: str) -> None:
    if inputs.strategy in ("channel", "block"):
        raise ConfigError(f"{where}: strategy={inputs.strategy!r}: inputs have 'tensor', 'token', 'group' or "
                          "'tensor_group'")  # fmt: skip
    if inputs.ordered:
        raise ConfigError(f"{where}: actorder is for weights")
    if inputs.bits == 6 or (inputs.type == "int" and inputs.bits < 2):
        raise ConfigError(f"{where}: num_bits={inputs.bits}: inputs are rounded to integers of 2 to 8 bits, or to "
                          "floats of 8 or 4")  # fmt: skip
    four = inputs.type == "float" and inputs.bits == 4
    local = (inputs.strategy, inputs.group, inputs.dynamic) == ("tensor_group", 16, "local")
    if inputs.strategy == "tensor_group" and not (four and local):
        raise ConfigError(f"{where}: strategy='tensor_group' is for 4-bit floats in groups of 16 with dynamic='local'")
    if four and not local and not (inputs.powers and inputs.dynamic is True):
        raise ConfigError(f"{where}: 4-bit floats have groups of 16 with dynamic='local', or of 32 with dynamic=True")
    if not inputs.dynamic and inputs.strategy != "tensor":
        raise ConfigError(f"{where}: strategy={inputs.strategy!r} with dynamic=False: a stored scale is one per tensor")


def _check_format(fmt: Any, weights: Numbers, where: str) -> None:
    if fmt in _LEGACY:
        raise ConfigError(f"{where}: format={fmt!r} is sparse; compressed-tensors gave it up, and this plugin reads "
                          "dense matrices only")  # fmt: skip
    if fmt not in FORMATS:
        raise ConfigError(f"{where}: format={fmt!r}, it is one of {FORMATS}")
    kinds = {
        "pack-quantized": weights.type == "int",
        "int-quantized": weights.type == "int",
        "float-quantized": weights.type == "float" and weights.bits == 8 and not weights.powers,
        "mxfp8-quantized": weights.type == "float" and weights.bits == 8 and weights.powers,
        "nvfp4-pack-quantized": weights.type == "float" and weights.bits == 4 and weights.group == 16,
        "mxfp4-pack-quantized": weights.type == "float" and weights.bits == 4 and weights.group == 32,
        "mxfp6-pack-quantized": weights.type == "float" and weights.bits == 6,
        "naive-quantized": weights.bits == 8 or weights.type == "int",
    }
    if not kinds.get(fmt, True):
        raise ConfigError(f"{where}: format={fmt!r} does not hold weights of {weights.bits} bits, type "
                          f"{weights.type!r}, groups of {weights.group}")  # fmt: skip
    if weights.ordered and fmt != "pack-quantized":
        raise ConfigError(f"{where}: actorder='group' is for format='pack-quantized', found {fmt!r}")
