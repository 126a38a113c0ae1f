"""Metadata of a model: configs and tokenizers to and from the keys of a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qhub_gguf.container.values import Kind, Value
from qhub_gguf.metadata.configs import config_of
from qhub_gguf.metadata.hyperparameters import hyperparameters
from qhub_gguf.metadata.rope import extra_tensors
from qhub_gguf.metadata.tokenizers import tokenizer_of
from qhub_gguf.metadata.vocabulary import vocabulary
from qhub_gguf.names import architecture_of_config

__all__ = ["config_of", "extra_tensors", "hyperparameters", "metadata_of", "size_label", "tokenizer_of", "vocabulary"]

# GGML_QNT_VERSION of ggml.h.
_QUANTIZATION_VERSION = 2


def metadata_of(
    config: Any,
    tokenizer: Any = None,
    *,
    file_type: int,
    name: str | None = None,
    vocab_size: int | None = None,
    label: str | None = None,
    pre: str | None = None,
    more: Mapping[str, Value] | None = None,
) -> dict[str, Value]:
    """Return all metadata of a file, in the order in which convert_hf_to_gguf writes it.

    ``file_type``: the number of :data:`qhub_gguf.mixes.FILE_TYPES`. ``vocab_size``: rows of the embedding; None: the
    config's. ``label``: see :func:`size_label`. ``pre``: see :func:`vocabulary`. ``more``: added at the end of the
    general entries.
    """
    architecture = architecture_of_config(config)
    metadata = {
        "general.architecture": Value.of(Kind.STRING, architecture),
        "general.type": Value.of(Kind.STRING, "model"),
    }
    for key, text in (("general.name", name), ("general.size_label", label)):
        if text is not None:
            metadata[key] = Value.of(Kind.STRING, text)
    metadata.update(more or {})
    metadata.update(hyperparameters(config, architecture))
    metadata["general.file_type"] = Value.of(Kind.UINT32, file_type)
    metadata["general.quantization_version"] = Value.of(Kind.UINT32, _QUANTIZATION_VERSION)
    if tokenizer is not None:
        rows = vocab_size or config.vocab_size
        metadata.update(vocabulary(tokenizer, rows, architecture, config, pre))
    return metadata


def size_label(parameters: int) -> str:
    """Return the number of parameters as file names and ``general.size_label`` have it: 270M, 8B (gguf-py's
    ``size_label``, for models without experts)."""
    for factor, letter in ((1e-12, "T"), (1e-9, "B"), (1e-6, "M"), (1e-3, "K")):
        if parameters * factor > 1 or letter == "K":
            scaled = parameters * factor
            decimals = max(2 - len(str(round(scaled)).lstrip("0")), 0)
            return f"{scaled:.{decimals}f}{letter}"
    raise AssertionError("unreachable")
