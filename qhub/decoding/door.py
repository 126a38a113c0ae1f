"""The door in transformers' generation: optimized models are decoded here, all others pass through it.

Imports neither torch nor transformers: it is put in place when transformers' generation is imported, by
:mod:`qhub.autoload`, in processes that may never meet a quantized model.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

__all__ = ["install"]


def install() -> None:
    """Wrap transformers' ``_sample``, which every greedy or sampling ``generate`` ends in; twice is once."""
    from transformers.generation.utils import GenerationMixin

    original = GenerationMixin._sample
    if getattr(original, "_qhub", False):
        return

    @functools.wraps(original)
    def _sample(
        self: Any,
        input_ids: Any,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        decoder = _decoder(self)
        if decoder is not None:
            reason = decoder.refusal(input_ids, generation_config, stopping_criteria, model_kwargs, synced_gpus)
            if reason is None and decoder.free.acquire(blocking=False):
                try:
                    done, cache = decoder.sample(
                        input_ids, logits_processor, stopping_criteria, generation_config, streamer, model_kwargs
                    )
                finally:
                    decoder.free.release()
                return _answer(done, cache, generation_config)
            decoder.say(reason or "another call of generate is under way on the same model")
        return original(
            self,
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            synced_gpus=synced_gpus,
            streamer=streamer,
            **model_kwargs,
        )

    _sample._qhub = True  # type: ignore[attr-defined]
    GenerationMixin._sample = _sample  # type: ignore[method-assign]


def _decoder(model: Any) -> Any:
    """Return the model's decoder; None where neither a quantized tensor nor an optimized model can be."""
    if "qhub.tensor" not in sys.modules:
        return None
    from qhub.decoding.optimizing import decoder_of

    return decoder_of(model)


def _answer(done: Any, cache: Any, config: Any) -> Any:
    if not config.return_dict_in_generate:
        return done.ids
    from transformers.generation.utils import GenerateDecoderOnlyOutput

    return GenerateDecoderOnlyOutput(sequences=done.ids, scores=done.scores, logits=done.logits, past_key_values=cache)
