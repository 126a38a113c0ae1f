"""Decoders that mix attention with other layers: LFM2 (short convolutions), Qwen 3.5 (gated delta nets)."""

from __future__ import annotations

from typing import Any

from qhub_gguf.names.entry import MINUS_ONE, NEGATIVE_EXP, Recipe
from qhub_gguf.names.families.decoders import (
    ATTENTION,
    EXPERTS,
    FEED_FORWARD,
    LAYER,
    NORMS,
    OUTSIDE,
    QK_NORMS,
    SHARED_EXPERT,
)
from qhub_gguf.names.permutations import grouped_heads
from qhub_gguf.names.rules import Family, rules

__all__ = ["lfm2", "qwen35"]


def lfm2(config: Any) -> Family:
    """LFM2: the convolution's kernel loses its axis of size 1."""
    table = [
        ("token_embd", "model.embed_tokens"),
        ("token_embd_norm", "model.embedding_norm"),
        ("output", "lm_head"),
        ("blk.{i}.attn_norm", LAYER + "operator_norm"),
        ("blk.{i}.ffn_norm", LAYER + "ffn_norm"),
        *ATTENTION[:3],
        ("blk.{i}.attn_output", LAYER + "self_attn.out_proj"),
        ("blk.{i}.attn_q_norm", LAYER + "self_attn.q_layernorm"),
        ("blk.{i}.attn_k_norm", LAYER + "self_attn.k_layernorm"),
        ("blk.{i}.ffn_gate", LAYER + "feed_forward.w1"),
        ("blk.{i}.ffn_up", LAYER + "feed_forward.w3"),
        ("blk.{i}.ffn_down", LAYER + "feed_forward.w2"),
        ("blk.{i}.shortconv.in_proj", LAYER + "conv.in_proj"),
        ("blk.{i}.shortconv.out_proj", LAYER + "conv.out_proj"),
    ]
    kernel = [("blk.{i}.shortconv.conv", LAYER + "conv.conv")]
    return Family((*rules(table), *rules(kernel), *rules(kernel, Recipe(axis=1), "weight")))


def qwen35(config: Any) -> Family:
    """Qwen 3.5, with and without experts: value heads of the delta net are tiled in the file, norms are w + 1."""
    key_heads, value_heads = config.linear_num_key_heads, config.linear_num_value_heads
    per_key, size = value_heads // key_heads, config.linear_value_head_dim
    before = 2 * config.linear_key_head_dim * key_heads
    net = LAYER + "linear_attn."
    heads, values = grouped_heads(key_heads, per_key), grouped_heads(key_heads, per_key, size)
    fused = grouped_heads(key_heads, per_key, size, before)
    norms = [
        NORMS[0],
        ("blk.{i}.post_attention_norm", LAYER + "post_attention_layernorm"),
        *QK_NORMS,
        OUTSIDE[1],
    ]
    table = [
        *rules(OUTSIDE),
        *rules(ATTENTION),
        *rules(FEED_FORWARD),
        *EXPERTS,
        *rules(SHARED_EXPERT),
        *rules(norms, Recipe(change=MINUS_ONE), "weight"),
        *rules([("blk.{i}.ssm_norm", net + "norm")]),
        *rules([("blk.{i}.attn_qkv", net + "in_proj_qkv")], Recipe(rows=fused)),
        *rules([("blk.{i}.attn_gate", net + "in_proj_z")], Recipe(rows=values)),
        *rules([("blk.{i}.ssm_alpha", net + "in_proj_a"), ("blk.{i}.ssm_beta", net + "in_proj_b")], Recipe(rows=heads)),
        *rules([("blk.{i}.ssm_conv1d", net + "conv1d")], Recipe(rows=fused, axis=1)),
        *rules([("blk.{i}.ssm_out", net + "out_proj")], Recipe(columns=values)),
        *rules([("blk.{i}.ssm_a", net + "A_log")], Recipe(rows=heads, change=NEGATIVE_EXP), "none"),
        *rules([("blk.{i}.ssm_dt", net + "dt_bias")], Recipe(rows=heads), (".bias", "")),
    ]
    # The blocks for multi-token prediction, which transformers does not have, follow the layers.
    layers = int(config.num_hidden_layers)
    return Family(tuple(table), ignored=(_layers_from(layers), "rope_freqs.weight"))


def _layers_from(first: int) -> str:
    return "|".join(rf"blk\.{number}\..*" for number in range(first, first + 8))
