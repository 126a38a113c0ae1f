"""Calibration text that a model writes itself, for when none is given (Liu et al. 2023, "LLM-QAT", section 3.1)."""

from __future__ import annotations

from typing import Any

import torch

from qhub.calibration import CalibrationOptions
from qhub.errors import ConfigError

__all__ = ["written_samples"]

# A few tokens are taken greedily so that the text finds a subject, the rest is drawn.
_GREEDY = 4
_LONGEST = 512


def written_samples(model: Any, tokenizer: Any, options: CalibrationOptions, length: int) -> list[dict[str, Any]]:
    """Return ``options.samples`` texts of up to 512 tokens, each begun with another random token.

    Raises :class:`ConfigError` for a model that writes no text.
    """
    if not model.can_generate() or getattr(model.config, "is_encoder_decoder", False):
        raise ConfigError(
            f"a {type(model).__name__} writes no text by itself: give calibration data (a text or jsonl file, strings, "
            "or dictionaries of what the model takes)"
        )
    length = min(length, _LONGEST)
    vocabulary = model.config.get_text_config().vocab_size
    special = set(getattr(tokenizer, "all_special_ids", []))
    allowed = torch.tensor([token for token in range(vocabulary) if token not in special])
    generator = torch.Generator().manual_seed(options.seed)
    first = allowed[torch.randint(len(allowed), (options.samples, 1), generator=generator)]
    start = getattr(tokenizer, "bos_token_id", None)
    if start is not None:
        first = torch.cat([torch.full_like(first, start), first], dim=1)
    made = []
    device = model.get_input_embeddings().weight.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(options.seed)
        for batch in first.split(max(options.batch_size or 16, 16)):
            ids = batch.to(device)
            common = {"pad_token_id": 0, "use_cache": True}
            greedy = min(_GREEDY, length - ids.shape[1])
            ids = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=greedy,
                min_new_tokens=greedy,
                **common,
            )
            rest = length - ids.shape[1]
            ids = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                top_k=0,
                max_new_tokens=rest,
                min_new_tokens=rest,
                **common,
            )
            made += [{"input_ids": one[None].cpu()} for one in ids]
    return made
