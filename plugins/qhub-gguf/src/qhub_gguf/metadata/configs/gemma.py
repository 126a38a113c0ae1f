"""Configs of the Gemma models."""

from __future__ import annotations

from qhub_gguf.metadata.configs.reading import Config, Model, decoder, head_dim

__all__ = ["gemma", "gemma4"]


def gemma(model: Model) -> Config:
    """Read the config of Gemma."""
    config = decoder(model)
    size, layers = head_dim(config), config["num_hidden_layers"]
    largest = {"gemma2": 46, "gemma3": 62}.get(model.architecture)
    if largest is not None:
        # The largest models scale by the width per head instead of the head's size (llama.cpp: LLM_TYPE_27B).
        config["query_pre_attn_scalar"] = (
            config["hidden_size"] // config["num_attention_heads"] if layers == largest else size
        )
        config["sliding_window"] = model.get("attention.sliding_window", 4096)
        config["final_logit_softcapping"] = model.get("final_logit_softcapping")
    if model.architecture == "gemma2":
        config["attn_logit_softcapping"] = model.get("attn_logit_softcapping", 50.0)
        config["final_logit_softcapping"] = model.get("final_logit_softcapping", 30.0)
    if model.architecture == "gemma3":
        rope = config["rope_parameters"]
        if model.get("rope.freq_base") is None:
            rope["rope_theta"] = 1e6
        config["rope_parameters"] = {"full_attention": rope, "sliding_attention": _sliding_rope(model)}
    pattern = model.get("attention.sliding_window_pattern")
    if isinstance(pattern, list):
        config["layer_types"] = ["sliding_attention" if sliding else "full_attention" for sliding in pattern]
    return config


def _sliding_rope(model: Model) -> Config:
    return {"rope_type": "default", "rope_theta": model.get("rope.freq_base_swa", 10000.0)}


def gemma4(model: Model) -> Config:
    """Read the config of Gemma 4."""
    config = gemma(model)
    layers = range(config["num_hidden_layers"])
    pattern = model.need("attention.sliding_window_pattern")
    full_size = model.integer("attention.key_length")
    kv_heads = model.get("attention.head_count_kv")
    if isinstance(kv_heads, list):
        by_layer = list(zip(kv_heads, pattern, strict=True))
        config["num_key_value_heads"] = next(heads for heads, swa in by_layer if swa)
        config["num_global_key_value_heads"] = next(heads for heads, swa in by_layer if not swa)
    widths = model.get("feed_forward_length")
    if isinstance(widths, list):
        config["intermediate_size"] = min(widths)
        config["use_double_wide_mlp"] = max(widths) > min(widths)
    full = [layer for layer in layers if not pattern[layer]]
    turned = 1.0
    if model.has("rope_freqs.weight"):
        factors = model.file.tensor("rope_freqs.weight")
        turned = float((factors < 1e20).sum()) / len(factors)
    config |= {
        "head_dim": model.get("attention.key_length_swa") or full_size,
        "global_head_dim": full_size,
        "sliding_window": model.need("attention.sliding_window"),
        "final_logit_softcapping": model.get("final_logit_softcapping"),
        "hidden_size_per_layer_input": model.get("embedding_length_per_layer_input", 0),
        "vocab_size_per_layer_input": (model.shape("per_layer_token_embd.weight") or [262144])[0],
        "num_kv_shared_layers": model.get("attention.shared_kv_layers", 0),
        "attention_k_eq_v": any(
            model.has(f"blk.{layer}.attn_k.weight") and not model.has(f"blk.{layer}.attn_v.weight") for layer in full
        ),
        "rope_parameters": {
            "full_attention": {
                "rope_type": "proportional",
                "partial_rotary_factor": turned,
                "rope_theta": model.get("rope.freq_base", 1e6),
            },
            "sliding_attention": _sliding_rope(model),
        },
    }
    if model.get("expert_count"):
        config |= {
            "enable_moe_block": True,
            "num_experts": model.integer("expert_count"),
            "top_k_experts": model.integer("expert_used_count"),
            "moe_intermediate_size": model.integer("expert_feed_forward_length"),
        }
    config.pop("query_pre_attn_scalar", None)
    return config
