"""Which values of transformers' BitsAndBytesConfig this plugin offers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from qhub.config import ConfigSpec
from qhub.errors import ConfigError
from qhub_bitsandbytes.layout import BLOCK_SIZE
from qhub_bitsandbytes.tables import QUANT_TYPES

__all__ = ["COMPUTE_DTYPES", "STORAGE_DTYPES", "check", "from_options", "spec"]

COMPUTE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
STORAGE_DTYPES = (torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.float64)


def spec() -> ConfigSpec:
    """Describe ``transformers.BitsAndBytesConfig``, taken as it is."""
    return ConfigSpec(
        cls="transformers:BitsAndBytesConfig",
        # The class writes these two besides its parameters.
        keys=frozenset({"_load_in_4bit", "_load_in_8bit"}),
        check=check,
        skip="llm_int8_skip_modules",
        offload_skip="llm_int8_enable_fp32_cpu_offload",
        prefers_accelerator=True,
        presets={
            "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
            "nf4-nested": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
            "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
            "int8": {"load_in_8bit": True},
        },
        from_options=from_options,
    )


def from_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return config values for command-line ``options``: ``bits`` 4 (NF4) or 8; other keys are the config's own.

    Raises :class:`ConfigError` for other widths, and for a ``group_size`` other than the 64 of the 4-bit formats.
    """
    values = dict(options)
    bits, group_size = values.pop("bits", None), values.pop("group_size", None)
    if bits not in (None, 4, 8):
        raise ConfigError(f"bits={bits}: bitsandbytes stores 4 or 8 bits")
    if group_size is not None and (bits == 8 or group_size != BLOCK_SIZE):
        raise ConfigError(
            f"group_size={group_size}: bitsandbytes has blocks of {BLOCK_SIZE} weights in 4 bits, and whole rows in 8"
        )
    if bits == 8:
        return {"load_in_8bit": True, **values}
    return values if bits is None else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", **values}


def check(config: Any) -> None:
    """Raise :class:`ConfigError` if ``config`` asks for what this plugin, or bitsandbytes, cannot do."""
    if config.load_in_8bit:
        _check_int8(config)
    elif config.load_in_4bit:
        _check_blockwise(config)
    else:
        raise ConfigError("BitsAndBytesConfig says load_in_8bit=False and load_in_4bit=False: set one of them to True")


def _check_int8(config: Any) -> None:
    threshold = config.llm_int8_threshold
    if not math.isfinite(threshold) or threshold < 0:
        raise ConfigError(
            f"llm_int8_threshold={threshold}: expected a magnitude from which inputs count as outliers (6.0 is usual), "
            "or 0.0 for no outliers"
        )
    if config.llm_int8_has_fp16_weight:
        raise ConfigError(
            "llm_int8_has_fp16_weight=True keeps 16-bit weights and quantizes them in every forward, so nothing "
            "would be stored quantized: leave it False, or let the bitsandbytes package do it "
            "(QHUB_NATIVE=bitsandbytes)"
        )


def _check_blockwise(config: Any) -> None:
    if config.bnb_4bit_quant_type not in QUANT_TYPES:
        raise ConfigError(
            f"bnb_4bit_quant_type={config.bnb_4bit_quant_type!r}: bitsandbytes stores one of {list(QUANT_TYPES)}"
        )
    for key, known in (("bnb_4bit_compute_dtype", COMPUTE_DTYPES), ("bnb_4bit_quant_storage", STORAGE_DTYPES)):
        found = getattr(config, key)
        if found not in known:
            raise ConfigError(
                f"{key}={found}: expected one of {[str(dtype).removeprefix('torch.') for dtype in known]}"
            )
