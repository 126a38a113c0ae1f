"""transformers' HqqConfig: what it may hold, and how it is made where the hqq package is not installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

from qhub.config import ConfigSpec
from qhub.errors import ConfigError
from qhub_hqq.initialize import initialize
from qhub_hqq.settings import disagreement, ignore, is_per_layer, settings_of

if TYPE_CHECKING:
    from qhub.reports import Finding

__all__ = ["check", "findings", "from_options", "spec", "stand_in"]


def spec() -> ConfigSpec:
    """Return the description of HqqConfig, for files (``quant_config``) and for arguments (``nbits``, ...)."""
    return ConfigSpec(
        cls="qhub_hqq.hqq_config:HqqConfig",
        keys=frozenset({"quant_config"}),
        check=check,
        skip="skip_modules",
        presets={
            "4bit": {"nbits": 4, "group_size": 64},
            "3bit": {"nbits": 3, "group_size": 64},
            "8bit": {"nbits": 8, "group_size": 64},
            "2bit": {"nbits": 2, "group_size": 32},
        },
        from_options=from_options,
    )


def from_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of HqqConfig for command-line ``options``: bits are ``nbits``, a group of -1 is None."""
    values = {("nbits" if name == "bits" else name): value for name, value in options.items()}
    if values.get("group_size") == -1:
        values["group_size"] = None
    return values


def check(config: Any) -> None:
    """Raise :class:`ConfigError` on an unknown key or an impossible value of an HqqConfig."""
    settings = settings_of(config)
    clash = disagreement(settings.values())
    if clash is not None:
        raise ConfigError(
            f"two layers of an hqq config have the same nbits, group_size and axis and differ otherwise: {clash[0]} "
            f"and {clash[1]}. Give them the same optimize, round_zero and view_as_float"
        )
    skip = config.skip_modules
    if skip is not None and not (isinstance(skip, (list, tuple)) and all(isinstance(name, str) for name in skip)):
        raise ConfigError(f"skip_modules={skip!r} of an hqq config: it is a list of module names")
    layers = config.quant_config.values() if is_per_layer(config.quant_config) else [config.quant_config]
    given_up = ("scale_quant_params", "zero_quant_params", "offload_meta")
    if any(layer.get(name) for layer in layers for name in given_up):
        ignore(name for name in given_up if any(layer.get(name) for layer in layers))


def stand_in(module: ModuleType) -> None:
    """Let ``module.HqqConfig`` be made without the hqq package; does nothing where that is installed.

    ``module``: ``transformers.utils.quantization_config``. The class stays itself, its ``__init__`` is replaced.
    """
    if importlib.util.find_spec("hqq") is None:
        module.HqqConfig.__init__ = initialize


def findings() -> list[Finding]:
    """Return what ``qhub doctor`` says of HQQ."""
    from qhub.reports import Finding

    if importlib.util.find_spec("hqq") is None:
        message = "quantizes, loads and saves without the hqq package; the written files are ones that hqq reads"
    else:
        message = "the hqq package is installed too; qhub does not use it"
    return [Finding("ok", "hqq", message)]
