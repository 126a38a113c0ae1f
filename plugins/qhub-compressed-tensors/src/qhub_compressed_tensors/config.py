"""Which keys and values a compressed-tensors config may hold, and the schemes it asks for."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qhub.config import ConfigSpec
from qhub.errors import ConfigError
from qhub_compressed_tensors.presets import PRESETS, preset
from qhub_compressed_tensors.scheme import FORMATS, Scheme, check_patterns, numbers_of, scheme_of

if TYPE_CHECKING:
    from qhub.reports import Finding

__all__ = ["check", "findings", "from_options", "schemes_of", "spec"]

# What upstream names and this plugin does not quantize to by itself stays out; it can be written out in config_groups.
_SHOWN = (
    "W4A16", "W4A16_ASYM", "W8A16", "W8A8", "FP8_DYNAMIC", "FP8", "FP8_BLOCK", "NVFP4A16", "NVFP4", "MXFP4A16", "MXFP4",
    "W3A16", "W2A16", "MXFP8",
)  # fmt: skip
_STATUSES = (None, "initialized", "calibration", "frozen", "compressed", "decompressed")


def spec() -> ConfigSpec:
    """Return the description of transformers' CompressedTensorsConfig."""
    from qhub_compressed_tensors.record import record

    return ConfigSpec(
        cls="qhub_compressed_tensors.ct_config:CompressedTensorsConfig",
        check=check,
        skip="ignore",
        always_default_skip=True,
        head="targets_head",
        embeddings="targets_embeddings",
        presets={name: {"config_groups": {"group_0": preset(name, ["Linear"])}} for name in _SHOWN},
        from_options=from_options,
        record=record,
    )


def from_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return config values for command-line ``options``: ``scheme`` (a preset), ``bits``, ``group_size``, ``symmetric``
    (integers without rounded inputs); the rest as it is.

    Raises :class:`ConfigError` for a preset that there is not.
    """
    values = dict(options)
    scheme = values.pop("scheme", None)
    changes = {
        key: values.pop(name)
        for name, key in (("bits", "num_bits"), ("group_size", "group_size"), ("symmetric", "symmetric"))
        if name in values
    }
    groups = values.get("config_groups") or {}
    if scheme is None and not changes:
        return values
    if scheme is None and len(groups) == 1:
        (name, group), = groups.items()  # fmt: skip
    else:
        name, group = "group_0", preset(scheme or "W4A16", ["Linear"])
    if group is None:
        raise ConfigError(f"scheme={scheme!r} of a compressed-tensors config: it is one of {sorted(PRESETS)}")
    weights = {**group["weights"], **changes}
    if changes and weights.get("type") == "int":
        whole = weights.get("group_size") in (None, -1)
        weights |= {"group_size": None if whole else weights["group_size"], "strategy": "channel" if whole else "group"}
    return {**values, "config_groups": {name: {**group, "weights": weights}}}


def check(config: Any) -> None:
    """Raise :class:`ConfigError` on a value that this plugin cannot read or write a checkpoint with."""
    where = "of a compressed-tensors config"
    if not isinstance(config.config_groups, Mapping) or not config.config_groups:
        raise ConfigError(
            f"config_groups={config.config_groups!r} {where}: it is a dictionary of at least one scheme, such as "
            "{'W4A16': ['Linear']}"
        )
    if config.quantization_status not in _STATUSES:
        raise ConfigError(f"quantization_status={config.quantization_status!r} {where}: it is one of {_STATUSES}")
    if config.format is not None and not isinstance(config.format, str):
        raise ConfigError(f"format={config.format!r} {where}: it is one of {FORMATS}")
    ignore = config.ignore
    if ignore is not None:
        if not isinstance(ignore, (list, tuple)):
            raise ConfigError(f"ignore={ignore!r} {where}: it is a list of names, classes or 're:' expressions")
        check_patterns(ignore, f"ignore {where}")
    sparsity = config.sparsity_config
    if sparsity and (not isinstance(sparsity, Mapping) or sparsity.get("format", "dense") != "dense"):
        raise ConfigError(f"sparsity_config={sparsity!r} {where}: compressed-tensors gave sparse formats up, and this "
                          "plugin reads dense ones only")  # fmt: skip
    transforms = config.transform_config
    if transforms and (not isinstance(transforms, Mapping) or transforms.get("config_groups")):
        raise ConfigError(f"transform_config={transforms!r} {where}: rotations while running (SpinQuant, QuIP) are not "
                          "applied here, and without them the weights mean something else")  # fmt: skip
    if config.moe_sparsity_config:
        raise ConfigError(
            f"moe_sparsity_config={config.moe_sparsity_config!r} {where}: pruned experts are unknown here"
        )
    if config.kv_cache_scheme is not None:
        numbers_of({k: v for k, v in config.kv_cache_scheme.items() if k != "strategy"}
                   if isinstance(config.kv_cache_scheme, Mapping) else config.kv_cache_scheme,
                   f"kv_cache_scheme {where}")  # fmt: skip
    if not schemes_of(config):
        raise ConfigError(f"config_groups={config.config_groups!r} {where}: none of them quantizes weights")


def schemes_of(config: Any) -> Sequence[Scheme]:
    """Return the schemes of ``config``; raises :class:`ConfigError` on one that cannot be."""
    outer = "mixed-precision" if config.format in (None, "fakequant") else config.format
    found = (scheme_of(str(name), group, outer) for name, group in config.config_groups.items())
    return [scheme for scheme in found if scheme is not None]


def findings() -> Iterable[Finding]:
    """Return what ``qhub doctor`` says of compressed-tensors."""
    from qhub.reports import Finding

    if importlib.util.find_spec("compressed_tensors") is None:
        message = "quantizes, loads and saves without the compressed-tensors library; it and vLLM read what is written"
    else:
        message = "the compressed-tensors library is installed too; qhub does not use it"
    return [Finding("ok", "compressed-tensors", message)]
