"""Tiny random models on disk: a plain Llama, OPT with biases, and mixtures with fused experts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

__all__ = ["ARCHITECTURES", "CONTEXT", "INPUT", "VOCABULARY", "build_config", "write_model"]

VOCABULARY = 128
# Tokens: longer than any input of a test, and short where a model writes its own calibration text.
CONTEXT = 64
INPUT = torch.arange(1, 10)[None]


def _shared(hidden: int) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "max_position_embeddings": CONTEXT,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "hidden_size": hidden,
    }


def _llama(hidden: int) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**_shared(hidden), intermediate_size=2 * hidden, num_key_value_heads=2)


def _opt(hidden: int) -> Any:
    from transformers import OPTConfig

    return OPTConfig(**_shared(hidden), ffn_dim=2 * hidden, word_embed_proj_dim=hidden)


def _qwen3_moe(hidden: int) -> Any:
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(
        **{**_shared(hidden), "head_dim": hidden // 4},
        intermediate_size=2 * hidden,
        moe_intermediate_size=hidden,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
    )


def _mixtral(hidden: int) -> Any:
    from transformers import MixtralConfig

    return MixtralConfig(
        **_shared(hidden),
        intermediate_size=2 * hidden,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
    )


ARCHITECTURES: dict[str, Callable[[int], Any]] = {
    "llama": _llama,
    "opt": _opt,
    "qwen3_moe": _qwen3_moe,
    "mixtral": _mixtral,
}


def build_config(architecture: str, hidden: int) -> Any:
    """Return transformers' config of a tiny causal model of one of :data:`ARCHITECTURES`."""
    return ARCHITECTURES[architecture](hidden)


def write_model(architecture: str, hidden: int, folder: Path) -> None:
    """Write a random float32 model into ``folder``: the same one each time; the caller's random state is left alone."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(build_config(architecture, hidden), dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                # They start as zeros, and a bias that gets lost would not be noticed.
                torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
