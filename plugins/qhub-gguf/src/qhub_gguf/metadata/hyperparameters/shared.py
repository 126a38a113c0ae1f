"""What most decoders share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qhub.errors import UnsupportedError
from qhub_gguf.container.values import Kind
from qhub_gguf.metadata.keys import Entries
from qhub_gguf.metadata.rope import full_rope

__all__ = ["first", "head_dim", "standard"]

_CONTEXT = ("max_position_embeddings", "n_ctx", "n_positions", "max_length", "max_sequence_length")
_GATING = {"softmax": 1, "sigmoid": 2}


def first(settings: Mapping[str, Any], *names: str) -> Any:
    """Return the first of ``names`` that the config sets; None if there is none."""
    return next((settings[name] for name in names if settings.get(name) is not None), None)


def head_dim(settings: Mapping[str, Any]) -> int:
    """Return the size of an attention head."""
    stated = settings.get("head_dim")
    return int(stated or settings["hidden_size"] // settings["num_attention_heads"])


def standard(entries: Entries, settings: Mapping[str, Any]) -> None:
    """Add what most decoders share."""
    entries.own("block_count", first(settings, "num_hidden_layers", "n_layer", "num_layers"))
    entries.own("context_length", first(settings, *_CONTEXT))
    entries.own("embedding_length", first(settings, "hidden_size", "n_embd"))
    entries.own("feed_forward_length", first(settings, "intermediate_size", "n_inner"))
    entries.own("attention.head_count", first(settings, "num_attention_heads", "n_head"))
    kv_heads = first(settings, "num_key_value_heads")
    entries.own("attention.head_count_kv", kv_heads, Kind.INT32 if isinstance(kv_heads, list) else None)
    _rope(entries, settings)
    entries.real("attention.layer_norm_rms_epsilon", first(settings, "rms_norm_eps", "norm_eps"))
    entries.real(
        "attention.layer_norm_epsilon", first(settings, "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon")
    )
    experts = first(settings, "num_local_experts", "num_experts", "n_routed_experts")
    entries.own("expert_count", experts)
    entries.own("expert_used_count", first(settings, "num_experts_per_tok", "top_k_experts") if experts else None)
    scoring = first(settings, "scoring_func")
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
