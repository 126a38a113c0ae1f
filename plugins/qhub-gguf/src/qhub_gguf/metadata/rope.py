"""Rotary embeddings: what a GGUF file holds as tensors, and what a config says in words.

Llama 3's scaling is a factor per frequency (``rope_freqs.weight``); Phi-3's long contexts are two lists
(``rope_factors_long.weight``, ``rope_factors_short.weight``). Source: ``generate_extra_tensors`` of ``LlamaModel``,
``Phi3MiniModel`` and ``Gemma4Model`` in convert_hf_to_gguf.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["extra_tensors", "full_attention", "full_rope", "llama3_factors", "llama3_settings"]

# What every model with Llama 3's scaling uses; a file has only the factors.
_LOW, _HIGH = 1.0, 4.0


def full_rope(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rotary settings of the layers with full attention, of a config's dict."""
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    rope = dict(rope.get("full_attention", rope))
    rope.setdefault("rope_type", rope.get("type"))
    if rope.get("rope_theta") is None and settings.get("rope_theta") is not None:
        rope["rope_theta"] = settings["rope_theta"]
    return rope


def full_attention(settings: Mapping[str, Any], key: str, spelled: str) -> Any:
    """Return what Gemma 4's layers with full attention have for ``key``: transformers 5.23 says it layer by layer in
    ``per_layer_config``, earlier ones under ``spelled``; None: as the others."""
    for layer, overrides in (settings.get("per_layer_config") or {}).items():
        if settings["layer_types"][int(layer)] == "full_attention" and key in overrides:
            return overrides[key]
    return settings.get(spelled) or settings.get(key)


def extra_tensors(config: Any, architecture: str) -> dict[str, Tensor]:
    """Return the float32 tensors that a file of this config needs beside the parameters, by name."""
    settings = config.to_dict()
    rope = full_rope(settings)
    kind = rope.get("rope_type")
    if architecture == "gemma4":
        # Layers with full attention turn only a part of each head; a factor of 1e30 stops the others.
        size = full_attention(settings, "head_dim", "global_head_dim")
        turning = int(size * rope.get("partial_rotary_factor", 1.0) / 2)
        return {"rope_freqs.weight": torch.tensor([1.0] * turning + [1e30] * (size // 2 - turning))}
    if kind == "llama3" and architecture in ("llama", "deci"):
        size = settings.get("head_dim") or settings["hidden_size"] // settings["num_attention_heads"]
        return {
            "rope_freqs.weight": llama3_factors(
                size,
                rope.get("rope_theta", 10000.0),
                rope.get("factor", 8.0),
                rope.get("low_freq_factor", _LOW),
                rope.get("high_freq_factor", _HIGH),
                rope.get("original_max_position_embeddings", 8192),
            )
        }
    if rope.get("long_factor"):
        return {
            f"rope_factors_{length}.weight": torch.tensor(rope[f"{length}_factor"], dtype=torch.float32)
            for length in ("long", "short")
        }
    return {}


def llama3_factors(size: int, theta: float, factor: float, low: float, high: float, original: int) -> Tensor:
    """Return what each of the ``size`` / 2 frequencies is divided by, float32: 1 for the high ones, ``factor`` for the
    low ones, in between a smooth passage."""
    frequencies = 1.0 / (theta ** (torch.arange(0, size, 2, dtype=torch.float32) / size))
    factors = []
    for frequency in frequencies:
        length = 2 * math.pi / frequency
        if length < original / high:
            factors.append(torch.tensor(1.0))
        elif length > original / low:
            factors.append(torch.tensor(float(factor)))
        else:
            smooth = (original / length - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return torch.stack(factors).float()


def llama3_settings(factors: Tensor, theta: float, context: int) -> dict[str, Any] | None:
    """Return the ``rope_scaling`` that ``rope_freqs.weight`` came from; None if it is not Llama 3's.

    ``context``: the model's context length, which bounds the original one. The factor is the largest of the tensor; the
    original context length is the one, of the powers of two, that gives the same tensor.
    """
    size, factor = 2 * len(factors), float(factors.max())
    for original in (2**power for power in range(3, 24)):
        if original > max(context, 8192):
            break
        expected = llama3_factors(size, theta, factor, _LOW, _HIGH, original)
        if torch.allclose(expected, factors.float(), rtol=1e-5, atol=0):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": _LOW,
                "high_freq_factor": _HIGH,
                "original_max_position_embeddings": original,
            }
    return None
