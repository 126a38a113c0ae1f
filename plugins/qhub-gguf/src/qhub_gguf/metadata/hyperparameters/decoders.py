"""Hyperparameters of the decoders named like Llama, and of the hybrids."""

from __future__ import annotations

from collections.abc import Mapping
from math import log, sqrt
from typing import Any

from qhub_gguf.container.values import Kind
from qhub_gguf.metadata.hyperparameters.shared import head_dim, standard
from qhub_gguf.metadata.keys import Entries
from qhub_gguf.metadata.rope import full_rope

__all__ = [
    "cohere",
    "experts",
    "gpt_oss",
    "granite",
    "lfm2",
    "llama",
    "minimax_m2",
    "nemotron",
    "phi3",
    "qwen35",
    "stablelm",
]

# What Granite multiplies by, under llama.cpp's keys.
_GRANITE = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}


def llama(entries: Entries, settings: Mapping[str, Any]) -> None:
    """Add the entries of Llama, Mistral and their like."""
    standard(entries, settings)
    entries.own("vocab_size", settings["vocab_size"])
    entries.own("rope.dimension_count", head_dim(settings))


def granite(entries: Entries, settings: Mapping[str, Any]) -> None:
    """Add the entries of Granite."""
    llama(entries, {**settings, "head_dim": None})
    for ours, theirs in _GRANITE.items():
        entries.real(ours, settings.get(theirs))


def cohere(entries: Entries, settings: Mapping[str, Any]) -> None:
    """Add the entries of Command R."""
    standard(entries, settings)
    entries.real("logit_scale", settings["logit_scale"])
    entries.own("rope.scaling.type", "none")


def experts(entries: Entries, settings: Mapping[str, Any]) -> None:
    """Add the entries of Qwen mixtures of experts."""
    standard(entries, settings)
    entries.own("expert_feed_forward_length", settings.get("moe_intermediate_size"))
    entries.own("expert_shared_feed_forward_length", settings.get("shared_expert_intermediate_size"))


def minimax_m2(entries: Entries, settings: Mapping[str, Any]) -> None:
    # transformers computes with a sigmoid whatever the config says; llama.cpp wants to be told.
    """Add the entries of MiniMax-M2."""
    standard(entries, {**settings, "scoring_func": "sigmoid"})
    entries.own("expert_feed_forward_length", settings["intermediate_size"])
    partial = full_rope(settings).get("partial_rotary_factor", 1.0)
    entries.own("rope.dimension_count", settings.get("rotary_dim") or int(head_dim(settings) * partial))


def gpt_oss(entries: Entries, settings: Mapping[str, Any]) -> None:
    """Add the entries of gpt-oss."""
    standard(entries, settings)
    entries.own("attention.sliding_window", settings.get("sliding_window"))
    entries.own("expert_feed_forward_length", settings["intermediate_size"])


def lfm2(entries: Entries, settings: Mapping[str, Any]) -> None:
    """Add the entries of LFM2."""
    per_layer = [settings["num_key_value_heads"] if kind != "conv" else 0 for kind in settings["layer_types"]]
    width = int(settings["intermediate_size"])
    if settings.get("block_auto_adjust_ff_dim"):
        width = int(2 * width / 3)
        if settings.get("block_ffn_dim_multiplier") is not None:
            width = int(settings["block_ffn_dim_multiplier"] * width)
        multiple = settings["block_multiple_of"]
        width = multiple * ((width + multiple - 1) // multiple)
    standard(entries, {**settings, "num_key_value_heads": per_layer, "intermediate_size": width})
    entries.own("vocab_size", settings["vocab_size"])
    entries.own("shortconv.l_cache", settings["conv_L_cache"])


def nemotron(entries: Entries, settings: Mapping[str, Any]) -> None:
    """Add the entries of Nemotron."""
    standard(entries, settings)
    entries.own("vocab_size", settings["vocab_size"])
    entries.real("attention.layer_norm_epsilon", settings["norm_eps"])
    rope = full_rope(settings)
    partial = rope.get("partial_rotary_factor", settings.get("partial_rotary_factor", 1.0))
    entries.own("rope.dimension_count", int(partial * settings["hidden_size"]) // settings["num_attention_heads"])
    if rope.get("factor") is None:
        entries.own("rope.scaling.type", "none")


def phi3(entries: Entries, settings: Mapping[str, Any]) -> None:
    """Add the entries of Phi-3."""
    rope = full_rope(settings)
    original = rope.get("original_max_position_embeddings", settings.get("original_max_position_embeddings"))
    rotary = int(rope.get("partial_rotary_factor", 1.0) * settings["hidden_size"]) // settings["num_attention_heads"]
    entries.own("context_length", settings["max_position_embeddings"])
    entries.own("rope.scaling.original_context_length", original)
    entries.own("embedding_length", settings["hidden_size"])
    entries.own("feed_forward_length", settings["intermediate_size"])
    entries.own("block_count", settings["num_hidden_layers"])
    entries.own("attention.head_count", settings["num_attention_heads"])
    entries.own("attention.head_count_kv", settings["num_key_value_heads"])
    entries.real("attention.layer_norm_rms_epsilon", settings["rms_norm_eps"])
    entries.own("rope.dimension_count", rotary)
    entries.real("rope.freq_base", rope.get("rope_theta"))
    entries.own("attention.sliding_window", settings.get("sliding_window") or 0)
    if rope.get("long_factor"):
        entries.real("rope.scaling.attn_factor", _longrope_attention(settings))


def _longrope_attention(settings: Mapping[str, Any]) -> float:
    """Return what attention is scaled by with long rotary factors (``Phi3MiniModel.generate_extra_tensors``)."""
    rope = full_rope(settings)
    original = rope.get("original_max_position_embeddings") or settings["original_max_position_embeddings"]
    scale = settings["max_position_embeddings"] / original
    if scale <= 1:
        return 1.0
    return 0.1 * log(scale) + 1 if rope.get("rope_type") == "yarn" else sqrt(1 + log(scale) / log(original))


def stablelm(entries: Entries, settings: Mapping[str, Any]) -> None:
    """Add the entries of StableLM."""
    rope = full_rope(settings)
    partial = rope.get("partial_rotary_factor", settings.get("partial_rotary_factor", 0.25))
    entries.own("context_length", settings["max_position_embeddings"])
    entries.own("embedding_length", settings["hidden_size"])
    entries.own("block_count", settings["num_hidden_layers"])
    entries.own("feed_forward_length", settings["intermediate_size"])
    entries.own("rope.dimension_count", int(partial * (settings["hidden_size"] // settings["num_attention_heads"])))
    entries.own("attention.head_count", settings["num_attention_heads"])
    entries.own("attention.head_count_kv", settings["num_key_value_heads"])
    entries.own("use_parallel_residual", bool(settings.get("use_parallel_residual", True)))
    entries.real("attention.layer_norm_epsilon", settings["layer_norm_eps"])


def qwen35(entries: Entries, settings: Mapping[str, Any]) -> None:
    """Add the entries of Qwen 3.5."""
    experts(entries, settings)
    heads = settings["linear_num_value_heads"]
    entries.own("ssm.conv_kernel", settings["linear_conv_kernel_dim"])
    entries.own("ssm.state_size", settings["linear_key_head_dim"])
    entries.own("ssm.group_count", settings["linear_num_key_heads"])
    entries.own("ssm.time_step_rank", heads)
    entries.own("ssm.inner_size", settings["linear_value_head_dim"] * heads)
    entries.own("attention.recurrent_layers", [kind == "linear_attention" for kind in settings["layer_types"]])
    entries.own("full_attention_interval", settings.get("full_attention_interval") or 4)
    rope = full_rope(settings)
    partial = rope.get("partial_rotary_factor", settings.get("partial_rotary_factor", 0.25))
    entries.own("rope.dimension_count", int(head_dim(settings) * partial))
    if rope.get("mrope_section") is None:
        entries.own("rope.dimension_sections", [11, 11, 10, 0], Kind.INT32)
