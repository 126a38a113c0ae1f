"""Hyperparameters of the Gemma models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qhub_gguf.container.values import Kind
from qhub_gguf.metadata.hyperparameters.shared import first, standard
from qhub_gguf.metadata.keys import Entries
from qhub_gguf.metadata.rope import full_attention

__all__ = ["gemma", "gemma2", "gemma3", "gemma4"]


def gemma(entries: Entries, settings: Mapping[str, Any]) -> None:
    """Add the entries of Gemma."""
    entries.own("context_length", settings["max_position_embeddings"])
    entries.own("embedding_length", settings["hidden_size"])
    entries.own("block_count", settings["num_hidden_layers"])
    entries.own("feed_forward_length", settings["intermediate_size"])
    entries.own("attention.head_count", settings["num_attention_heads"])
    entries.own("attention.head_count_kv", settings["num_key_value_heads"])
    entries.real("attention.layer_norm_rms_epsilon", settings["rms_norm_eps"])
    entries.own("attention.key_length", settings["head_dim"])
    entries.own("attention.value_length", settings["head_dim"])


def gemma2(entries: Entries, settings: Mapping[str, Any]) -> None:
    """Add the entries of Gemma 2."""
    gemma(entries, settings)
    entries.real("attn_logit_softcapping", settings.get("attn_logit_softcapping"))
    entries.real("final_logit_softcapping", settings.get("final_logit_softcapping"))
    entries.own("attention.sliding_window", settings["sliding_window"])


def gemma3(entries: Entries, settings: Mapping[str, Any]) -> None:
    """Add the entries of Gemma 3."""
    standard(entries, settings)
    entries.real("final_logit_softcapping", settings.get("final_logit_softcapping"))
    entries.own("attention.sliding_window", settings["sliding_window"])


def gemma4(entries: Entries, settings: Mapping[str, Any]) -> None:
    """Add the entries of Gemma 4."""
    sliding = [kind == "sliding_attention" for kind in settings["layer_types"]]
    gemma3(entries, settings)
    entries.own("attention.shared_kv_layers", settings["num_kv_shared_layers"])
    entries.own("embedding_length_per_layer_input", settings.get("hidden_size_per_layer_input") or 0)
    entries.own("attention.sliding_window_pattern", sliding, Kind.BOOL)
    full = full_attention(settings, "head_dim", "global_head_dim")
    entries.own("attention.key_length", full)
    entries.own("attention.value_length", full)
    entries.own("attention.key_length_swa", settings["head_dim"])
    entries.own("attention.value_length_swa", settings["head_dim"])
    entries.own("expert_feed_forward_length", first(settings, "expert_intermediate_size", "moe_intermediate_size"))
    layers = settings["num_hidden_layers"]
    if settings.get("use_double_wide_mlp"):
        own = layers - settings["num_kv_shared_layers"]
        widths = [settings["intermediate_size"] * (1 if layer < own else 2) for layer in range(layers)]
        entries.own("feed_forward_length", widths, Kind.INT32)
    full_heads = full_attention(settings, "num_key_value_heads", "num_global_key_value_heads")
    if full_heads != settings["num_key_value_heads"]:
        heads = [settings["num_key_value_heads"] if swa else full_heads for swa in sliding]
        entries.own("attention.head_count_kv", heads, Kind.INT32)
    entries.own("rope.dimension_count", full)
    entries.own("rope.dimension_count_swa", settings["head_dim"])
