"""Why a model, or one call of ``generate``, runs through transformers' own loop: every reason is a sentence."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["of_call", "of_model"]

# Arguments of a model's forward that stay the same, or that the decode step advances itself.
_HANDLED = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}
_ATTENTIONS = ("sdpa", "eager")
_LAYERS = {"full_attention", "sliding_attention"}


def of_model(model: nn.Module, devices: set[torch.device]) -> str | None:
    """Return why ``model``, whose weights lie on ``devices``, cannot be decoded in static steps; None when nothing
    speaks against trying."""
    config: Any = model.config
    if config.is_encoder_decoder:
        return "encoder-decoder models keep two caches"
    if len(devices) > 1:
        return f"its weights lie on several devices ({', '.join(sorted(map(str, devices)))})"
    if next(iter(devices)).type == "meta" or (getattr(model, "hf_device_map", {}) and _offloaded(model)):
        return "some of its weights are offloaded"
    text = config.get_text_config(decoder=True)
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"]) - _LAYERS
    if kinds:
        return f"it has layers of the type {', '.join(sorted(kinds))}"
    if text._attn_implementation not in _ATTENTIONS:
        return f"its attention is {text._attn_implementation!r}; {' and '.join(_ATTENTIONS)} take a static cache"
    if getattr(model, "_can_compile_fullgraph", False) is not True:
        return "transformers does not say that its step is free of host decisions (_can_compile_fullgraph)"
    return None


def _offloaded(model: nn.Module) -> bool:
    places = {str(place) for place in model.hf_device_map.values()}  # type: ignore[union-attr, operator]
    return bool(places & {"disk", "meta"}) or len(places) > 1


def of_call(
    model: nn.Module, patched: nn.Module | None, ids: Any, config: Any, arguments: dict[str, Any], synced: bool
) -> str | None:
    """Return why this call of ``generate`` takes transformers' loop; None when it may take the static step.

    ``patched``: a module with hooks, if there is one. ``config``: the call's generation config. ``arguments``: what
    goes to the model's forward.
    """
    if synced:
        return "ranks generate in step with each other (synced_gpus)"
    if model.training:
        return "the model is in training mode"
    if config.use_cache is False or not arguments.get("use_cache", True):
        return "use_cache is off"
    if config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states):
        return "attentions or hidden states are asked for"
    if getattr(config, "is_assistant", False):
        return "the model drafts for another one"
    if config.cache_implementation not in (None, "dynamic"):
        return f"cache_implementation={config.cache_implementation!r} is asked for"
    if config.prefill_chunk_size is not None or config.compile_config is not None:
        return "a chunked prompt or a compile_config is asked for"
    unknown = sorted(
        name for name, value in arguments.items() if name not in _HANDLED and value is not None and value is not False
    )
    if unknown:
        return f"the model's forward is given {', '.join(unknown)}"
    if "prepare_inputs_for_generation" in model.__dict__:
        return "prepare_inputs_for_generation was replaced on the model"
    if patched is not None:
        # A replayed step calls no Python, so hooks would see nothing.
        name = next(name for name, module in model.named_modules() if module is patched)
        return f"{name or 'the model'} has forward hooks, or a forward of its own"
    if torch.is_autocast_enabled(ids.device.type):
        return "autocast is on"
    if ids.shape[1] == 0 or ids.dtype != torch.long:
        return "the prompt holds no tokens"
    return of_cache(arguments.get("past_key_values")) or of_mask(arguments.get("attention_mask"), ids)


def of_cache(cache: Any) -> str | None:
    """Return why the numbers of ``cache`` cannot be moved to a static one and back."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    if type(cache) is not DynamicCache:
        return f"its cache is a {type(cache).__name__}"
    strange = {type(layer).__name__ for layer in cache.layers} - {"DynamicLayer", "DynamicSlidingWindowLayer"}
    if strange or any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers):
        return f"its cache has layers of the type {', '.join(sorted(strange))}"
    if cache.offloading:
        return "its cache is offloaded"
    return None


def of_mask(mask: Any, ids: Any) -> str | None:
    """Return why ``mask`` is no left padding; reads it once."""
    if mask is None:
        return None
    if mask.ndim != 2 or mask.shape[0] != ids.shape[0]:
        return "the attention mask is not one row a sequence"
    seen = mask != 0
    if bool((seen.int().diff(dim=1) < 0).any()) or not bool(seen[:, -1].all()):
        return "the attention mask hides more than padding at the left"
    return None
