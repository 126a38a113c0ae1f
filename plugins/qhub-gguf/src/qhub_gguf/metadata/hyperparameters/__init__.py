"""From a transformers config to the hyperparameters of a GGUF file, under llama.cpp's keys.

Source: ``set_gguf_parameters`` of the model classes in convert_hf_to_gguf (llama.cpp, conversion/*.py) and gguf-py's
constants.py; the tests compare the result with files that it wrote.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from qhub_gguf.container.values import Value
from qhub_gguf.metadata.hyperparameters import classic, decoders, gemma
from qhub_gguf.metadata.hyperparameters.shared import standard
from qhub_gguf.metadata.keys import Entries
from qhub_gguf.names import architecture_of_config

__all__ = ["hyperparameters"]

logger = logging.getLogger(__name__)


def hyperparameters(config: Any, architecture: str | None = None) -> dict[str, Value]:
    """Return the ``{architecture}.*`` entries for a config; ``architecture``: chosen after its model type if None.

    Raises :class:`UnsupportedError` for a model type or setting that GGUF has no key for.
    """
    architecture = architecture or architecture_of_config(config)
    entries = Entries(architecture)
    settings = config.to_dict()
    _FAMILIES.get(architecture, standard)(entries, settings)
    for said in _unsaid(architecture, settings):
        logger.warning("GGUF cannot say %s: llama.cpp, and whoever reads the file, will compute otherwise", said)
    return entries.values


def _unsaid(architecture: str, settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield settings that llama.cpp takes for granted and this config has differently."""
    granted: dict[str, Any] = {}
    if architecture in ("qwen3moe", "qwen2moe"):
        granted["norm_topk_prob"] = architecture == "qwen3moe"
    if architecture in ("gemma2", "gemma3"):
        largest = settings["num_hidden_layers"] == {"gemma2": 46, "gemma3": 62}[architecture]
        width = settings["hidden_size"] // settings["num_attention_heads"]
        granted["query_pre_attn_scalar"] = width if largest else settings["head_dim"]
    for key, value in granted.items():
        if settings.get(key) is not None and settings[key] != value:
            yield f"{key}={settings[key]!r} (it stands for {value!r})"


_FAMILIES: dict[str, Callable[[Entries, Mapping[str, Any]], None]] = {
    "llama": decoders.llama,
    "deci": decoders.llama,
    "smollm3": decoders.llama,
    "granite": decoders.granite,
    "command-r": decoders.cohere,
    "qwen2moe": decoders.experts,
    "qwen3moe": decoders.experts,
    "minimax-m2": decoders.minimax_m2,
    "gpt-oss": decoders.gpt_oss,
    "lfm2": decoders.lfm2,
    "nemotron": decoders.nemotron,
    "phi3": decoders.phi3,
    "stablelm": decoders.stablelm,
    "gemma": gemma.gemma,
    "gemma2": gemma.gemma2,
    "gemma3": gemma.gemma3,
    "gemma4": gemma.gemma4,
    "gpt2": classic.gpt2,
    "bloom": classic.bloom,
    "falcon": classic.falcon,
    "mamba": classic.mamba,
    "t5": classic.t5,
    "t5encoder": classic.t5,
    "qwen35": decoders.qwen35,
    "qwen35moe": decoders.qwen35,
}
