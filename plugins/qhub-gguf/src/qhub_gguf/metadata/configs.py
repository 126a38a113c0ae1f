"""From the metadata of a GGUF file to the dict of a transformers config.

transformers' own reader needs gguf-py and leaves out much that a file says (head sizes, widths of experts, scaling of
rotary embeddings, Mixtral); this one needs nothing and says it all. The keys are the inverse of
:mod:`qhub_gguf.metadata.hyperparameters`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from qhub.errors import CheckpointError
from qhub_gguf.container import GgufFile
from qhub_gguf.metadata.rope import llama3_settings
from qhub_gguf.names import ARCHITECTURES, architecture_of

__all__ = ["config_of"]

Config = dict[str, Any]

_GATING = {0: "none", 1: "softmax", 2: "sigmoid"}


def config_of(file: GgufFile) -> Config:
    """Return the config dict, with ``model_type`` and ``architectures``, of the model in ``file``.

    Raises :class:`CheckpointError` naming the key that is missing or of the wrong kind, and
    :class:`qhub.errors.UnsupportedError` for an architecture that is not known here.
    """
    model = _Model(file)
    config = _FAMILIES.get(model.architecture, _decoder)(model)
    config.setdefault("model_type", ARCHITECTURES[model.architecture].model_types[0])
    if "architectures" not in config:
        config["architectures"] = [_CLASSES[config["model_type"]]]
    embeddings = model.shape("token_embd.weight")
    # llama.cpp writes the output head only where it is not the embeddings.
    config["tie_word_embeddings"] = "output.weight" not in file.tensors
    config["vocab_size"] = embeddings[0] if embeddings else model.get_whole("tokenizer.ggml.tokens", 0)
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("padding", "pad")):
        token = file.get(f"tokenizer.ggml.{ours}_token_id")
        inside = isinstance(token, int) and token < config["vocab_size"]
        config.setdefault(f"{theirs}_token_id", token if inside else None)
    return config


class _Model:
    """Reads the keys of one architecture from a file."""

    def __init__(self, file: GgufFile) -> None:
        self.file, self.architecture = file, architecture_of(file)
        self.prefix = str(file.get("general.architecture"))

    def get(self, key: str, default: Any = None) -> Any:
        """Return ``{architecture}.{key}`` or ``default``."""
        value = self.file.get(f"{self.prefix}.{key}", default)
        return _shortest(value) if isinstance(value, float) else value

    def need(self, key: str) -> Any:
        """Return ``{architecture}.{key}``; :class:`CheckpointError` where it is missing."""
        value = self.get(key)
        if value is None:
            raise CheckpointError(f"{self.file.path}: the metadata key {self.prefix}.{key!s} is missing")
        return value

    def integer(self, key: str) -> int:
        """Return a compulsory count, which some files give per layer: then the largest."""
        value = self.need(key)
        if isinstance(value, list) and value and all(isinstance(number, int) for number in value):
            value = max(value)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise CheckpointError(f"{self.file.path}: {self.prefix}.{key} must be a count, found {str(value)[:60]}")
        return value

    def get_whole(self, key: str, default: int) -> int:
        """Return the number of elements of the array ``key``."""
        value = self.file.metadata.get(key)
        return default if value is None else value.count

    def has(self, tensor: str) -> bool:
        """Return whether the file has the tensor."""
        return tensor in self.file.tensors

    def shape(self, tensor: str) -> tuple[int, ...]:
        """Return the tensor's shape; empty where the file does not have it."""
        info = self.file.tensors.get(tensor)
        return info.shape if info is not None else ()

    def any(self, ending: str) -> bool:
        """Return whether any tensor's name ends so."""
        return any(name.endswith(ending) for name in self.file.tensors)


def _shortest(number: float) -> float:
    """Return the shortest decimal that is the same FLOAT32: 1e-06 instead of 9.999999974752427e-07."""
    exact = struct.pack("<f", number)
    return next(
        (short for digits in range(1, 9) if struct.pack("<f", short := float(f"{number:.{digits}g}")) == exact), number
    )


def _decoder(model: _Model) -> Config:
    """Read what most decoders share."""
    config: Config = {
        "num_hidden_layers": model.integer("block_count"),
        "max_position_embeddings": model.get("context_length"),
        "hidden_size": model.integer("embedding_length"),
        "num_attention_heads": model.integer("attention.head_count"),
        "intermediate_size": model.integer("feed_forward_length") if model.get("feed_forward_length") else None,
    }
    if model.get("attention.head_count_kv") is not None:
        config["num_key_value_heads"] = model.integer("attention.head_count_kv")
    if model.get("attention.key_length") is not None:
        config["head_dim"] = model.integer("attention.key_length")
    eps = model.get("attention.layer_norm_rms_epsilon")
    if eps is not None:
        config["rms_norm_eps"] = eps
    config["rope_parameters"] = _rope(model, config)
    return {key: value for key, value in config.items() if value is not None}


def _rope(model: _Model, config: Config) -> Config:
    theta = model.get("rope.freq_base", 10000.0)
    rope: Config = {"rope_type": "default", "rope_theta": theta}
    kind, factor = model.get("rope.scaling.type", "none"), model.get("rope.scaling.factor")
    if kind in ("linear", "yarn") and factor:
        rope |= {"rope_type": kind, "factor": factor}
    if rope["rope_type"] == "yarn":
        for ours, theirs in (
            ("original_context_length", "original_max_position_embeddings"),
            ("yarn_attn_factor", "attention_factor"),
            ("yarn_beta_fast", "beta_fast"),
            ("yarn_beta_slow", "beta_slow"),
        ):
            if model.get(f"rope.scaling.{ours}") is not None:
                rope[theirs] = model.get(f"rope.scaling.{ours}")
    if model.has("rope_freqs.weight") and model.architecture in ("llama", "deci"):
        factors = model.file.tensor("rope_freqs.weight")
        scaling = llama3_settings(factors, theta, config.get("max_position_embeddings") or 0)
        if bool((factors == 1).all()):
            scaling = {}
        if scaling is None:
            raise CheckpointError(
                f"{model.file.path}: tensor 'rope_freqs.weight' is no scaling of rotary embeddings that transformers "
                "has (it is not Llama 3's)"
            )
        rope |= scaling
    return rope


def _partial(model: _Model, config: Config, head_dim: int) -> None:
    """Say which part of each head is turned."""
    turned = model.get("rope.dimension_count")
    if turned and turned != head_dim:
        config["partial_rotary_factor"] = config["rope_parameters"]["partial_rotary_factor"] = turned / head_dim


def _head_dim(config: Config) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _llama(model: _Model) -> Config:
    config = _decoder(model)
    config.setdefault("head_dim", model.get("rope.dimension_count") or _head_dim(config))
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


def _qwen(model: _Model) -> Config:
    config = _decoder(model)
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


def _granite(model: _Model) -> Config:
    config = _llama(model)
    for ours, theirs in (
        ("attention.scale", "attention_multiplier"),
        ("embedding_scale", "embedding_multiplier"),
        ("residual_scale", "residual_multiplier"),
        ("logit_scale", "logits_scaling"),
    ):
        config[theirs] = model.get(ours, 1.0)
    del config["head_dim"]
    return config


def _cohere(model: _Model) -> Config:
    config = _decoder(model)
    config |= {
        "layer_norm_eps": model.need("attention.layer_norm_epsilon"),
        "logit_scale": model.get("logit_scale", 1.0),
        "use_qk_norm": model.any("attn_q_norm.weight"),
    }
    return config


def _minimax_m2(model: _Model) -> Config:
    config = _decoder(model)
    config |= {
        "intermediate_size": model.get("expert_feed_forward_length") or config["intermediate_size"],
        "num_local_experts": model.integer("expert_count"),
        "num_experts_per_tok": model.integer("expert_used_count"),
        "scoring_func": _GATING.get(model.get("expert_gating_func", 2), "sigmoid"),
        "use_routing_bias": model.any("exp_probs_b.bias"),
    }
    _partial(model, config, _head_dim(config))
    config["rotary_dim"] = model.get("rope.dimension_count") or _head_dim(config)
    return config


def _gpt_oss(model: _Model) -> Config:
    config = _decoder(model)
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


def _stablelm(model: _Model) -> Config:
    config = _decoder(model)
    config.pop("rms_norm_eps", None)
    config |= {
        "layer_norm_eps": model.need("attention.layer_norm_epsilon"),
        "use_qkv_bias": model.any("attn_q.bias"),
        "qk_layernorm": model.any("attn_q_norm.weight"),
        "use_parallel_residual": not model.any("ffn_norm.weight"),
    }
    _partial(model, config, _head_dim(config))
    return config


def _starcoder2(model: _Model) -> Config:
    config = _decoder(model)
    config |= {"norm_epsilon": model.need("attention.layer_norm_epsilon"), "use_bias": model.any("attn_q.bias")}
    config["sliding_window"] = model.get("attention.sliding_window") or None
    return config


def _nemotron(model: _Model) -> Config:
    config = _decoder(model)
    config.pop("rms_norm_eps", None)
    config["norm_eps"] = model.get("attention.layer_norm_epsilon") or model.need("attention.layer_norm_rms_epsilon")
    _partial(model, config, _head_dim(config))
    return config


def _phi3(model: _Model) -> Config:
    config = _decoder(model)
    config["sliding_window"] = model.get("attention.sliding_window") or None
    original = model.get("rope.scaling.original_context_length") or config["max_position_embeddings"]
    config["original_max_position_embeddings"] = original
    _partial(model, config, _head_dim(config))
    if model.has("rope_factors_long.weight"):
        config["rope_parameters"] |= {
            "rope_type": "longrope",
            "original_max_position_embeddings": original,
            "long_factor": model.file.tensor("rope_factors_long.weight").tolist(),
            "short_factor": model.file.tensor("rope_factors_short.weight").tolist(),
        }
    return config


def _gemma(model: _Model) -> Config:
    config = _decoder(model)
    size, layers = _head_dim(config), config["num_hidden_layers"]
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


def _sliding_rope(model: _Model) -> Config:
    return {"rope_type": "default", "rope_theta": model.get("rope.freq_base_swa", 10000.0)}


def _gemma4(model: _Model) -> Config:
    config = _gemma(model)
    layers = range(config["num_hidden_layers"])
    pattern = model.need("attention.sliding_window_pattern")
    full_size = model.integer("attention.key_length")
    kv_heads = model.get("attention.head_count_kv")
    if isinstance(kv_heads, list):
        config["num_key_value_heads"] = next(heads for heads, swa in zip(kv_heads, pattern, strict=True) if swa)
        config["num_global_key_value_heads"] = next(
            heads for heads, swa in zip(kv_heads, pattern, strict=True) if not swa
        )
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


def _gpt2(model: _Model) -> Config:
    width, inner = model.integer("embedding_length"), model.get("feed_forward_length")
    # convert_hf_to_gguf writes 4 x the width whatever the model has: the tensor tells.
    inner = (model.shape("blk.0.ffn_up.weight") or [inner])[0]
    return {
        "n_layer": model.integer("block_count"),
        "n_positions": model.integer("context_length"),
        "n_embd": width,
        "n_inner": None if inner == 4 * width else inner,
        "n_head": model.integer("attention.head_count"),
        "layer_norm_epsilon": model.need("attention.layer_norm_epsilon"),
    }


def _bloom(model: _Model) -> Config:
    return {
        "n_layer": model.integer("block_count"),
        "hidden_size": model.integer("embedding_length"),
        "n_head": model.integer("attention.head_count"),
        "seq_length": model.integer("context_length"),
        "layer_norm_epsilon": model.need("attention.layer_norm_epsilon"),
    }


def _falcon(model: _Model) -> Config:
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


def _mamba(model: _Model) -> Config:
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


def _t5(model: _Model) -> Config:
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


def _lfm2(model: _Model) -> Config:
    per_layer = model.need("attention.head_count_kv")
    config = _decoder(model)
    config.pop("rms_norm_eps", None)
    config |= {
        "norm_eps": model.need("attention.layer_norm_rms_epsilon"),
        "block_auto_adjust_ff_dim": False,
        "conv_L_cache": model.integer("shortconv.l_cache"),
        "conv_bias": model.any("shortconv.in_proj.bias"),
        "layer_types": ["full_attention" if heads else "conv" for heads in per_layer],
    }
    return config


def _qwen35(model: _Model) -> Config:
    config = _qwen(model)
    config.pop("norm_topk_prob", None)
    layers = model.integer("block_count") - model.get("nextn_predict_layers", 0)
    heads = model.integer("ssm.time_step_rank")
    interval = model.get("full_attention_interval", 4)
    recurrent = model.get("attention.recurrent_layers") or [(layer + 1) % interval != 0 for layer in range(layers)]
    size = _head_dim(config)
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


_FAMILIES: dict[str, Callable[[_Model], Config]] = {
    "llama": _llama,
    "deci": _llama,
    "smollm3": _llama,
    "granite": _granite,
    "olmo2": _decoder,
    "command-r": _cohere,
    "qwen2": _qwen,
    "qwen2moe": _qwen,
    "qwen3": _qwen,
    "qwen3moe": _qwen,
    "minimax-m2": _minimax_m2,
    "gpt-oss": _gpt_oss,
    "stablelm": _stablelm,
    "starcoder2": _starcoder2,
    "nemotron": _nemotron,
    "phi3": _phi3,
    "gemma": _gemma,
    "gemma2": _gemma,
    "gemma3": _gemma,
    "gemma4": _gemma4,
    "gpt2": _gpt2,
    "bloom": _bloom,
    "falcon": _falcon,
    "mamba": _mamba,
    "t5": _t5,
    "t5encoder": _t5,
    "lfm2": _lfm2,
    "qwen35": _qwen35,
    "qwen35moe": _qwen35,
}

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "deci": "DeciLMForCausalLM",
    "granite": "GraniteForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "cohere": "CohereForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "minimax_m2": "MiniMaxM2ForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "stablelm": "StableLmForCausalLM",
    "starcoder2": "Starcoder2ForCausalLM",
    "nemotron": "NemotronForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gemma4_text": "Gemma4ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "bloom": "BloomForCausalLM",
    "falcon": "FalconForCausalLM",
    "mamba": "MambaForCausalLM",
    "lfm2": "Lfm2ForCausalLM",
    "qwen3_5_text": "Qwen3_5ForCausalLM",
    "qwen3_5_moe_text": "Qwen3_5MoeForCausalLM",
}
