"""``qhub.optimize``: plain ``model.generate`` with a static cache, fused steps and CUDA graphs, and the off switch.

Quantized models on a GPU are optimized at their first ``generate``. ``QHUB_OPTIMIZE=0`` turns that off for a process,
``qhub.optimize(model, False)`` for a model.
"""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from qhub.decoding.decoder import Decoder
from qhub.decoding.door import install
from qhub.tensor import QuantizedTensor

__all__ = ["decoder_of", "optimize"]

_KEY = "_qhub_decoding"


class _Slot:
    """Holds a model's decoder, None where it is switched off; lies on the model itself and goes with it.

    Copies and pickles of the model get a slot that knows nothing: graphs and caches are this model's.
    """

    def __init__(self, decoder: Decoder | None = None, known: bool = False):
        self.decoder, self.known = decoder, known

    def __deepcopy__(self, memo: dict[int, Any]) -> _Slot:
        return _Slot()

    def __reduce__(self) -> Any:
        return _Slot, ()


class _Decoders:
    """Is a mapping from models to their decoders."""

    def __contains__(self, model: nn.Module) -> bool:
        slot = model.__dict__.get(_KEY)
        # A shallow copy of a model has its slot, but not its graphs.
        return slot is not None and slot.known and (slot.decoder is None or slot.decoder.model is model)

    def __getitem__(self, model: nn.Module) -> Decoder | None:
        slot: _Slot = model.__dict__[_KEY]
        return slot.decoder

    def get(self, model: nn.Module) -> Decoder | None:
        """Return the model's decoder; None also where there is none."""
        known = model in self
        return self[model] if known else None

    def __setitem__(self, model: nn.Module, decoder: Decoder | None) -> None:
        model.__dict__[_KEY] = _Slot(decoder, True)

    def pop(self, model: nn.Module, *default: Any) -> None:
        """Forget the model's decoder."""
        model.__dict__.pop(_KEY, *default)


_decoders = _Decoders()


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
