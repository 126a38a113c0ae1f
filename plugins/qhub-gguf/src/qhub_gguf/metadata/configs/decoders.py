"""Configs of the decoders named like Llama, and of the hybrids."""

from __future__ import annotations

from qhub_gguf.metadata.configs.reading import Config, Model, decoder, head_dim, set_partial

__all__ = [
    "cohere",
    "gpt_oss",
    "granite",
    "lfm2",
    "llama",
    "minimax_m2",
    "nemotron",
    "phi3",
    "qwen",
    "qwen35",
    "stablelm",
    "starcoder2",
]

_GATING = {0: "none", 1: "softmax", 2: "sigmoid"}


def llama(model: Model) -> Config:
    """Read the config of Llama, Mistral and their like."""
    config = decoder(model)
    config.setdefault("head_dim", model.get("rope.dimension_count") or head_dim(config))
    config["attention_bias"] = model.any("attn_q.bias")
    config["mlp_bias"] = model.any("ffn_up.bias")
    if model.get("expert_count"):
        config |= {
            "model_type": "mixtral",
            "num_local_experts": model.integer("expert_count"),
            "num_experts_per_tok": model.integer("expert_used_count"),
            "sliding_window": None,
        }
        del config["attention_bias"], config["mlp_bias"]
    return config


def granite(model: Model) -> Config:
    """Read the config of Granite."""
    config = llama(model)
    for ours, theirs in (
        ("attention.scale", "attention_multiplier"),
        ("embedding_scale", "embedding_multiplier"),
        ("residual_scale", "residual_multiplier"),
        ("logit_scale", "logits_scaling"),
    ):
        config[theirs] = model.get(ours, 1.0)
    del config["head_dim"]
    return config


def cohere(model: Model) -> Config:
    """Read the config of Command R."""
    config = decoder(model)
    config |= {
        "layer_norm_eps": model.need("attention.layer_norm_epsilon"),
        "logit_scale": model.get("logit_scale", 1.0),
        "use_qk_norm": model.any("attn_q_norm.weight"),
    }
    return config


def qwen(model: Model) -> Config:
    """Read the config of Qwen 2 and 3."""
    config = decoder(model)
    if model.get("expert_count"):
        config |= {
            "num_experts": model.integer("expert_count"),
            "num_experts_per_tok": model.integer("expert_used_count"),
            # llama.cpp normalises the weights of the chosen experts for Qwen 3, not for Qwen 2.
            "norm_topk_prob": model.architecture == "qwen3moe",
        }
        width = model.get("expert_feed_forward_length") or (model.shape("blk.0.ffn_gate_exps.weight") or [0, None])[1]
        config["moe_intermediate_size"] = width
        shared = (
            model.get("expert_shared_feed_forward_length") or (model.shape("blk.0.ffn_up_shexp.weight") or [None])[0]
        )
        if shared:
            config["shared_expert_intermediate_size"] = shared
    if model.architecture in ("qwen3", "qwen3moe"):
        config["attention_bias"] = model.any("attn_q.bias")
    return config


def minimax_m2(model: Model) -> Config:
    """Read the config of MiniMax-M2."""
    config = decoder(model)
    config |= {
        "intermediate_size": model.get("expert_feed_forward_length") or config["intermediate_size"],
        "num_local_experts": model.integer("expert_count"),
        "num_experts_per_tok": model.integer("expert_used_count"),
        "scoring_func": _GATING.get(model.get("expert_gating_func", 2), "sigmoid"),
        "use_routing_bias": model.any("exp_probs_b.bias"),
    }
    set_partial(model, config, head_dim(config))
    config["rotary_dim"] = model.get("rope.dimension_count") or head_dim(config)
    return config


def gpt_oss(model: Model) -> Config:
    """Read the config of gpt-oss."""
    config = decoder(model)
    config |= {
        "intermediate_size": model.get("expert_feed_forward_length") or config["intermediate_size"],
        "num_local_experts": model.integer("expert_count"),
        "num_experts_per_tok": model.integer("expert_used_count"),
        "sliding_window": model.get("attention.sliding_window", 128),
        "attention_bias": model.any("attn_q.bias"),
    }
    if config["rope_parameters"]["rope_type"] == "yarn":
        config["rope_parameters"]["truncate"] = False
    return config


def stablelm(model: Model) -> Config:
    """Read the config of StableLM."""
    config = decoder(model)
    config.pop("rms_norm_eps", None)
    config |= {
        "layer_norm_eps": model.need("attention.layer_norm_epsilon"),
        "use_qkv_bias": model.any("attn_q.bias"),
        "qk_layernorm": model.any("attn_q_norm.weight"),
        "use_parallel_residual": not model.any("ffn_norm.weight"),
    }
    set_partial(model, config, head_dim(config))
    return config


def starcoder2(model: Model) -> Config:
    """Read the config of StarCoder 2."""
    config = decoder(model)
    config |= {"norm_epsilon": model.need("attention.layer_norm_epsilon"), "use_bias": model.any("attn_q.bias")}
    config["sliding_window"] = model.get("attention.sliding_window") or None
    return config


def nemotron(model: Model) -> Config:
    """Read the config of Nemotron."""
    config = decoder(model)
    config.pop("rms_norm_eps", None)
    config["norm_eps"] = model.get("attention.layer_norm_epsilon") or model.need("attention.layer_norm_rms_epsilon")
    set_partial(model, config, head_dim(config))
    return config


def phi3(model: Model) -> Config:
    """Read the config of Phi-3."""
    config = decoder(model)
    config["sliding_window"] = model.get("attention.sliding_window") or None
    original = model.get("rope.scaling.original_context_length") or config["max_position_embeddings"]
    config["original_max_position_embeddings"] = original
    set_partial(model, config, head_dim(config))
    if model.has("rope_factors_long.weight"):
        config["rope_parameters"] |= {
            "rope_type": "longrope",
            "original_max_position_embeddings": original,
            "long_factor": model.file.tensor("rope_factors_long.weight").tolist(),
            "short_factor": model.file.tensor("rope_factors_short.weight").tolist(),
        }
    return config


def lfm2(model: Model) -> Config:
    """Read the config of LFM2."""
    per_layer = model.need("attention.head_count_kv")
    config = decoder(model)
    config.pop("rms_norm_eps", None)
    config |= {
        "norm_eps": model.need("attention.layer_norm_rms_epsilon"),
        "block_auto_adjust_ff_dim": False,
        "conv_L_cache": model.integer("shortconv.l_cache"),
        "conv_bias": model.any("shortconv.in_proj.bias"),
        "layer_types": ["full_attention" if heads else "conv" for heads in per_layer],
    }
    return config


def qwen35(model: Model) -> Config:
    """Read the config of Qwen 3.5."""
    config = qwen(model)
    config.pop("norm_topk_prob", None)
    layers = model.integer("block_count") - model.get("nextn_predict_layers", 0)
    heads = model.integer("ssm.time_step_rank")
    interval = model.get("full_attention_interval", 4)
    recurrent = model.get("attention.recurrent_layers") or [(layer + 1) % interval != 0 for layer in range(layers)]
    size = head_dim(config)
    config |= {
        "num_hidden_layers": layers,
        "full_attention_interval": interval,
        "layer_types": ["linear_attention" if yes else "full_attention" for yes in recurrent[:layers]],
        "linear_conv_kernel_dim": model.integer("ssm.conv_kernel"),
        "linear_key_head_dim": model.integer("ssm.state_size"),
        "linear_num_key_heads": model.integer("ssm.group_count"),
        "linear_num_value_heads": heads,
        "linear_value_head_dim": model.integer("ssm.inner_size") // heads,
    }
    config["rope_parameters"] |= {
        "mrope_section": [section for section in model.get("rope.dimension_sections", [11, 11, 10, 0]) if section],
        "mrope_interleaved": True,
        "partial_rotary_factor": model.integer("rope.dimension_count") / size,
    }
    return config
