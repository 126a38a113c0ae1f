"""transformers' FineGrainedFP8Config: which keys and values it may hold, and what it asks of the calibration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qhub.config import ConfigSpec
from qhub.errors import ConfigError
from qhub_fp8.initialize import KNOWN_KEYS, OTHER_KEYS
from qhub_fp8.settings import settings_of

if TYPE_CHECKING:
    from qhub.calibration import CalibrationOptions
    from qhub.reports import Finding

__all__ = ["calibration", "check", "check_names", "findings", "from_options", "spec"]


def spec() -> ConfigSpec:
    """Return the description of FineGrainedFP8Config, for every key that its files hold."""
    return ConfigSpec(
        cls="transformers:FineGrainedFP8Config",
        keys=KNOWN_KEYS | OTHER_KEYS,
        check=check,
        skip="modules_to_not_convert",
        presets={
            "block128": {"weight_block_size": [128, 128]},
            "tensor": {"weight_block_size": None},
            "static": {"weight_block_size": None, "activation_scheme": "static"},
            "weight-only": {"weight_block_size": [128, 128], "activation_scheme": "none"},
        },
        from_options=from_options,
    )


def from_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of FineGrainedFP8Config for command-line ``options``: ``group_size`` is a square block, -1
    one scale per tensor; 8 ``bits`` are understood."""
    values = dict(options)
    if values.pop("bits", 8) != 8:
        raise ConfigError(f"bits={options['bits']} of an fp8 config: its floats have 8")
    if "group_size" in values:
        size = values.pop("group_size")
        values["weight_block_size"] = None if size == -1 else [size, size]
    return values


def check(config: Any) -> None:
    """Raise :class:`ConfigError` on a value that no layout has."""
    settings_of(config)
    check_names("fp8", "modules_to_not_convert", config.modules_to_not_convert)
    wanted = getattr(config, "modules_to_convert", None)
    check_names("fp8", "modules_to_convert", wanted)
    if wanted:
        raise ConfigError(
            f"modules_to_convert={wanted!r} of an fp8 config: this plugin stores linear layers and experts in 8 bits, "
            "and no embeddings. Load with QHUB_NATIVE=fp8 to have transformers do it"
        )


def check_names(method: str, name: str, value: Any) -> None:
    """Raise :class:`ConfigError` unless ``value`` is None or a list of names."""
    if value is not None and not (isinstance(value, (list, tuple)) and all(isinstance(one, str) for one in value)):
        raise ConfigError(f"{name}={value!r} of a config of {method}: it is a list of module names")


def calibration(config: Any) -> CalibrationOptions:
    """Return the data that static input scales are found with; None in the config: text that the model writes."""
    from qhub.calibration import CalibrationOptions

    return CalibrationOptions(data=getattr(config, "dataset", None), tokenizer=getattr(config, "tokenizer", None))


def findings() -> list[Finding]:
    """Return what ``qhub doctor`` says of float8."""
    import torch

    from qhub.reports import Finding

    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9):
        message = "products of E4M3 by rows and by tensors run on this GPU's 8-bit units; others are dequantized"
    else:
        message = "quantizes, loads, runs and saves; products in 8 bits are emulated exactly (no GPU with 8-bit units)"
    return [Finding("ok", "fp8", message)]
