"""``qhub.optimize``: plain ``model.generate`` with a static cache, fused steps and CUDA graphs, and the off switch.

Quantized models on a GPU are optimized at their first ``generate``. ``QHUB_OPTIMIZE=0`` turns that off for a process,
``qhub.optimize(model, False)`` for a model.
"""

from __future__ import annotations

import functools
import os
import weakref
from typing import Any

from torch import nn

from qhub.decoding.decoder import Decoder
from qhub.tensor import QuantizedTensor

__all__ = ["decoder_of", "install", "optimize"]

_decoders: weakref.WeakKeyDictionary[nn.Module, Decoder | None] = weakref.WeakKeyDictionary()


def optimize(model: Any, enable: bool = True) -> Any:
    """Make ``model.generate(...)`` fast, and return the model.

    ``model``: a transformers model with ``generate``, quantized or not, or a PEFT model around one. Greedy search and
    sampling run on a static cache, one decode step replayed as a CUDA graph (on a CPU: run eagerly); projections that
    share an input become one product. Whatever cannot run so goes through transformers' own loop, and the logger
    ``qhub`` says why, once. ``enable`` False: undo it and keep the model out of it; joined projections stay joined.
    Weights changed in place are seen; after replaced ones the steps are built anew.
    """
    install()
    host = _host(model)
    if not enable:
        _decoders[host] = None
        return model
    decoder = _decoders.get(host)
    if decoder is None:
        decoder = _decoders[host] = Decoder(host)
    decoder.prepare()
    return model


def _host(model: Any) -> nn.Module:
    """Return the module whose ``_sample`` runs: adapters wrap it."""
    inner = getattr(model, "get_base_model", None)
    return inner() if callable(inner) else model


def decoder_of(model: nn.Module) -> Decoder | None:
    """Return the decoder of ``model``, made now if it is quantized, on a GPU, and nothing is switched off."""
    if os.environ.get("QHUB_OPTIMIZE", "").strip().lower() in ("0", "false", "no", "off"):
        return None
    if model in _decoders:
        return _decoders[model]
    automatic = next(model.parameters()).is_cuda and any(isinstance(p, QuantizedTensor) for p in model.parameters())
    decoder = Decoder(model, lazily=True) if automatic else None
    if automatic:
        _decoders[model] = decoder
    return decoder


def install() -> None:
    """Put the door into transformers' ``_sample``; models that are not optimized pass through it."""
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
        decoder = decoder_of(self)
        if decoder is not None:
            reason = decoder.refusal(input_ids, generation_config, stopping_criteria, model_kwargs, synced_gpus)
            if reason is None:
                done, cache = decoder.sample(
                    input_ids, logits_processor, stopping_criteria, generation_config, streamer, model_kwargs
                )
                return _answer(done, cache, generation_config)
            decoder.say(reason)
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


def _answer(done: Any, cache: Any, config: Any) -> Any:
    if not config.return_dict_in_generate:
        return done.ids
    from transformers.generation.utils import GenerateDecoderOnlyOutput

    return GenerateDecoderOnlyOutput(
        sequences=done.ids, scores=done.scores, logits=done.logits, past_key_values=cache
    )
