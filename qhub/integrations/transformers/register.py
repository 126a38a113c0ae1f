"""Puts every installed method into transformers' tables, and wraps the few places that would go on in silence.

Importing no plugin: names come from entry points, a plugin is loaded when its name is used. For a name that
transformers knows, the plugin takes over; ``QHUB_NATIVE=a,b`` gives names back.
"""

from __future__ import annotations

import functools
import logging
import os
from typing import Any

from qhub.errors import UnknownMethodError
from qhub.integrations.transformers import companions, containers
from qhub.registry import registry

__all__ = ["install"]

logger = logging.getLogger("qhub")

# transformers appends these to the method's name when it looks up a config with load_in_4bit or load_in_8bit
# (quantizers/auto.py, AutoHfQuantizer.from_config).
_SUFFIXES = ("", "_4bit", "_8bit")

_joined: set[str] = set()


def install() -> None:
    """Register the installed methods with transformers; call it again after installing a plugin in a running
    process."""
    from transformers.quantizers import auto

    native = registry.handed_back()
    for name in registry.list():
        if name in native or name in _joined:
            continue
        _register(auto, name)
        _joined.add(name)
    _refuse_unknown(auto)
    companions.wrap(auto)
    containers.wrap_readers()
    _wrap_model_methods()


def _register(auto: Any, name: str) -> None:
    from qhub.integrations.transformers.quantizer import quantizer_for

    known = [name + suffix for suffix in _SUFFIXES if name + suffix in auto.AUTO_QUANTIZER_MAPPING]
    for key in known or [name]:
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING[key] = _config_class(name, auto.AUTO_QUANTIZATION_CONFIG_MAPPING.get(key))
        auto.AUTO_QUANTIZER_MAPPING[key] = quantizer_for(name, replaces=bool(known))


def _config_class(name: str, known: type | None) -> type:
    """Return what transformers calls ``from_dict`` of: a class that hands the values to the plugin's own config class.

    transformers compares config classes by their names, so a known class keeps its own.
    """
    from transformers.utils.quantization_config import QuantizationConfigMixin

    def from_dict(cls: type, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        config = registry.call(name, "qhub_config").parse({**config_dict, "quant_method": name})
        unused = config.update(**kwargs) if kwargs else {}
        return (config, unused) if return_unused_kwargs else config

    base = known or QuantizationConfigMixin
    return type(known.__name__ if known else f"{name}Config", (base,), {"from_dict": classmethod(from_dict)})


def _refuse_unknown(auto: Any) -> None:
    """Make a checkpoint of a method that nobody serves an error: transformers would load it with random weights."""
    original = auto.AutoHfQuantizer.supports_quant_method
    if getattr(original, "_qhub", False):
        return

    @functools.wraps(original)
    def supports_quant_method(quantization_config_dict: Any) -> bool:
        values = quantization_config_dict
        values = values if isinstance(values, dict) else values.to_dict()
        method = str(values.get("quant_method") or "")
        if method and not any(method + suffix in auto.AUTO_QUANTIZATION_CONFIG_MAPPING for suffix in _SUFFIXES):
            if method in registry.disabled():
                raise UnknownMethodError(
                    f"this checkpoint is quantized with {method!r}, and QHUB_DISABLE={os.environ['QHUB_DISABLE']} "
                    "turns that plugin off. Loading it would give random weights. Take the name out of QHUB_DISABLE"
                )
            installed = ", ".join(registry.list()) or "none"
            raise UnknownMethodError(
                f"this checkpoint is quantized with {method!r}, which neither transformers nor an installed plugin "
                f"serves (installed plugins: {installed}). Loading it would give random weights. Install the method's "
                f"plugin: pip install qhub-{method.replace('_', '-')}"
            )
        return original(values)

    supports_quant_method._qhub = True  # type: ignore[attr-defined]
    auto.AutoHfQuantizer.supports_quant_method = staticmethod(supports_quant_method)


def _wrap_model_methods() -> None:
    """Give quantized models a save that leaves no half file, a push with a true card, a footprint of packed bytes."""
    import sys

    modeling = sys.modules.get("transformers.modeling_utils")
    model_class = getattr(modeling, "PreTrainedModel", None)
    if model_class is None:
        # quantizers.auto is imported by modeling_utils itself; the second import hook comes when that one is complete.
        return
    from qhub.integrations.hub import push_quantized
    from qhub.integrations.transformers.saving import save_quantized
    from qhub.integrations.transformers.weights import memory_footprint

    replacements = {
        "save_pretrained": save_quantized,
        "push_to_hub": push_quantized,
        "get_memory_footprint": memory_footprint,
    }
    for method, replacement in replacements.items():
        original = getattr(model_class, method)
        if not getattr(original, "_qhub", False):
            setattr(model_class, method, _only_for_quantized(original, replacement))
    loader = model_class.__dict__["from_pretrained"]
    if not getattr(loader.__func__, "_qhub", False):
        model_class.from_pretrained = containers.name_file(loader)


def _only_for_quantized(original: Any, replacement: Any) -> Any:
    from qhub.integrations.transformers.quantizer import PluginQuantizer

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(getattr(self, "hf_quantizer", None), PluginQuantizer):
            return replacement(self, original, *args, **kwargs)
        return original(self, *args, **kwargs)

    method._qhub = True  # type: ignore[attr-defined]
    return method
