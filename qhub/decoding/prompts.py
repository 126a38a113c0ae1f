"""Fused forms for the prompt too: fewer operations for the host to start, on transformers' own cache and masks.

Made from what was recognised for decode steps, and taken where a whole prompt comes out as it does without them.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qhub.decoding.layers import Forms, Layer, in_form
from qhub.decoding.recipes import Attention
from qhub.decoding.rounding import disagreement

__all__ = ["prompt_forms"]

logger = logging.getLogger("qhub")


@dataclass
class _PromptAttention:
    """Computes :class:`Attention` for many tokens, as transformers' sdpa does, from one product."""

    form: Attention

    def __call__(self, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        form = self.form
        module: Any = form.module
        cos, sin = kwargs["position_embeddings"]
        flat = form.product(hidden)
        heads = flat.view(*flat.shape[:-1], -1, form.size)
        turned = form.heads + (heads.shape[2] - form.heads) // 2
        if form.norms[0] is None and form.norms[1] is None:
            both = _rotated(heads[:, :, :turned].transpose(1, 2), cos, sin)
            q, k = both[:, : form.heads], both[:, form.heads :]
        else:
            parts = []
            for part, norm in zip(
                (heads[:, :, : form.heads], heads[:, :, form.heads : turned]), form.norms, strict=True
            ):
                normed = part if norm is None else form.family.add_norm(part, None, *norm)[1]
                parts.append(_rotated(normed.transpose(1, 2), cos, sin))
            q, k = parts
        v = heads[:, :, turned:].transpose(1, 2)
        k, v = kwargs["past_key_values"].update(k, v, module.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
        mixed, _ = attend(module, q, k, v, kwargs.get("attention_mask"), dropout=0.0, scaling=form.scale)
        return form.out(mixed.reshape(*hidden.shape[:-1], -1))


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (B, heads, S, D) as transformers' apply_rotary_pos_emb does."""
    size = cos.shape[-1]
    turning = x if size == x.shape[-1] else x[..., :size]
    first, second = turning.chunk(2, dim=-1)
    turned = turning * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]
    return turned if size == x.shape[-1] else torch.cat((turned, x[..., size:]), dim=-1)


def prompt_forms(model: Any, forms: Forms) -> Forms:
    """Return the forms to read prompts with, made from those of a decode step; none where they do not agree."""
    chosen: Forms = {}
    for module, form in forms.items():
        if isinstance(form, Layer):
            if not isinstance(form.attended, Attention) or form.attended.softcap is not None:
                return {}
            # Without the state, whose cache would live as long as these forms.
            attention = _PromptAttention(dataclasses.replace(form.attended, state=None))
            form = copy.copy(form)
            form.attended = attention
            chosen[module] = form
        elif isinstance(form, Attention) or module in _attentions(forms):
            return {}
        else:
            chosen[module] = form
    config = model.config.get_text_config(decoder=True)
    if not chosen or config._attn_implementation != "sdpa":
        return {}
    try:
        reason = _disagreement(model, chosen)
    except Exception as error:
        # Code of the model's may want other arguments; it then reads its prompts itself.
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if reason is not None:
        logger.info("qhub: prompts are read by the model's own code, not by the fused parts (%s)", reason)
        return {}
    return chosen


def _attentions(forms: Forms) -> set[nn.Module]:
    """Return attention modules that are replaced outside of a layer."""
    return {module for module in forms if "o_proj" in module._modules and not isinstance(forms[module], Layer)}


@torch.no_grad()
def _disagreement(model: Any, forms: Forms) -> str | None:
    """Return how the logits and the cache of a short prompt, two rows with one padded, are others with ``forms``."""
    from transformers.cache_utils import DynamicCache

    device = model.get_input_embeddings().weight.device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.get_input_embeddings().weight.shape[0], (2, 12), generator=generator).to(device)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)

    def read(chosen: Forms) -> dict[str, Tensor]:
        cache: Any = DynamicCache(config=model.config.get_text_config(decoder=True))
        with in_form(chosen):
            logits = model(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            ).logits[:, -1]
        found = {"logits": logits}
        for index, layer in enumerate(cache.layers):
            # Keys hold each token's place; logits depend on distances only.
            found[f"keys of layer {index}"] = layer.keys[:, :, -7:]
            found[f"values of layer {index}"] = layer.values[:, :, -7:]
        return found

    return disagreement(model, read(forms), read({}), lambda: read({}))
