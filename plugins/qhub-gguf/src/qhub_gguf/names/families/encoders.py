"""T5 and UMT5: an encoder, and a decoder that attends to it."""

from __future__ import annotations

from typing import Any

from qhub_gguf.names.rules import Family, rules

__all__ = ["t5"]

_LETTERS = (("q", "q"), ("k", "k"), ("v", "v"), ("o", "o"), ("rel_b", "relative_attention_bias"))


def t5(config: Any) -> Family:
    """T5 and UMT5, with or without a decoder; the embeddings of encoder and decoder are one tensor."""
    table = [
        ("token_embd", "shared"),
        ("output", "lm_head"),
        ("enc.output_norm", "encoder.final_layer_norm"),
        ("dec.output_norm", "decoder.final_layer_norm"),
    ]
    for side, stack, last in (("enc", "encoder", 1), ("dec", "decoder", 2)):
        block = f"{stack}.block.{{i}}.layer."
        attentions = [("attn", "0.SelfAttention")] + ([("cross_attn", "1.EncDecAttention")] if side == "dec" else [])
        for short, module in attentions:
            table += [(f"{side}.blk.{{i}}.{short}_{ggml}", f"{block}{module}.{hf}") for ggml, hf in _LETTERS]
            table.append((f"{side}.blk.{{i}}.{short}_norm", f"{block}{module[0]}.layer_norm"))
        net = f"{block}{last}.DenseReluDense."
        gated = getattr(config, "is_gated_act", True)
        table += [
            (f"{side}.blk.{{i}}.ffn_norm", f"{block}{last}.layer_norm"),
            (f"{side}.blk.{{i}}.ffn_up", net + ("wi_1" if gated else "wi")),
            (f"{side}.blk.{{i}}.ffn_down", net + "wo"),
        ]
        if gated:
            table.append((f"{side}.blk.{{i}}.ffn_gate", net + "wi_0"))
    tied = (r"(encoder|decoder)\.embed_tokens\.weight",)
    return Family(tuple(rules(table)), computed=tied)
