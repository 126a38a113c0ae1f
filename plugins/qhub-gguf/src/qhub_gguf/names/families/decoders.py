"""Decoders named like Llama: q, k, v apart (or fused, Phi-3), a gated feed-forward net, experts."""

from __future__ import annotations

from typing import Any

from qhub_gguf.names.entry import MINUS_ONE, Part, Recipe
from qhub_gguf.names.permutations import rotary
from qhub_gguf.names.rules import Family, Rule, rules

__all__ = ["ATTENTION", "EXPERTS", "FEED_FORWARD", "OUTSIDE", "gpt_oss", "llama", "minimax_m2", "nemotron", "phi3"]

LAYER = "model.layers.{i}."

OUTSIDE = [("token_embd", "model.embed_tokens"), ("output_norm", "model.norm"), ("output", "lm_head")]

NORMS = [
    ("blk.{i}.attn_norm", LAYER + "input_layernorm"),
    ("blk.{i}.ffn_norm", LAYER + "post_attention_layernorm"),
]

ATTENTION = [
    ("blk.{i}.attn_q", LAYER + "self_attn.q_proj"),
    ("blk.{i}.attn_k", LAYER + "self_attn.k_proj"),
    ("blk.{i}.attn_v", LAYER + "self_attn.v_proj"),
    ("blk.{i}.attn_output", LAYER + "self_attn.o_proj"),
]

QK_NORMS = [
    ("blk.{i}.attn_q_norm", LAYER + "self_attn.q_norm"),
    ("blk.{i}.attn_k_norm", LAYER + "self_attn.k_norm"),
]

FEED_FORWARD = [
    ("blk.{i}.ffn_gate", LAYER + "mlp.gate_proj"),
    ("blk.{i}.ffn_up", LAYER + "mlp.up_proj"),
    ("blk.{i}.ffn_down", LAYER + "mlp.down_proj"),
]

SHARED_EXPERT = [
    ("blk.{i}.ffn_gate_inp_shexp", LAYER + "mlp.shared_expert_gate"),
    ("blk.{i}.ffn_gate_shexp", LAYER + "mlp.shared_expert.gate_proj"),
    ("blk.{i}.ffn_up_shexp", LAYER + "mlp.shared_expert.up_proj"),
    ("blk.{i}.ffn_down_shexp", LAYER + "mlp.shared_expert.down_proj"),
]

# transformers fuses the experts' gate and up into one parameter (E, 2 I, K), gate first.
EXPERTS = [
    *rules([("blk.{i}.ffn_gate_inp", LAYER + "mlp.gate")]),
    Rule(
        "blk.{i}.ffn_gate_exps",
        LAYER + "mlp.experts.gate_up_proj",
        Recipe(part=Part(1, 0, 2)),
        ((".weight", ""),),
    ),
    Rule(
        "blk.{i}.ffn_up_exps",
        LAYER + "mlp.experts.gate_up_proj",
        Recipe(part=Part(1, 1, 2)),
        ((".weight", ""),),
    ),
    *rules([("blk.{i}.ffn_down_exps", LAYER + "mlp.experts.down_proj")], suffixes=(".weight", "")),
]

# With normalisation, q and k of the file have the two halves of a head interleaved (ggml's "normal" rotary order).
_DENSE = [*rules(OUTSIDE), *rules(NORMS), *rules(ATTENTION), *rules(FEED_FORWARD)]


def head_dim(config: Any) -> int:
    """Return the size of an attention head."""
    stated = getattr(config, "head_dim", None)
    return int(stated) if stated else int(config.hidden_size) // int(config.num_attention_heads)


def llama(config: Any) -> Family:
    """Llama, Mistral, Mixtral, Deci: q and k have the halves of each head interleaved."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
    size = head_dim(config)
    return Family(
        (
            *_DENSE,
            *EXPERTS,
            *rules(ATTENTION[:1], Recipe(rows=rotary(heads, heads * size))),
            *rules(ATTENTION[1:2], Recipe(rows=rotary(kv_heads, kv_heads * size))),
        )
    )


def qwen(config: Any) -> Family:
    """Qwen 2 and 3, with and without experts."""
    return Family((*_DENSE, *rules(QK_NORMS), *EXPERTS, *_shared_expert(config)))


def _shared_expert(config: Any) -> list[Rule]:
    return rules(SHARED_EXPERT)


def olmo2(config: Any) -> Family:
    """OLMo 2: norms after attention and feed-forward net, none before."""
    norms = [
        ("blk.{i}.post_attention_norm", LAYER + "post_attention_layernorm"),
        ("blk.{i}.post_ffw_norm", LAYER + "post_feedforward_layernorm"),
        *QK_NORMS,
    ]
    return Family((*rules(OUTSIDE), *rules(norms), *rules(ATTENTION), *rules(FEED_FORWARD)))


def cohere(config: Any) -> Family:
    """Command R: one norm a layer."""
    return Family((*rules(OUTSIDE), *rules(NORMS[:1]), *rules(QK_NORMS), *rules(ATTENTION), *rules(FEED_FORWARD)))


def minimax_m2(config: Any) -> Family:
    """MiniMax-M2: experts chosen with a correction of their scores."""
    bias = rules([("blk.{i}.exp_probs_b.bias", LAYER + "mlp.e_score_correction_bias")], suffixes="none")
    return Family((*_DENSE, *rules(QK_NORMS), *EXPERTS, *bias))


def gpt_oss(config: Any) -> Family:
    """gpt-oss: attention sinks; experts held as (E, K, N), gate and up taking turns."""
    experts = []
    for ggml_end, hf_end in ((".weight", ""), (".bias", "_bias")):
        for index, name in enumerate(("gate", "up")):
            part = Part(1, index, 2, interleaved=True)
            experts.append(
                Rule(
                    f"blk.{{i}}.ffn_{name}_exps",
                    LAYER + "mlp.experts.gate_up_proj",
                    Recipe(part=part, transposed=ggml_end == ".weight"),
                    ((ggml_end, hf_end),),
                )
            )
        experts.append(
            Rule(
                "blk.{i}.ffn_down_exps",
                LAYER + "mlp.experts.down_proj",
                Recipe(transposed=ggml_end == ".weight"),
                ((ggml_end, hf_end),),
            )
        )
    return Family(
        (
            *rules(OUTSIDE),
            *rules(ATTENTION),
            *rules([NORMS[0], ("blk.{i}.post_attention_norm", LAYER + "post_attention_layernorm")]),
            *rules([("blk.{i}.attn_sinks", LAYER + "self_attn.sinks")], suffixes=(".weight", "")),
            *rules([("blk.{i}.ffn_gate_inp", LAYER + "mlp.router")]),
            *experts,
        )
    )


def stablelm(config: Any) -> Family:
    """StableLM: one norm per head, stacked in the file."""
    norms = []
    for letter, heads in (("q", config.num_attention_heads), ("k", config.num_key_value_heads)):
        norms += [
            Rule(
                f"blk.{{i}}.attn_{letter}_norm",
                LAYER + f"self_attn.{letter}_layernorm.norms.{head}",
                Recipe(part=Part(0, head, heads, stacked=True)),
                ((".weight", ".weight"),),
            )
            for head in range(heads if getattr(config, "qk_layernorm", False) else 0)
        ]
    return Family((*_DENSE, *norms))


def starcoder2(config: Any) -> Family:
    """StarCoder 2: a plain feed-forward net."""
    net = [("blk.{i}.ffn_up", LAYER + "mlp.c_fc"), ("blk.{i}.ffn_down", LAYER + "mlp.c_proj")]
    return Family((*rules(OUTSIDE), *rules(NORMS), *rules(ATTENTION), *rules(net)))


def nemotron(config: Any) -> Family:
    """Nemotron: norms store w + 1."""
    norms = [*NORMS, OUTSIDE[1]]
    return Family((*_DENSE, *rules(norms, Recipe(change=MINUS_ONE), "weight")))


def phi3(config: Any) -> Family:
    """Phi-3: q, k, v fused, and gate and up fused, in file and model alike."""
    fused = [("blk.{i}.attn_qkv", LAYER + "self_attn.qkv_proj"), ("blk.{i}.ffn_up", LAYER + "mlp.gate_up_proj")]
    return Family((*rules(OUTSIDE), *rules(NORMS), ATTENTION_OUTPUT, *rules(fused), *rules(FEED_FORWARD[2:])))


ATTENTION_OUTPUT = rules(ATTENTION[3:])[0]
