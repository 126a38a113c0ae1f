"""Which architecture of llama.cpp is which model type of transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from qhub.errors import CheckpointError, UnsupportedError
from qhub_gguf.names.families import classic, decoders, encoders, gemma, hybrid
from qhub_gguf.names.rules import Family

__all__ = ["ARCHITECTURES", "Architecture", "architecture_of", "architecture_of_config"]


@dataclass(frozen=True)
class Architecture:
    """Describes an architecture: ``general.architecture`` of its files, transformers' ``model_type`` values that are
    written as it (the first is the one it is read as), its names, and the prefix of the class without a head."""

    name: str
    model_types: tuple[str, ...]
    family: Callable[[Any], Family]
    base_prefix: str = "model."


_ALL = (
    Architecture("llama", ("llama", "mistral", "mixtral"), decoders.llama),
    Architecture("deci", ("deci",), decoders.llama),
    Architecture("qwen2", ("qwen2",), decoders.qwen),
    Architecture("qwen2moe", ("qwen2_moe",), decoders.qwen),
    Architecture("qwen3", ("qwen3",), decoders.qwen),
    Architecture("qwen3moe", ("qwen3_moe",), decoders.qwen),
    Architecture("minimax-m2", ("minimax_m2",), decoders.minimax_m2),
    Architecture("gpt-oss", ("gpt_oss",), decoders.gpt_oss),
    Architecture("granite", ("granite",), decoders.llama),
    Architecture("smollm3", ("smollm3",), decoders.llama),
    Architecture("olmo2", ("olmo2",), decoders.olmo2),
    Architecture("command-r", ("cohere",), decoders.cohere),
    Architecture("stablelm", ("stablelm",), decoders.stablelm),
    Architecture("starcoder2", ("starcoder2",), decoders.starcoder2),
    Architecture("nemotron", ("nemotron",), decoders.nemotron),
    Architecture("phi3", ("phi3",), decoders.phi3),
    Architecture("gemma", ("gemma",), gemma.gemma),
    Architecture("gemma2", ("gemma2",), gemma.gemma2),
    Architecture("gemma3", ("gemma3_text",), gemma.gemma2),
    Architecture("gemma4", ("gemma4_text",), gemma.gemma4),
    Architecture("gpt2", ("gpt2",), classic.gpt2, "transformer."),
    Architecture("bloom", ("bloom",), classic.bloom, "transformer."),
    Architecture("falcon", ("falcon",), classic.falcon, "transformer."),
    Architecture("mamba", ("mamba",), classic.mamba, "backbone."),
    Architecture("t5", ("t5", "umt5"), encoders.t5, ""),
    Architecture("t5encoder", ("t5encoder",), encoders.t5, ""),
    Architecture("lfm2", ("lfm2",), hybrid.lfm2),
    Architecture("qwen35", ("qwen3_5_text",), hybrid.qwen35),
    Architecture("qwen35moe", ("qwen3_5_moe_text",), hybrid.qwen35),
)

ARCHITECTURES: Mapping[str, Architecture] = {architecture.name: architecture for architecture in _ALL}

_BY_MODEL_TYPE = {name: architecture.name for architecture in _ALL for name in architecture.model_types}
# Spellings that transformers accepts too.
_ALIASES = {
    "gpt_oss": "gpt-oss",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "minimax_m2": "minimax-m2",
    "mistral": "llama",
    "umt5": "t5",
}


def architecture_of(file: Any) -> str:
    """Return the architecture of a :class:`~qhub_gguf.container.GgufFile`, by the name in :data:`ARCHITECTURES`.

    Raises :class:`CheckpointError` where the file names none, :class:`UnsupportedError` for one that is not known here.
    """
    name = file.get("general.architecture")
    if not isinstance(name, str):
        raise CheckpointError(f"{file.path} does not say its architecture: general.architecture is {name!r}")
    name = _ALIASES.get(name, name)
    if name not in ARCHITECTURES:
        raise UnsupportedError(
            f"{file.path} is a GGUF file of architecture {name!r}; those that can be loaded are {sorted(ARCHITECTURES)}"
        )
    return name


def architecture_of_config(config: Any) -> str:
    """Return the architecture that a model of this transformers config is written as; :class:`UnsupportedError` if
    none."""
    model_type = getattr(config, "model_type", None)
    if model_type not in _BY_MODEL_TYPE:
        raise UnsupportedError(
            f"models of type {model_type!r} cannot be written as GGUF; those that can are {sorted(_BY_MODEL_TYPE)}"
        )
    if model_type == "t5" and list(getattr(config, "architectures", None) or []) == ["T5EncoderModel"]:
        return "t5encoder"
    return _BY_MODEL_TYPE[model_type]
