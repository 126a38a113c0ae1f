"""Older decoders with names of their own: GPT-2, Bloom, Falcon, Mamba."""

from __future__ import annotations

from typing import Any

from qhub_gguf.names.entry import NEGATIVE_EXP, Recipe
from qhub_gguf.names.permutations import split_qkv, split_qkv_groups
from qhub_gguf.names.rules import Family, rules

__all__ = ["bloom", "falcon", "gpt2", "mamba"]

_LAYER = "transformer.h.{i}."


def gpt2(config: Any) -> Family:
    """GPT-2: its ``Conv1D`` layers hold the weight as (K, N)."""
    plain = [
        ("token_embd", "transformer.wte"),
        ("position_embd", "transformer.wpe"),
        ("output_norm", "transformer.ln_f"),
        ("output", "lm_head"),
        ("blk.{i}.attn_norm", _LAYER + "ln_1"),
        ("blk.{i}.ffn_norm", _LAYER + "ln_2"),
    ]
    transposed = [
        ("blk.{i}.attn_qkv", _LAYER + "attn.c_attn"),
        ("blk.{i}.attn_output", _LAYER + "attn.c_proj"),
        ("blk.{i}.ffn_up", _LAYER + "mlp.c_fc"),
        ("blk.{i}.ffn_down", _LAYER + "mlp.c_proj"),
    ]
    return Family(
        (*rules(plain), *rules(transposed, suffixes="bias"), *rules(transposed, Recipe(transposed=True), "weight"))
    )


_FUSED = [
    ("token_embd", "transformer.word_embeddings"),
    ("output_norm", "transformer.ln_f"),
    ("output", "lm_head"),
    ("blk.{i}.attn_norm", _LAYER + "input_layernorm"),
    ("blk.{i}.attn_output", _LAYER + "self_attention.dense"),
    ("blk.{i}.ffn_up", _LAYER + "mlp.dense_h_to_4h"),
    ("blk.{i}.ffn_down", _LAYER + "mlp.dense_4h_to_h"),
]
_QKV = [("blk.{i}.attn_qkv", _LAYER + "self_attention.query_key_value")]


def bloom(config: Any) -> Family:
    """Bloom: q, k, v interleaved by head in the model, one after the other in the file."""
    norms = [
        ("token_embd_norm", "transformer.word_embeddings_layernorm"),
        ("blk.{i}.ffn_norm", _LAYER + "post_attention_layernorm"),
    ]
    rows = split_qkv(config.n_head, config.hidden_size // config.n_head)
    return Family((*rules(_FUSED), *rules(norms), *rules(_QKV, Recipe(rows=rows))))


def falcon(config: Any) -> Family:
    """Falcon: q, k, v grouped by kv head in the model; one norm a layer, or two (the 40B model)."""
    grouped, heads = config.new_decoder_architecture, config.num_attention_heads
    kv_heads = 1 if config.multi_query and not grouped else (config.num_kv_heads or heads)
    rows = split_qkv_groups(heads, kv_heads, config.hidden_size // heads)
    norms = []
    if grouped and getattr(config, "num_ln_in_parallel_attn", None) in (None, 2):
        norms = [("blk.{i}.attn_norm", _LAYER + "ln_mlp"), ("blk.{i}.attn_norm_2", _LAYER + "ln_attn")]
    elif not config.parallel_attn and not grouped:
        norms = [("blk.{i}.ffn_norm", _LAYER + "post_attention_layernorm")]
    return Family((*rules(_FUSED), *rules(norms), *rules(_QKV, Recipe(rows=rows))))


def mamba(config: Any) -> Family:
    """Mamba: a state-space model; A stored itself, not its logarithm."""
    layer = "backbone.layers.{i}."
    table = [
        ("token_embd", "backbone.embeddings"),
        ("output_norm", "backbone.norm_f"),
        ("output", "lm_head"),
        ("blk.{i}.attn_norm", layer + "norm"),
        ("blk.{i}.ssm_in", layer + "mixer.in_proj"),
        ("blk.{i}.ssm_out", layer + "mixer.out_proj"),
        ("blk.{i}.ssm_x", layer + "mixer.x_proj"),
        ("blk.{i}.ssm_dt", layer + "mixer.dt_proj"),
        ("blk.{i}.ssm_conv1d", layer + "mixer.conv1d"),
    ]
    conv = rules(table[-1:], Recipe(axis=1), "weight")
    numbers = [
        *rules([("blk.{i}.ssm_a", layer + "mixer.A_log")], Recipe(change=NEGATIVE_EXP), "none"),
        *rules([("blk.{i}.ssm_d", layer + "mixer.D")], suffixes="none"),
    ]
    return Family((*rules(table), *conv, *numbers))
