"""``qhub.optimize``: plain ``model.generate`` with a static cache, fused steps and CUDA graphs, and the off switch.

Quantized models on a GPU are optimized at their first ``generate``. ``QHUB_OPTIMIZE=0`` turns that off for a process,
``qhub.optimize(model, False)`` for a model.
"""

from __future__ import annotations

import os
import weakref
from typing import Any

from torch import nn

from qhub.decoding.decoder import Decoder
from qhub.decoding.door import install
from qhub.tensor import QuantizedTensor

__all__ = ["decoder_of", "optimize"]

# None: switched off.
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
