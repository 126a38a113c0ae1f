"""Finds the config of a quantized folder whose ``config.json`` does not have it: in a file of the method's own tools.

AutoGPTQ and gptqmodel, for example, keep a ``quantize_config.json``; older folders have nothing else.
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

from qhub.errors import CheckpointError
from qhub.registry import registry

__all__ = ["config_beside", "wrap"]


def wrap(auto: Any) -> None:
    """Make transformers look for such a file before it decides that a folder is not quantized."""
    original = auto.get_hf_quantizer
    if getattr(original, "_qhub", False):
        return

    @functools.wraps(original)
    def get_hf_quantizer(config: Any, quantization_config: Any, *args: Any, **kwargs: Any) -> Any:
        folder = getattr(config, "name_or_path", None)
        if folder and getattr(config, "quantization_config", None) is None and quantization_config is None:
            found = config_beside(Path(folder))
            if found is not None:
                config.quantization_config = found
        return original(config, quantization_config, *args, **kwargs)

    get_hf_quantizer._qhub = True  # type: ignore[attr-defined]
    auto.get_hf_quantizer = get_hf_quantizer
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is not None and hasattr(modeling, "get_hf_quantizer"):
        modeling.get_hf_quantizer = get_hf_quantizer  # type: ignore[attr-defined]


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
