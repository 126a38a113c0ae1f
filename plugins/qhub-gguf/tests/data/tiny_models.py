"""Tiny models of every architecture, with weights that are the same on every machine."""

from __future__ import annotations

import zlib
from typing import Any

import torch

_BASE: dict[str, Any] = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_EXPERTS: dict[str, Any] = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
_DELTA: dict[str, Any] = dict(
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    layer_types=["linear_attention", "full_attention"],
)
_T5: dict[str, Any] = dict(
    vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
)
_LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
)
_LONG = dict(
    rope_type="longrope",
    short_factor=[1.0] * 4,
    long_factor=[1.0, 2.0, 3.0, 4.0],
    original_max_position_embeddings=32,
)

# Name -> (class, config class, what the config has besides or instead of _BASE).
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {}),
    "llama-bias": ("LlamaForCausalLM", "LlamaConfig", dict(attention_bias=True, mlp_bias=True)),
    "llama3": ("LlamaForCausalLM", "LlamaConfig", dict(rope_scaling=_LLAMA3, tie_word_embeddings=True)),
    "mistral": ("MistralForCausalLM", "MistralConfig", dict(head_dim=16)),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", dict(num_local_experts=4, num_experts_per_tok=2)),
    "granite": (
        "GraniteForCausalLM",
        "GraniteConfig",
        dict(attention_multiplier=0.25, embedding_multiplier=12.0, residual_multiplier=0.5, logits_scaling=4.0),
    ),
    "smollm3": ("SmolLM3ForCausalLM", "SmolLM3Config", {}),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", {}),
    "cohere": ("CohereForCausalLM", "CohereConfig", dict(use_qk_norm=True)),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {}),
    "qwen2_moe": ("Qwen2MoeForCausalLM", "Qwen2MoeConfig", _EXPERTS | dict(shared_expert_intermediate_size=24)),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", dict(head_dim=16)),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", _EXPERTS | dict(head_dim=16, norm_topk_prob=True)),
    "qwen3_5": ("Qwen3_5ForCausalLM", "Qwen3_5TextConfig", _DELTA | dict(head_dim=16)),
    "qwen3_5_moe": (
        "Qwen3_5MoeForCausalLM",
        "Qwen3_5MoeTextConfig",
        _DELTA | _EXPERTS | dict(head_dim=16, shared_expert_intermediate_size=24, intermediate_size=None),
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        dict(
            head_dim=8, num_local_experts=4, num_experts_per_tok=2, layer_types=["sliding_attention", "full_attention"]
        ),
    ),
    "minimax_m2": (
        "MiniMaxM2ForCausalLM",
        "MiniMaxM2Config",
        dict(head_dim=8, num_local_experts=4, num_experts_per_tok=2, rotary_dim=8),
    ),
    "lfm2": (
        "Lfm2ForCausalLM",
        "Lfm2Config",
        dict(layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False),
    ),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {}),
    "phi3-long": (
        "Phi3ForCausalLM",
        "Phi3Config",
        dict(rope_scaling=_LONG, original_max_position_embeddings=32),
    ),
    "stablelm": ("StableLmForCausalLM", "StableLmConfig", dict(use_qkv_bias=True)),
    "starcoder2": ("Starcoder2ForCausalLM", "Starcoder2Config", {}),
    "nemotron": ("NemotronForCausalLM", "NemotronConfig", dict(head_dim=8)),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", dict(head_dim=16)),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", dict(head_dim=16, query_pre_attn_scalar=16)),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", dict(head_dim=16, query_pre_attn_scalar=16)),
    "gemma4": (
        "Gemma4ForCausalLM",
        "Gemma4TextConfig",
        dict(head_dim=16, global_head_dim=32, vocab_size_per_layer_input=64, hidden_size_per_layer_input=8),
    ),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", dict(n_embd=32, n_layer=2, n_head=4, n_positions=64)),
    "bloom": ("BloomForCausalLM", "BloomConfig", dict(n_layer=2, n_head=4, seq_length=64)),
    "falcon": ("FalconForCausalLM", "FalconConfig", dict(multi_query=True, alibi=False, bias=False)),
    "falcon40": (
        "FalconForCausalLM",
        "FalconConfig",
        dict(num_kv_heads=2, new_decoder_architecture=True, alibi=False, bias=False),
    ),
    "mamba": ("MambaForCausalLM", "MambaConfig", dict(state_size=8, conv_kernel=4)),
    "t5": ("T5ForConditionalGeneration", "T5Config", _T5 | dict(feed_forward_proj="gated-gelu")),
    "t5-plain": ("T5ForConditionalGeneration", "T5Config", _T5),
    "t5encoder": ("T5EncoderModel", "T5Config", _T5 | dict(feed_forward_proj="gated-gelu")),
    "umt5": ("UMT5ForConditionalGeneration", "UMT5Config", _T5),
}

_OWN_SETTINGS = ("gpt2", "bloom", "t5", "t5-plain", "t5encoder", "umt5", "mamba")
_FALCON = ("intermediate_size", "num_key_value_heads", "max_position_embeddings")


def build(name: str) -> Any:
    """Return the tiny model ``name`` in evaluation mode, its weights computed from their names."""
    import transformers

    model_class, config_class, own = MODELS[name]
    keys = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "hidden_size", "num_hidden_layers")
    settings = {key: _BASE[key] for key in keys} if name in _OWN_SETTINGS else dict(_BASE)
    if name in ("gpt2", "bloom") or "t5" in name:
        settings.pop("num_hidden_layers")
    if name == "gpt2" or "t5" in name:
        settings.pop("hidden_size")
    if name.startswith("falcon"):
        settings = {key: value for key, value in settings.items() if key not in _FALCON}
    settings |= own
    settings = {key: value for key, value in settings.items() if value is not None}
    config = getattr(transformers, config_class)(**settings)
    model = getattr(transformers, model_class)(config).eval()
    with torch.no_grad():
        for tensor_name, tensor in model.state_dict().items():
            tensor.copy_(weights(tensor_name, tuple(tensor.shape)))
    model.tie_weights()
    return model


def weights(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return numbers that depend on ``name`` alone and are multiples of 2^-10, so that adding 1 to them is exact: near
    0, and near 1 for norms."""
    seed = zlib.crc32(name.encode())
    count = int(torch.tensor(shape).prod())
    mixed = (torch.arange(count, dtype=torch.int64) * 2654435761 + seed * 40503) % 65537 % 401
    values = (mixed - 200).float() / 1024
    if "norm" in name and name.endswith("weight") and len(shape) == 1:
        values += 1
    return values.view(shape)
