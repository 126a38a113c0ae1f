"""Configs of GPT-2, Bloom, Falcon, Mamba and T5, whose keys are their own."""

from __future__ import annotations

from qhub_gguf.metadata.configs.reading import Config, Model

__all__ = ["bloom", "falcon", "gpt2", "mamba", "t5"]


def gpt2(model: Model) -> Config:
    """Read the config of GPT-2."""
    width, inner = model.integer("embedding_length"), model.get("feed_forward_length")
    # convert_hf_to_gguf writes 4 x the width whatever the model has: the tensor tells.
    inner = (model.shape("blk.0.ffn_up.weight") or [inner])[0]
    return {
        "n_layer": model.integer("block_count"),
        "n_positions": (model.shape("position_embd.weight") or [model.integer("context_length")])[0],
        "n_embd": width,
        "n_inner": None if inner == 4 * width else inner,
        "n_head": model.integer("attention.head_count"),
        "layer_norm_epsilon": model.need("attention.layer_norm_epsilon"),
    }


def bloom(model: Model) -> Config:
    """Read the config of Bloom."""
    return {
        "n_layer": model.integer("block_count"),
        "hidden_size": model.integer("embedding_length"),
        "n_head": model.integer("attention.head_count"),
        "seq_length": model.integer("context_length"),
        "layer_norm_epsilon": model.need("attention.layer_norm_epsilon"),
    }


def falcon(model: Model) -> Config:
    """Read the config of Falcon."""
    heads, kv_heads = model.integer("attention.head_count"), model.get("attention.head_count_kv", 1)
    two_norms = model.any("attn_norm_2.weight")
    grouped = two_norms or kv_heads > 1
    return {
        "num_hidden_layers": model.integer("block_count"),
        "hidden_size": model.integer("embedding_length"),
        "num_attention_heads": heads,
        "num_kv_heads": kv_heads,
        "ffn_hidden_size": model.get("feed_forward_length"),
        "max_position_embeddings": model.get("context_length", 2048),
        "layer_norm_epsilon": model.need("attention.layer_norm_epsilon"),
        "rope_parameters": {"rope_type": "default", "rope_theta": model.get("rope.freq_base", 10000.0)},
        "new_decoder_architecture": grouped,
        "num_ln_in_parallel_attn": (2 if two_norms else 1) if grouped else None,
        "multi_query": True,
        "parallel_attn": True,
        "alibi": False,
        "bias": False,
    }


def mamba(model: Model) -> Config:
    """Read the config of Mamba."""
    width, inner = model.integer("embedding_length"), model.integer("ssm.inner_size")
    return {
        "num_hidden_layers": model.integer("block_count"),
        "hidden_size": width,
        "expand": inner // width,
        "intermediate_size": inner,
        "state_size": model.integer("ssm.state_size"),
        "conv_kernel": model.integer("ssm.conv_kernel"),
        "time_step_rank": model.integer("ssm.time_step_rank"),
        "layer_norm_epsilon": model.need("attention.layer_norm_rms_epsilon"),
        "use_conv_bias": model.any("ssm_conv1d.bias"),
        "use_bias": model.any("ssm_in.bias"),
    }


def t5(model: Model) -> Config:
    """Read the config of T5 and UMT5."""
    gated = model.any("ffn_gate.weight")
    layers = model.integer("block_count")
    config: Config = {
        "num_layers": layers,
        "num_decoder_layers": model.get("decoder_block_count", layers),
        "n_positions": model.integer("context_length"),
        "d_model": model.integer("embedding_length"),
        "d_ff": model.integer("feed_forward_length"),
        "d_kv": model.integer("attention.key_length"),
        "num_heads": model.integer("attention.head_count"),
        "layer_norm_epsilon": model.need("attention.layer_norm_epsilon"),
        "relative_attention_num_buckets": model.integer("attention.relative_buckets_count"),
        "decoder_start_token_id": model.get("decoder_start_token_id", 0),
        "feed_forward_proj": "gated-gelu" if gated else "relu",
    }
    # UMT5 has a table of relative positions in every layer, T5 in the first only.
    umt5 = layers > 1 and model.has("enc.blk.1.attn_rel_b.weight")
    kind = "UMT5" if umt5 else "T5"
    encoder = model.architecture == "t5encoder"
    config["model_type"] = kind.lower()
    config["architectures"] = [f"{kind}EncoderModel" if encoder else f"{kind}ForConditionalGeneration"]
    return config
