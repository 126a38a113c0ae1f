"""Finds the config of a quantized model whose ``config.json`` has no ``quantization_config``.

Methods' own tools keep it elsewhere: AutoGPTQ and gptqmodel in a file beside it, ``quantize_config.json``; QuIP# under
another key of ``config.json``.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from qhub.errors import CheckpointError, UnknownMethodError
from qhub.registry import registry

__all__ = ["KEY_GROUP", "complete", "config_beside", "config_under_key", "forget", "wrap"]

KEY_GROUP = "qhub.config_keys"


def wrap(auto: Any) -> None:
    """Make transformers look for such a config before it decides that a model is not quantized."""
    original = auto.get_hf_quantizer
    if getattr(original, "_qhub", False):
        return

    @functools.wraps(original)
    def get_hf_quantizer(config: Any, quantization_config: Any, *args: Any, **kwargs: Any) -> Any:
        if quantization_config is None:
            complete(config)
        return original(config, quantization_config, *args, **kwargs)

    get_hf_quantizer._qhub = True  # type: ignore[attr-defined]
    auto.get_hf_quantizer = get_hf_quantizer
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is not None and hasattr(modeling, "get_hf_quantizer"):
        modeling.get_hf_quantizer = get_hf_quantizer  # type: ignore[attr-defined]


def complete(config: Any) -> None:
    """Give a model's ``config`` a ``quantization_config`` where it has none and there is one elsewhere."""
    if getattr(config, "quantization_config", None) is not None:
        return
    found = config_under_key(vars(config))
    folder = getattr(config, "name_or_path", None)
    if found is None and folder:
        found = config_beside(Path(folder))
    if found is not None:
        config.quantization_config = found


def forget(config: Any) -> None:
    """Take out of a model's ``config`` what a method's own key says: the model is no longer quantized."""
    for key in _keys():
        if key in vars(config):
            delattr(config, key)


def config_under_key(values: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the plain config that a ``config.json`` of ``values`` holds under a method's own key; None if it has none.

    Raises :class:`CheckpointError` when what stands there is no object, and :class:`UnknownMethodError` when the method
    is turned off: nothing else would tell that the model is quantized, and it would load with random weights.
    """
    for key, method in _keys().items():
        if values.get(key) is None or method in registry.handed_back():
            continue
        if method in registry.disabled():
            raise UnknownMethodError(
                f"this checkpoint is quantized with {method!r} ({key!r} in its config.json), and "
                f"QHUB_DISABLE={os.environ['QHUB_DISABLE']} turns that plugin off. Loading it would give random "
                "weights. Take the name out of QHUB_DISABLE"
            )
        found = values[key]
        if not isinstance(found, dict):
            raise CheckpointError(f"{key!r} in config.json is {found!r}: expected the settings of {method}")
        return {**found, "quant_method": method}
    return None


@functools.cache
def _keys() -> dict[str, str]:
    """Return the methods' own keys of ``config.json``, each with the method; imports none."""
    return {entry.name: entry.value for entry in entry_points(group=KEY_GROUP)}


def config_beside(folder: Path) -> dict[str, Any] | None:
    """Return the plain config in a local ``folder``; None when there is no such file, or no plugin whose it is.

    Raises :class:`CheckpointError` when the file cannot be read.
    """
    # Plugins are asked only where such a file lies: asking loads them.
    files = {file.name: file for file in folder.glob("quant*config.json")} if folder.is_dir() else {}
    if not files:
        return None
    for name in registry.list():
        if name in registry.handed_back():
            continue
        companion = registry.call(name, "qhub_config").companion
        if companion in files:
            try:
                values = json.loads(files[companion].read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{files[companion]} cannot be read: {error}") from error
            if not isinstance(values, dict):
                raise CheckpointError(f"{files[companion]} holds no object: expected the settings of {name}")
            if values.get("quant_method", name) == name:
                return {**values, "quant_method": name}
    return None
