"""Chooses a layout for each weight: one 4-bit layout or one int8 layout, by what the config says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qhub.errors import ConfigError
from qhub.plan import LayerPlan, Skip, WeightInfo
from qhub_bitsandbytes.layout import blockwise, int8, nested_scales

__all__ = ["plan"]


def plan(config: Any, weights: Sequence[WeightInfo]) -> dict[str, LayerPlan | Skip]:
    """Return a plan for every weight of ``weights``: linear layers and fused experts; embeddings are skipped.

    Raises :class:`ConfigError` where ``bnb_4bit_quant_storage`` does not divide a weight's bytes.
    """
    one = _plan_int8 if config.load_in_8bit else _plan_blockwise
    skip = Skip("bitsandbytes quantizes linear layers and experts, this is an embedding")
    return {weight.name: skip if weight.kind == "embedding" else one(config, weight) for weight in weights}


def _plan_int8(config: Any, weight: WeightInfo) -> LayerPlan:
    return LayerPlan(int8(weight.out_features, weight.in_features, config.llm_int8_threshold))


def _plan_blockwise(config: Any, weight: WeightInfo) -> LayerPlan:
    storage = config.bnb_4bit_quant_storage
    count = -(-weight.out_features * weight.in_features // 2)
    if count % storage.itemsize:
        raise ConfigError(
            f"bnb_4bit_quant_storage={storage}: {weight.name} of {weight.out_features}x{weight.in_features} packs "
            f"into {count} bytes, not a multiple of {storage.itemsize}: use uint8, or leave the module out with "
            "llm_int8_skip_modules"
        )
    nested = nested_scales() if config.bnb_4bit_use_double_quant else None
    layout = blockwise(weight.out_features, weight.in_features, nested)
    return LayerPlan(layout, compute_dtype=config.bnb_4bit_compute_dtype)
