"""Which values of transformers' BitsAndBytesConfig this plugin offers."""

from __future__ import annotations

import math
from typing import Any

import torch

from qhub.config import ConfigSpec
from qhub.errors import ConfigError
from qhub_bitsandbytes.layout import STATE_DTYPES
from qhub_bitsandbytes.tables import QUANT_TYPES

__all__ = ["STORAGE_DTYPES", "check", "spec"]

STORAGE_DTYPES = (torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.float64)


def spec() -> ConfigSpec:
    """Describe ``transformers.BitsAndBytesConfig``, taken as it is."""
    return ConfigSpec(
        cls="transformers:BitsAndBytesConfig",
        # The class writes these two besides its parameters.
        keys=frozenset({"_load_in_4bit", "_load_in_8bit"}),
        check=check,
        skip="llm_int8_skip_modules",
    )


def check(config: Any) -> None:
    """Raise :class:`ConfigError` if ``config`` asks for what this plugin, or bitsandbytes, cannot do."""
    if config.load_in_8bit:
        _check_int8(config)
    elif config.load_in_4bit:
        _check_blockwise(config)
    else:
        raise ConfigError(
            "BitsAndBytesConfig has load_in_8bit=False and load_in_4bit=False, so it says nothing to do: set one of them to True"
        )


def _check_int8(config: Any) -> None:
    threshold = config.llm_int8_threshold
    if not math.isfinite(threshold) or threshold < 0:
        raise ConfigError(
            f"llm_int8_threshold={threshold}: expected a magnitude from which inputs count as outliers (6.0 is usual), "
            "or 0.0 for no outliers"
        )
    if config.llm_int8_has_fp16_weight:
        raise ConfigError(
            "llm_int8_has_fp16_weight=True keeps 16-bit weights and quantizes them in every forward, so nothing would be stored "
            "quantized: leave it False, or set QHUB_NATIVE=bitsandbytes to have the bitsandbytes package do it"
        )


def _check_blockwise(config: Any) -> None:
    if config.bnb_4bit_quant_type not in QUANT_TYPES:
        raise ConfigError(f"bnb_4bit_quant_type={config.bnb_4bit_quant_type!r}: bitsandbytes stores one of {list(QUANT_TYPES)}")
    if config.bnb_4bit_compute_dtype not in STATE_DTYPES.values():
        raise ConfigError(f"bnb_4bit_compute_dtype={config.bnb_4bit_compute_dtype}: expected one of {list(STATE_DTYPES)}")
    if config.bnb_4bit_quant_storage not in STORAGE_DTYPES:
        known = [str(dtype).removeprefix("torch.") for dtype in STORAGE_DTYPES]
        raise ConfigError(f"bnb_4bit_quant_storage={config.bnb_4bit_quant_storage}: expected one of {known}")
