"""Chooses a layout for each weight: one 4-bit layout or one int8 layout, by what the config says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qhub.errors import ConfigError
from qhub.layouts import Activation, Affine, Grid
from qhub.plan import LayerPlan, Skip, WeightInfo
from qhub_bitsandbytes.layout import STATE_DTYPES, blockwise, nested_scales

__all__ = ["int8_layout", "plan"]


def plan(config: Any, weights: Sequence[WeightInfo]) -> dict[str, LayerPlan | Skip]:
    """Return a plan for every weight of ``weights``; embeddings are skipped, as in transformers.

    Raises :class:`ConfigError` where ``bnb_4bit_quant_storage`` does not divide a weight's bytes.
    """
    one = _plan_int8 if config.load_in_8bit else _plan_blockwise
    return {weight.name: one(config, weight) for weight in weights}


def int8_layout(out_features: int, in_features: int, threshold: float) -> Affine:
    """Return the layout of LLM.int8(): w = codes * absmax / 127 per row (upstream's SCB), inputs rounded to int8 but for outliers.

    Upstream multiplies by 7.874015718698502e-3, the float32 nearest to 1/127, after codes * SCB; so does
    :meth:`Affine.decode` with ``unit``.
    """
    return Affine(
        out_features=out_features,
        in_features=in_features,
        bits=8,
        signed=True,
        grid=Grid("block", 1, in_features),
        unit=1.0 / 127.0,
        activation=Activation("int8", threshold=threshold),
    )


def _plan_int8(config: Any, weight: WeightInfo) -> LayerPlan | Skip:
    if weight.kind == "embedding":
        return _EMBEDDING
    return LayerPlan(int8_layout(weight.out_features, weight.in_features, config.llm_int8_threshold))


def _plan_blockwise(config: Any, weight: WeightInfo) -> LayerPlan | Skip:
    if weight.kind == "embedding":
        return _EMBEDDING
    state_dtype = str(weight.dtype).removeprefix("torch.")
    if state_dtype not in STATE_DTYPES:
        return Skip(f"bitsandbytes quantizes {', '.join(STATE_DTYPES)} weights to 4 bits, this one is {state_dtype}: load it in one of them")
    storage = config.bnb_4bit_quant_storage
    count = -(-weight.out_features * weight.in_features // 2)
    if count % storage.itemsize:
        raise ConfigError(
            f"bnb_4bit_quant_storage={storage}: {weight.name} of {weight.out_features}x{weight.in_features} packs into {count} bytes, "
            f"not a multiple of {storage.itemsize}: use uint8, or leave the module out with llm_int8_skip_modules"
        )
    nested = nested_scales() if config.bnb_4bit_use_double_quant else None
    layout = blockwise(weight.out_features, weight.in_features, state_dtype, nested)
    return LayerPlan(layout, compute_dtype=config.bnb_4bit_compute_dtype)


_EMBEDDING = Skip("bitsandbytes quantizes linear layers only, this is an embedding")
