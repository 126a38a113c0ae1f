"""The Gemma models: norms multiply by 1 + w (not in Gemma 4), norms before and after each block."""

from __future__ import annotations

from typing import Any

from qhub_gguf.names.entry import MINUS_ONE, Recipe
from qhub_gguf.names.families.decoders import ATTENTION, FEED_FORWARD, LAYER, NORMS, OUTSIDE, QK_NORMS
from qhub_gguf.names.rules import Family, rules

__all__ = ["gemma", "gemma2", "gemma4"]

_SANDWICH = [
    NORMS[0],
    ("blk.{i}.post_attention_norm", LAYER + "post_attention_layernorm"),
    ("blk.{i}.ffn_norm", LAYER + "pre_feedforward_layernorm"),
    ("blk.{i}.post_ffw_norm", LAYER + "post_feedforward_layernorm"),
    *QK_NORMS,
    OUTSIDE[1],
]

_MATRICES = [*rules(OUTSIDE), *rules(ATTENTION), *rules(FEED_FORWARD)]


def gemma(config: Any) -> Family:
    """Gemma 1: Llama's norms, stored as w + 1."""
    return Family((*_MATRICES, *rules([*NORMS, OUTSIDE[1]], Recipe(change=MINUS_ONE))))


def gemma2(config: Any) -> Family:
    """Gemma 2 and 3: four norms a layer, stored as w + 1."""
    return Family((*_MATRICES, *rules(_SANDWICH, Recipe(change=MINUS_ONE))))


def gemma4(config: Any) -> Family:
    """Gemma 4: plain norms, inputs per layer, experts beside the dense net."""
    inputs = [
        ("per_layer_token_embd", "model.embed_tokens_per_layer"),
        ("per_layer_model_proj", "model.per_layer_model_projection"),
        ("per_layer_proj_norm", "model.per_layer_projection_norm"),
        ("blk.{i}.inp_gate", LAYER + "per_layer_input_gate"),
        ("blk.{i}.proj", LAYER + "per_layer_projection"),
        ("blk.{i}.post_norm", LAYER + "post_per_layer_input_norm"),
    ]
    experts = [
        ("blk.{i}.ffn_gate_inp", LAYER + "router.proj"),
        ("blk.{i}.pre_ffw_norm_2", LAYER + "pre_feedforward_layernorm_2"),
        ("blk.{i}.post_ffw_norm_1", LAYER + "post_feedforward_layernorm_1"),
        ("blk.{i}.post_ffw_norm_2", LAYER + "post_feedforward_layernorm_2"),
    ]
    whole = [
        *rules([("blk.{i}.layer_output_scale", LAYER + "layer_scalar")], suffixes=(".weight", "")),
        *rules([("blk.{i}.ffn_gate_inp.scale", LAYER + "router.scale")], suffixes="none"),
        *rules([("blk.{i}.ffn_down_exps.scale", LAYER + "router.per_expert_scale")], suffixes="none"),
        *rules([("blk.{i}.ffn_gate_up_exps", LAYER + "experts.gate_up_proj")], suffixes=(".weight", "")),
        *rules([("blk.{i}.ffn_down_exps", LAYER + "experts.down_proj")], suffixes=(".weight", "")),
    ]
    return Family((*_MATRICES, *rules(_SANDWICH), *rules(inputs), *rules(experts), *whole))
