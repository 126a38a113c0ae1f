"""From a transformers config to the hyperparameters of a GGUF file, under llama.cpp's keys.

Source: ``set_gguf_parameters`` of the model classes in convert_hf_to_gguf (llama.cpp, conversion/*.py) and gguf-py's
constants.py; the tests compare the result with files that it wrote.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from math import log, sqrt
from typing import Any

from qhub.errors import UnsupportedError
from qhub_gguf.container.values import Kind, Value
from qhub_gguf.metadata.keys import Entries
from qhub_gguf.metadata.rope import full_attention, full_rope
from qhub_gguf.names import architecture_of_config

__all__ = ["hyperparameters"]

logger = logging.getLogger(__name__)

_CONTEXT = ("max_position_embeddings", "n_ctx", "n_positions", "max_length", "max_sequence_length")
_GATING = {"softmax": 1, "sigmoid": 2}


def hyperparameters(config: Any, architecture: str | None = None) -> dict[str, Value]:
    """Return the ``{architecture}.*`` entries for a config; ``architecture``: chosen after its model type if None.

    Raises :class:`UnsupportedError` for a model type or setting that GGUF has no key for.
    """
    architecture = architecture or architecture_of_config(config)
    entries = Entries(architecture)
    settings = config.to_dict()
    _FAMILIES.get(architecture, _standard)(entries, settings)
    for said in _unsaid(architecture, settings):
        logger.warning("GGUF cannot say %s: llama.cpp, and whoever reads the file, will compute otherwise", said)
    return entries.values


def _unsaid(architecture: str, settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield settings that llama.cpp takes for granted and this config has differently."""
    granted: dict[str, Any] = {}
    if architecture in ("qwen3moe", "qwen2moe"):
        granted["norm_topk_prob"] = architecture == "qwen3moe"
    if architecture in ("gemma2", "gemma3"):
        largest = settings["num_hidden_layers"] == {"gemma2": 46, "gemma3": 62}[architecture]
        width = settings["hidden_size"] // settings["num_attention_heads"]
        granted["query_pre_attn_scalar"] = width if largest else settings["head_dim"]
    for key, value in granted.items():
        if settings.get(key) is not None and settings[key] != value:
            yield f"{key}={settings[key]!r} (it stands for {value!r})"


def _first(settings: Mapping[str, Any], *names: str) -> Any:
    return next((settings[name] for name in names if settings.get(name) is not None), None)


def _head_dim(settings: Mapping[str, Any]) -> int:
    stated = settings.get("head_dim")
    return int(stated or settings["hidden_size"] // settings["num_attention_heads"])


def _standard(entries: Entries, settings: Mapping[str, Any]) -> None:
    """Add what most decoders share."""
    entries.own("block_count", _first(settings, "num_hidden_layers", "n_layer", "num_layers"))
    entries.own("context_length", _first(settings, *_CONTEXT))
    entries.own("embedding_length", _first(settings, "hidden_size", "n_embd"))
    entries.own("feed_forward_length", _first(settings, "intermediate_size", "n_inner"))
    entries.own("attention.head_count", _first(settings, "num_attention_heads", "n_head"))
    kv_heads = _first(settings, "num_key_value_heads")
    entries.own("attention.head_count_kv", kv_heads, Kind.INT32 if isinstance(kv_heads, list) else None)
    _rope(entries, settings)
    entries.real("attention.layer_norm_rms_epsilon", _first(settings, "rms_norm_eps", "norm_eps"))
    entries.real(
        "attention.layer_norm_epsilon", _first(settings, "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon")
    )
    experts = _first(settings, "num_local_experts", "num_experts", "n_routed_experts")
    entries.own("expert_count", experts)
    entries.own("expert_used_count", _first(settings, "num_experts_per_tok", "top_k_experts") if experts else None)
    scoring = _first(settings, "scoring_func")
    if scoring is not None:
        if scoring not in _GATING:
            raise UnsupportedError(f"GGUF has no number for the experts' scoring function {scoring!r}")
        entries.own("expert_gating_func", _GATING[scoring])
    if settings.get("head_dim") is not None:
        entries.own("attention.key_length", settings["head_dim"])
        entries.own("attention.value_length", settings["head_dim"])


def _rope(entries: Entries, settings: Mapping[str, Any]) -> None:
    rope = full_rope(settings)
    kind, factor = rope.get("rope_type"), rope.get("factor")
    if kind in ("linear", "yarn") and factor is not None:
        entries.own("rope.scaling.type", kind)
        entries.real("rope.scaling.factor", factor)
    elif kind in ("su", "longrope"):
        entries.own("rope.scaling.type", "longrope")
    elif kind not in (None, "default", "llama3", "proportional"):
        raise UnsupportedError(f"GGUF has no rotary embedding of type {kind!r}")
    if kind == "yarn":
        entries.own("rope.scaling.original_context_length", rope.get("original_max_position_embeddings"))
        entries.real("rope.scaling.yarn_ext_factor", rope.get("extrapolation_factor"))
        entries.real("rope.scaling.yarn_attn_factor", rope.get("attention_factor", rope.get("attn_factor")))
        entries.real("rope.scaling.yarn_beta_fast", rope.get("beta_fast"))
        entries.real("rope.scaling.yarn_beta_slow", rope.get("beta_slow"))
    sections = rope.get("mrope_section")
    if sections is not None:
        entries.own("rope.dimension_sections", (list(sections) + [0] * 4)[:4], Kind.INT32)
    entries.real("rope.freq_base", rope.get("rope_theta"))
    sliding = (settings.get("rope_parameters") or {}).get("sliding_attention")
    if isinstance(sliding, Mapping):
        entries.real("rope.freq_base_swa", sliding.get("rope_theta"))


def _llama(entries: Entries, settings: Mapping[str, Any]) -> None:
    _standard(entries, settings)
    entries.own("vocab_size", settings["vocab_size"])
    entries.own("rope.dimension_count", _head_dim(settings))


def _granite(entries: Entries, settings: Mapping[str, Any]) -> None:
    _llama(entries, {**settings, "head_dim": None})
    for ours, theirs in _GRANITE.items():
        entries.real(ours, settings.get(theirs))


def _cohere(entries: Entries, settings: Mapping[str, Any]) -> None:
    _standard(entries, settings)
    entries.real("logit_scale", settings["logit_scale"])
    entries.own("rope.scaling.type", "none")


def _experts(entries: Entries, settings: Mapping[str, Any]) -> None:
    _standard(entries, settings)
    entries.own("expert_feed_forward_length", settings.get("moe_intermediate_size"))
    entries.own("expert_shared_feed_forward_length", settings.get("shared_expert_intermediate_size"))


def _minimax_m2(entries: Entries, settings: Mapping[str, Any]) -> None:
    # transformers computes with a sigmoid whatever the config says; llama.cpp wants to be told.
    _standard(entries, {**settings, "scoring_func": "sigmoid"})
    entries.own("expert_feed_forward_length", settings["intermediate_size"])
    partial = full_rope(settings).get("partial_rotary_factor", 1.0)
    entries.own("rope.dimension_count", settings.get("rotary_dim") or int(_head_dim(settings) * partial))


def _gpt_oss(entries: Entries, settings: Mapping[str, Any]) -> None:
    _standard(entries, settings)
    entries.own("attention.sliding_window", settings.get("sliding_window"))
    entries.own("expert_feed_forward_length", settings["intermediate_size"])


def _lfm2(entries: Entries, settings: Mapping[str, Any]) -> None:
    per_layer = [settings["num_key_value_heads"] if kind != "conv" else 0 for kind in settings["layer_types"]]
    width = int(settings["intermediate_size"])
    if settings.get("block_auto_adjust_ff_dim"):
        width = int(2 * width / 3)
        if settings.get("block_ffn_dim_multiplier") is not None:
            width = int(settings["block_ffn_dim_multiplier"] * width)
        multiple = settings["block_multiple_of"]
        width = multiple * ((width + multiple - 1) // multiple)
    _standard(entries, {**settings, "num_key_value_heads": per_layer, "intermediate_size": width})
    entries.own("vocab_size", settings["vocab_size"])
    entries.own("shortconv.l_cache", settings["conv_L_cache"])


def _nemotron(entries: Entries, settings: Mapping[str, Any]) -> None:
    _standard(entries, settings)
    entries.own("vocab_size", settings["vocab_size"])
    entries.real("attention.layer_norm_epsilon", settings["norm_eps"])
    rope = full_rope(settings)
    partial = rope.get("partial_rotary_factor", settings.get("partial_rotary_factor", 1.0))
    entries.own("rope.dimension_count", int(partial * settings["hidden_size"]) // settings["num_attention_heads"])
    if rope.get("factor") is None:
        entries.own("rope.scaling.type", "none")


def _phi3(entries: Entries, settings: Mapping[str, Any]) -> None:
    rope = full_rope(settings)
    original = rope.get("original_max_position_embeddings", settings.get("original_max_position_embeddings"))
    rotary = int(rope.get("partial_rotary_factor", 1.0) * settings["hidden_size"]) // settings["num_attention_heads"]
    entries.own("context_length", settings["max_position_embeddings"])
    entries.own("rope.scaling.original_context_length", original)
    entries.own("embedding_length", settings["hidden_size"])
    entries.own("feed_forward_length", settings["intermediate_size"])
    entries.own("block_count", settings["num_hidden_layers"])
    entries.own("attention.head_count", settings["num_attention_heads"])
    entries.own("attention.head_count_kv", settings["num_key_value_heads"])
    entries.real("attention.layer_norm_rms_epsilon", settings["rms_norm_eps"])
    entries.own("rope.dimension_count", rotary)
    entries.real("rope.freq_base", rope.get("rope_theta"))
    entries.own("attention.sliding_window", settings.get("sliding_window") or 0)
    if rope.get("long_factor"):
        entries.real("rope.scaling.attn_factor", longrope_attention(settings))


def longrope_attention(settings: Mapping[str, Any]) -> float:
    """Return what attention is scaled by with long rotary factors (``Phi3MiniModel.generate_extra_tensors``)."""
    rope = full_rope(settings)
    original = rope.get("original_max_position_embeddings") or settings["original_max_position_embeddings"]
    scale = settings["max_position_embeddings"] / original
    if scale <= 1:
        return 1.0
    return 0.1 * log(scale) + 1 if rope.get("rope_type") == "yarn" else sqrt(1 + log(scale) / log(original))


def _stablelm(entries: Entries, settings: Mapping[str, Any]) -> None:
    rope = full_rope(settings)
    partial = rope.get("partial_rotary_factor", settings.get("partial_rotary_factor", 0.25))
    entries.own("context_length", settings["max_position_embeddings"])
    entries.own("embedding_length", settings["hidden_size"])
    entries.own("block_count", settings["num_hidden_layers"])
    entries.own("feed_forward_length", settings["intermediate_size"])
    entries.own("rope.dimension_count", int(partial * (settings["hidden_size"] // settings["num_attention_heads"])))
    entries.own("attention.head_count", settings["num_attention_heads"])
    entries.own("attention.head_count_kv", settings["num_key_value_heads"])
    entries.own("use_parallel_residual", bool(settings.get("use_parallel_residual", True)))
    entries.real("attention.layer_norm_epsilon", settings["layer_norm_eps"])


def _gemma(entries: Entries, settings: Mapping[str, Any]) -> None:
    entries.own("context_length", settings["max_position_embeddings"])
    entries.own("embedding_length", settings["hidden_size"])
    entries.own("block_count", settings["num_hidden_layers"])
    entries.own("feed_forward_length", settings["intermediate_size"])
    entries.own("attention.head_count", settings["num_attention_heads"])
    entries.own("attention.head_count_kv", settings["num_key_value_heads"])
    entries.real("attention.layer_norm_rms_epsilon", settings["rms_norm_eps"])
    entries.own("attention.key_length", settings["head_dim"])
    entries.own("attention.value_length", settings["head_dim"])


def _gemma2(entries: Entries, settings: Mapping[str, Any]) -> None:
    _gemma(entries, settings)
    entries.real("attn_logit_softcapping", settings.get("attn_logit_softcapping"))
    entries.real("final_logit_softcapping", settings.get("final_logit_softcapping"))
    entries.own("attention.sliding_window", settings["sliding_window"])


def _gemma3(entries: Entries, settings: Mapping[str, Any]) -> None:
    _standard(entries, settings)
    entries.real("final_logit_softcapping", settings.get("final_logit_softcapping"))
    entries.own("attention.sliding_window", settings["sliding_window"])


def _gemma4(entries: Entries, settings: Mapping[str, Any]) -> None:
    sliding = [kind == "sliding_attention" for kind in settings["layer_types"]]
    _gemma3(entries, settings)
    entries.own("attention.shared_kv_layers", settings["num_kv_shared_layers"])
    entries.own("embedding_length_per_layer_input", settings.get("hidden_size_per_layer_input") or 0)
    entries.own("attention.sliding_window_pattern", sliding, Kind.BOOL)
    full = full_attention(settings, "head_dim", "global_head_dim")
    entries.own("attention.key_length", full)
    entries.own("attention.value_length", full)
    entries.own("attention.key_length_swa", settings["head_dim"])
    entries.own("attention.value_length_swa", settings["head_dim"])
    entries.own("expert_feed_forward_length", _first(settings, "expert_intermediate_size", "moe_intermediate_size"))
    layers = settings["num_hidden_layers"]
    if settings.get("use_double_wide_mlp"):
        own = layers - settings["num_kv_shared_layers"]
        widths = [settings["intermediate_size"] * (1 if layer < own else 2) for layer in range(layers)]
        entries.own("feed_forward_length", widths, Kind.INT32)
    full_heads = full_attention(settings, "num_key_value_heads", "num_global_key_value_heads")
    if full_heads != settings["num_key_value_heads"]:
        heads = [settings["num_key_value_heads"] if swa else full_heads for swa in sliding]
        entries.own("attention.head_count_kv", heads, Kind.INT32)
    entries.own("rope.dimension_count", full)
    entries.own("rope.dimension_count_swa", settings["head_dim"])


def _gpt2(entries: Entries, settings: Mapping[str, Any]) -> None:
    entries.own("block_count", settings["n_layer"])
    entries.own("context_length", settings["n_positions"])
    entries.own("embedding_length", settings["n_embd"])
    entries.own("feed_forward_length", settings.get("n_inner") or 4 * settings["n_embd"])
    entries.own("attention.head_count", settings["n_head"])
    entries.real("attention.layer_norm_epsilon", settings["layer_norm_epsilon"])


def _bloom(entries: Entries, settings: Mapping[str, Any]) -> None:
    width = settings["hidden_size"]
    entries.own("context_length", settings.get("seq_length") or width)
    entries.own("embedding_length", width)
    entries.own("feed_forward_length", 4 * width)
    entries.own("block_count", settings["n_layer"])
    entries.own("attention.head_count", settings["n_head"])
    entries.own("attention.head_count_kv", settings["n_head"])
    entries.real("attention.layer_norm_epsilon", settings["layer_norm_epsilon"])


def _falcon(entries: Entries, settings: Mapping[str, Any]) -> None:
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


def _mamba(entries: Entries, settings: Mapping[str, Any]) -> None:
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


def _t5(entries: Entries, settings: Mapping[str, Any]) -> None:
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


def _qwen35(entries: Entries, settings: Mapping[str, Any]) -> None:
    _experts(entries, settings)
    heads = settings["linear_num_value_heads"]
    entries.own("ssm.conv_kernel", settings["linear_conv_kernel_dim"])
    entries.own("ssm.state_size", settings["linear_key_head_dim"])
    entries.own("ssm.group_count", settings["linear_num_key_heads"])
    entries.own("ssm.time_step_rank", heads)
    entries.own("ssm.inner_size", settings["linear_value_head_dim"] * heads)
    entries.own("attention.recurrent_layers", [kind == "linear_attention" for kind in settings["layer_types"]])
    entries.own("full_attention_interval", settings.get("full_attention_interval") or 4)
    rope = full_rope(settings)
    partial = rope.get("partial_rotary_factor", settings.get("partial_rotary_factor", 0.25))
    entries.own("rope.dimension_count", int(_head_dim(settings) * partial))
    if rope.get("mrope_section") is None:
        entries.own("rope.dimension_sections", [11, 11, 10, 0], Kind.INT32)


# What Granite multiplies by, under llama.cpp's keys.
_GRANITE = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}

_FAMILIES: dict[str, Callable[[Entries, Mapping[str, Any]], None]] = {
    "llama": _llama,
    "deci": _llama,
    "smollm3": _llama,
    "granite": _granite,
    "command-r": _cohere,
    "qwen2moe": _experts,
    "qwen3moe": _experts,
    "minimax-m2": _minimax_m2,
    "gpt-oss": _gpt_oss,
    "lfm2": _lfm2,
    "nemotron": _nemotron,
    "phi3": _phi3,
    "stablelm": _stablelm,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "gemma4": _gemma4,
    "gpt2": _gpt2,
    "bloom": _bloom,
    "falcon": _falcon,
    "mamba": _mamba,
    "t5": _t5,
    "t5encoder": _t5,
    "qwen35": _qwen35,
    "qwen35moe": _qwen35,
}
