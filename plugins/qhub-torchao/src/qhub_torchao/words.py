"""torchao's JSON: ``{"_type": class, "_version": number, "_data": fields}``, to and from, without importing torchao.

Source: torchao 0.18, ``torchao/core/config.py`` (``ConfigJSONEncoder``), for what a ``config.json`` holds, and
``torchao/prototype/safetensors/safetensors_utils.py`` for the headers of files, which leave the version out.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any

from qhub.errors import ConfigError

__all__ = ["dtype_word", "encoded", "fields_of", "group", "named", "of_torchao", "per_row", "per_tensor", "word"]


def of_torchao(value: Any) -> bool:
    """Return whether ``value`` is an object of the torchao package."""
    return type(value).__module__.partition(".")[0] == "torchao"


def encoded(value: Any) -> Any:
    """Return ``value``, a config object of torchao's or what such an object holds, as torchao writes it to JSON.

    Raises :class:`ConfigError` for what has no JSON form (tensors of static activation scales).
    """
    import torch

    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, enum.Enum):
        return {"_type": type(value).__name__, "_data": value.name}
    if isinstance(value, str):
        return value
    if isinstance(value, torch.dtype):
        return named("torch.dtype", str(value).removeprefix("torch."), None)
    if hasattr(value, "_asdict"):
        return named(type(value).__name__, {k: encoded(v) for k, v in value._asdict().items()})
    if isinstance(value, Mapping):
        return {str(key): encoded(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [encoded(one) for one in value]
    if of_torchao(value):
        held = vars(value) if not dataclasses.is_dataclass(value) else _held(value)
        data = {k: encoded(v) for k, v in held.items() if not k.startswith("_") and k != "version"}
        return named(type(value).__name__, data, getattr(value, "version", 1))
    raise ConfigError(f"a torchao config holds {value!r} of type {type(value).__name__}, which no config.json can hold")


def _held(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def named(kind: str, data: Any, version: int | None = 1) -> dict[str, Any]:
    """Return the JSON of one object; ``version``: None leaves it out."""
    return {"_type": kind, "_data": data} if version is None else {"_type": kind, "_version": version, "_data": data}


def per_row() -> dict[str, Any]:
    """Return ``PerRow()``."""
    return named("PerRow", {"dim": -1})


def per_tensor() -> dict[str, Any]:
    """Return ``PerTensor()``."""
    return named("PerTensor", {})


def group(size: int) -> dict[str, Any]:
    """Return ``PerGroup(size)``."""
    return named("PerGroup", {"group_size": size})


def word(value: Any) -> str:
    """Return the small letters of an enumeration's member, given as its JSON or as a plain string."""
    if isinstance(value, Mapping):
        value = value.get("_data")
    if not isinstance(value, str):
        raise ConfigError(f"{value!r} in quant_type of a torchao config: expected a word")
    return value.lower()


def dtype_word(value: Any) -> str:
    """Return ``int4`` for torch.int4, given as its JSON or as a string."""
    return word(value).removeprefix("torch.")


def fields_of(value: Any) -> tuple[str, dict[str, Any], int]:
    """Return type, fields and version of an object's JSON; raises :class:`ConfigError` for anything else."""
    if not isinstance(value, Mapping) or not isinstance(value.get("_type"), str):
        raise ConfigError(
            f"{value!r} in quant_type of a torchao config: expected what torchao writes for an object, "
            '{"_type": name, "_version": number, "_data": fields}'
        )
    data, version = value.get("_data", {}), value.get("_version", 1)
    surplus = sorted(set(value) - {"_type", "_data", "_version"})
    if surplus or not isinstance(data, Mapping) or type(version) is not int:
        raise ConfigError(
            f"{value!r} in quant_type of a torchao config: expected _type, _version (a number) and _data (fields)"
        )
    return value["_type"], dict(data), version
