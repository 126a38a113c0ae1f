"""Hyperparameters of GPT-2, Bloom, Falcon, Mamba and T5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qhub.errors import UnsupportedError
from qhub_gguf.metadata.keys import Entries

__all__ = ["bloom", "falcon", "gpt2", "mamba", "t5"]


def gpt2(entries: Entries, settings: Mapping[str, Any]) -> None:
    """Add the entries of GPT-2."""
    entries.own("block_count", settings["n_layer"])
    entries.own("context_length", settings["n_positions"])
    entries.own("embedding_length", settings["n_embd"])
    entries.own("feed_forward_length", settings.get("n_inner") or 4 * settings["n_embd"])
    entries.own("attention.head_count", settings["n_head"])
    entries.real("attention.layer_norm_epsilon", settings["layer_norm_epsilon"])


def bloom(entries: Entries, settings: Mapping[str, Any]) -> None:
    """Add the entries of Bloom."""
    width = settings["hidden_size"]
    entries.own("context_length", settings.get("seq_length") or width)
    entries.own("embedding_length", width)
    entries.own("feed_forward_length", 4 * width)
    entries.own("block_count", settings["n_layer"])
    entries.own("attention.head_count", settings["n_head"])
    entries.own("attention.head_count_kv", settings["n_head"])
    entries.real("attention.layer_norm_epsilon", settings["layer_norm_epsilon"])


def falcon(entries: Entries, settings: Mapping[str, Any]) -> None:
    """Add the entries of Falcon."""
    heads = settings["num_attention_heads"]
    single = settings.get("multi_query") and not settings.get("new_decoder_architecture")
    # llama.cpp knows only rotary embeddings for Falcon, and attention beside the feed-forward net.
    for key, wanted in (("alibi", False), ("parallel_attn", True), ("bias", False)):
        if bool(settings.get(key)) is not wanted:
            raise UnsupportedError(f"llama.cpp has no Falcon model with {key}={settings.get(key)}")
    entries.own("context_length", settings.get("max_position_embeddings") or 2048)
    entries.own("tensor_data_layout", "jploski")
    entries.own("embedding_length", settings["hidden_size"])
    entries.own("feed_forward_length", 4 * settings["hidden_size"])
    entries.own("block_count", settings["num_hidden_layers"])
    entries.own("attention.head_count", heads)
    entries.own("attention.head_count_kv", 1 if single else settings.get("num_kv_heads") or heads)
    entries.real("attention.layer_norm_epsilon", settings["layer_norm_epsilon"])


def mamba(entries: Entries, settings: Mapping[str, Any]) -> None:
    """Add the entries of Mamba."""
    if settings["intermediate_size"] != 2 * settings["hidden_size"]:
        raise UnsupportedError("llama.cpp has no Mamba model whose inner width is not twice the outer one")
    entries.own("context_length", 2**20)
    entries.own("embedding_length", settings["hidden_size"])
    entries.own("feed_forward_length", 0)
    entries.own("attention.head_count", 0)
    entries.own("block_count", settings["num_hidden_layers"])
    entries.own("ssm.conv_kernel", settings["conv_kernel"])
    entries.own("ssm.inner_size", settings["intermediate_size"])
    entries.own("ssm.state_size", settings["state_size"])
    entries.own("ssm.time_step_rank", int(settings["time_step_rank"]))
    entries.real("attention.layer_norm_rms_epsilon", settings["layer_norm_epsilon"])
    entries.own("ssm.dt_b_c_rms", False)


def t5(entries: Entries, settings: Mapping[str, Any]) -> None:
    """Add the entries of T5 and UMT5."""
    entries.own("context_length", settings.get("n_positions") or 512)
    entries.own("embedding_length", settings["d_model"])
    entries.own("feed_forward_length", settings["d_ff"])
    entries.own("block_count", settings["num_layers"])
    if entries.prefix == "t5":
        entries.own("decoder_block_count", settings.get("num_decoder_layers"))
    entries.own("attention.head_count", settings["num_heads"])
    entries.own("attention.key_length", settings["d_kv"])
    entries.own("attention.value_length", settings["d_kv"])
    entries.real("attention.layer_norm_epsilon", settings["layer_norm_epsilon"])
    entries.own("attention.relative_buckets_count", settings["relative_attention_num_buckets"])
    entries.real("attention.layer_norm_rms_epsilon", settings["layer_norm_epsilon"])
    if entries.prefix == "t5":
        entries.own("decoder_start_token_id", settings.get("decoder_start_token_id") or 0)
