"""From the metadata of a GGUF file to the dict of a transformers config.

transformers' own reader needs gguf-py and leaves out much that a file says (head sizes, widths of experts, scaling of
rotary embeddings, Mixtral); this one needs nothing and says it all. The keys are the inverse of
:mod:`qhub_gguf.metadata.hyperparameters`.
"""

from __future__ import annotations

from collections.abc import Callable

from qhub.errors import CheckpointError
from qhub_gguf.container import GgufFile
from qhub_gguf.metadata.configs import classic, decoders, gemma
from qhub_gguf.metadata.configs.reading import Config, Model, decoder
from qhub_gguf.names import ARCHITECTURES

__all__ = ["config_of"]


def config_of(file: GgufFile) -> Config:
    """Return the config dict, with ``model_type`` and ``architectures``, of the model in ``file``.

    Raises :class:`CheckpointError` naming the key that is missing or of the wrong kind, and
    :class:`qhub.errors.UnsupportedError` for an architecture that is not known here.
    """
    model = Model(file)
    model.check_sizes()
    try:
        config = _FAMILIES.get(model.architecture, decoder)(model)
    except (ArithmeticError, LookupError, StopIteration, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{file.path}: the metadata of {model.architecture} is damaged or contradicts itself: {error!r}"
        ) from error
    config.setdefault("model_type", ARCHITECTURES[model.architecture].model_types[0])
    if "architectures" not in config:
        config["architectures"] = [_CLASSES[config["model_type"]]]
    embeddings = model.shape("token_embd.weight")
    # llama.cpp writes the output head only where it is not the embeddings.
    config["tie_word_embeddings"] = "output.weight" not in file.tensors
    config["vocab_size"] = embeddings[0] if embeddings else model.get_whole("tokenizer.ggml.tokens", 0)
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("padding", "pad")):
        token = file.get(f"tokenizer.ggml.{ours}_token_id")
        inside = isinstance(token, int) and token < config["vocab_size"]
        config.setdefault(f"{theirs}_token_id", token if inside else None)
    return config


_FAMILIES: dict[str, Callable[[Model], Config]] = {
    "llama": decoders.llama,
    "deci": decoders.llama,
    "smollm3": decoders.llama,
    "granite": decoders.granite,
    "olmo2": decoder,
    "command-r": decoders.cohere,
    "qwen2": decoders.qwen,
    "qwen2moe": decoders.qwen,
    "qwen3": decoders.qwen,
    "qwen3moe": decoders.qwen,
    "minimax-m2": decoders.minimax_m2,
    "gpt-oss": decoders.gpt_oss,
    "stablelm": decoders.stablelm,
    "starcoder2": decoders.starcoder2,
    "nemotron": decoders.nemotron,
    "phi3": decoders.phi3,
    "gemma": gemma.gemma,
    "gemma2": gemma.gemma,
    "gemma3": gemma.gemma,
    "gemma4": gemma.gemma4,
    "gpt2": classic.gpt2,
    "bloom": classic.bloom,
    "falcon": classic.falcon,
    "mamba": classic.mamba,
    "t5": classic.t5,
    "t5encoder": classic.t5,
    "lfm2": decoders.lfm2,
    "qwen35": decoders.qwen35,
    "qwen35moe": decoders.qwen35,
}

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "deci": "DeciLMForCausalLM",
    "granite": "GraniteForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "cohere": "CohereForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "minimax_m2": "MiniMaxM2ForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "stablelm": "StableLmForCausalLM",
    "starcoder2": "Starcoder2ForCausalLM",
    "nemotron": "NemotronForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gemma4_text": "Gemma4ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "bloom": "BloomForCausalLM",
    "falcon": "FalconForCausalLM",
    "mamba": "MambaForCausalLM",
    "lfm2": "Lfm2ForCausalLM",
    "qwen3_5_text": "Qwen3_5ForCausalLM",
    "qwen3_5_moe_text": "Qwen3_5MoeForCausalLM",
}
