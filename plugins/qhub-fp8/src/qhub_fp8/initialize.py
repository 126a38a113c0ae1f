"""How a FineGrainedFP8Config is made with every argument kept, also with ``activation_scheme="none"``.

transformers' own ``__init__`` takes any keyword and drops those it does not know, and has inputs rounded always.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

__all__ = ["KNOWN_KEYS", "OTHER_KEYS", "initializer", "stand_in", "without_data"]

# Parameters of transformers' FineGrainedFP8Config in 5.17 or 5.23.
KNOWN_KEYS = frozenset(
    {
        "activation_scheme", "dequantize", "expert_dtype", "ignored_layers", "modules_to_convert",
        "modules_to_not_convert", "quant_method", "scale_fmt", "weight_block_size",
    }
)  # fmt: skip

# What else config.json files hold. ``fmt`` names the weights' codes (DeepSeek-V3); the others change nothing in how
# tensors are read: AutoFP8's and vLLM's (vllm/model_executor/layers/quantization/fp8.py), NVIDIA's producers. dataset
# and tokenizer are qhub's own: what static scales are calibrated with.
OTHER_KEYS = frozenset(
    {
        "dataset", "fmt", "is_checkpoint_fp8_serialized", "kv_cache_dtype", "kv_cache_quant_method", "kv_cache_scheme",
        "producer", "quant_algo", "quantization_status", "store_dtype", "tokenizer",
    }
)  # fmt: skip


def initializer(original: Callable[..., None]) -> Callable[..., None]:
    """Return an ``__init__`` that calls ``original``, keeps the keys of :data:`OTHER_KEYS` and takes
    ``activation_scheme="none"`` (or None); anything else is named in a warning."""

    @functools.wraps(original)
    def initialize(self: Any, *args: Any, **kwargs: Any) -> None:
        others = {name: kwargs.pop(name) for name in sorted(OTHER_KEYS) if name in kwargs}
        unknown = sorted(set(kwargs) - KNOWN_KEYS)
        if unknown:
            warnings.warn(f"FineGrainedFP8Config ignores {', '.join(unknown)}", stacklevel=2)
        scheme = args[0] if args else kwargs.get("activation_scheme", "dynamic")
        off = scheme is None or (isinstance(scheme, str) and scheme.lower() == "none")
        if off:
            args, kwargs = ("dynamic", *args[1:]), {k: v for k, v in kwargs.items() if k != "activation_scheme"}
        # DeepSeek-V3's files have scale_fmt "ue8m0" or none at all; 5.17 and 5.23 want a name.
        if "scale_fmt" in kwargs and kwargs["scale_fmt"] is None:
            del kwargs["scale_fmt"]
        original(self, *args, **kwargs)
        if off:
            self.activation_scheme = "none"
        for name, value in others.items():
            setattr(self, name, value)

    return initialize


def without_data(original: Callable[[Any], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
    """Return a ``to_dict`` without data and tokenizer: neither texts nor objects belong into a config.json."""

    @functools.wraps(original)
    def to_dict(self: Any) -> dict[str, Any]:
        held = {name: self.__dict__.pop(name) for name in ("dataset", "tokenizer") if name in self.__dict__}
        try:
            return original(self)
        finally:
            self.__dict__.update(held)

    return to_dict


def stand_in(module: ModuleType) -> None:
    """Let ``module.FineGrainedFP8Config`` keep its arguments and be written without data.

    ``module``: ``transformers.utils.quantization_config``. The class stays itself.
    """
    cls = module.FineGrainedFP8Config
    cls.__init__ = initializer(cls.__init__)
    cls.to_dict = without_data(cls.to_dict)
