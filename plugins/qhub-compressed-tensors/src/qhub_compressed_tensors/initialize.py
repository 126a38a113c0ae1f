"""How a CompressedTensorsConfig is made without the compressed-tensors library: as the plain data of a ``config.json``.

transformers' own class holds an object of the library, and refuses to be made without it. One that asks for quantizing
(its status is not said, or "initialized") is filled in: presets become the schemes they stand for, and formats the ones
that upstream would choose.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from qhub.errors import ConfigError
from qhub_compressed_tensors.presets import PRESETS, preset
from qhub_compressed_tensors.scheme import scheme_of

__all__ = ["FIELDS", "METHODS", "stand_in"]

METHOD = "compressed-tensors"

# What to_dict() gives, besides ``quant_method``; ``version`` only where a file had it.
FIELDS = (
    "config_groups", "format", "global_compression_ratio", "ignore", "kv_cache_scheme", "moe_sparsity_config",
    "quantization_status", "sparsity_config", "transform_config",
)  # fmt: skip
# What a config says that nothing was stored under yet.
_FRESH = (None, "initialized")
_UNSAID = (None, "dense", "fakequant", "mixed-precision")


def initialize(
    self: Any,
    config_groups: Mapping[str, Any] | None = None,
    format: str | None = None,
    quantization_status: str | None = None,
    kv_cache_scheme: Any = None,
    global_compression_ratio: float | None = None,
    ignore: list[str] | None = None,
    quant_method: str = METHOD,
    run_compressed: bool | None = None,
    dequantize: bool = False,
    use_optimized_inference: bool = False,
    sparsity_config: Mapping[str, Any] | None = None,
    transform_config: Any = None,
    moe_sparsity_config: Mapping[str, Any] | None = None,
    version: str | None = None,
    **kwargs: Any,
) -> None:
    """Fill in a config from the keys of upstream's QuantizationConfig, as plain data or as its objects.

    ``config_groups``: by name, each a scheme or, under a preset's name, a list of targets. ``ignore``: None stands for
    the output head. ``dequantize``: hold a stored model's weights dense. Raises :class:`ConfigError` on a group that
    cannot be.
    """
    from transformers.utils.quantization_config import QuantizationMethod

    if kwargs:
        warnings.warn(f"CompressedTensorsConfig ignores {', '.join(sorted(kwargs))}", stacklevel=2)
    self.config_groups = None if config_groups is None else _plain(config_groups)
    self.format = _plain(format)
    self.quantization_status = _plain(quantization_status)
    self.kv_cache_scheme = _plain(kv_cache_scheme)
    self.global_compression_ratio = global_compression_ratio
    self.ignore = None if ignore is None else list(ignore) if isinstance(ignore, (list, tuple)) else ignore
    self.moe_sparsity_config = _plain(moe_sparsity_config)
    self.sparsity_config = {} if sparsity_config is None else _plain(sparsity_config)
    self.transform_config = {} if transform_config is None else _plain(transform_config)
    self.version = version
    self.dequantize = bool(dequantize) or run_compressed is False
    self.use_optimized_inference = use_optimized_inference
    self.quant_method = QuantizationMethod.COMPRESSED_TENSORS
    if isinstance(self.config_groups, dict):
        self.config_groups = {name: _expanded(name, group) for name, group in self.config_groups.items()}
        if self.quantization_status in _FRESH:
            _fill_in(self)


def _plain(value: Any) -> Any:
    """Return plain data for what may be an object of the library, an enumeration among it."""
    if hasattr(value, "model_dump"):
        value = value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, str):
        return str(getattr(value, "value", value))
    return copy.deepcopy(value)


def _expanded(name: str, group: Any) -> Any:
    """Return the scheme that a list of targets under a preset's name stands for; anything else as it is."""
    if not isinstance(group, list):
        return group
    found = preset(name, group)
    if found is None:
        raise ConfigError(
            f"config_groups[{name!r}] of a compressed-tensors config is a list of targets, so its name is a preset's: "
            f"one of {sorted(PRESETS)}"
        )
    return found


def _fill_in(self: Any) -> None:
    """Write into a config that asks for quantizing what the files will be."""
    outer = None if self.format in _UNSAID else self.format
    formats = set()
    for name, group in self.config_groups.items():
        scheme = scheme_of(name, group, outer or "mixed-precision")
        if scheme is not None:
            group["format"] = scheme.format
            formats.add(scheme.format)
    if formats:
        self.format = formats.pop() if len(formats) == 1 else "mixed-precision"
        self.quantization_status = "compressed"


def to_dict(self: Any) -> dict[str, Any]:
    """Return the config as ``config.json`` holds it."""
    values = {name: copy.deepcopy(getattr(self, name)) for name in FIELDS}
    if self.version is not None:
        values["version"] = self.version
    return {"quant_method": METHOD, **values}


def to_diff_dict(self: Any) -> dict[str, Any]:
    """Return what is not empty, with ``quant_method``."""
    return {name: value for name, value in self.to_dict().items() if value not in (None, {}, [])}


def get_loading_attributes(self: Any) -> dict[str, Any]:
    """Return what may be changed when a stored model is loaded."""
    return {"dequantize": self.dequantize, "use_optimized_inference": self.use_optimized_inference}


def post_init(self: Any) -> None:
    """Do nothing: what transformers' own method looks at is an object of the library."""


def _weights(self: Any) -> list[Mapping[str, Any]]:
    groups = (self.config_groups or {}).values()
    return [group["weights"] for group in groups if isinstance(group, Mapping) and group.get("weights")]


METHODS: dict[str, Any] = {
    "__init__": initialize,
    "to_dict": to_dict,
    "to_diff_dict": to_diff_dict,
    "get_loading_attributes": get_loading_attributes,
    "post_init": post_init,
    "is_quantized": property(lambda self: bool(self.config_groups)),
    "is_quantization_compressed": property(
        lambda self: bool(self.config_groups) and self.quantization_status == "compressed"
    ),
    "has_fp8_modules": property(
        lambda self: any((one.get("type"), one.get("num_bits")) == ("float", 8) for one in _weights(self))
    ),
}


def stand_in(module: ModuleType) -> None:
    """Let ``module.CompressedTensorsConfig`` be made, and hold plain data, without the compressed-tensors library.

    ``module``: ``transformers.utils.quantization_config``. The class stays itself, its methods are replaced.
    """
    for name, method in METHODS.items():
        setattr(module.CompressedTensorsConfig, name, method)
