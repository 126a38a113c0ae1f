"""Fixtures that all tests share: tiny models of several architectures on disk, and a method that no plugin package
brings."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def doclm() -> Path:
    """The embedded real model."""
    return ROOT / "examples" / "models" / "doclm-5m"


@pytest.fixture(scope="session")
def pow2() -> str:
    """The name of the example method, registered in this process unless it is installed."""
    from qhub.integrations.transformers import install
    from qhub.registry import registry

    if "pow2" not in registry.list():
        folder = ROOT / "examples" / "third_party_plugin" / "pow2_quant"
        spec = importlib.util.spec_from_file_location("pow2_quant", folder / "__init__.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["pow2_quant"] = module
        spec.loader.exec_module(module)
        registry.register(module, "pow2")
    install()
    return "pow2"


def _configs() -> dict[str, Callable[[], Any]]:
    import transformers as tf

    small: dict[str, Any] = dict(vocab_size=128, num_hidden_layers=2, num_attention_heads=4)
    llama = dict(hidden_size=64, intermediate_size=96, num_key_value_heads=2, **small)
    return {
        "llama": lambda: tf.LlamaConfig(**llama),
        "llama-tied": lambda: tf.LlamaConfig(**llama, tie_word_embeddings=True),
        "opt": lambda: tf.OPTConfig(
            hidden_size=64, ffn_dim=96, word_embed_proj_dim=64, max_position_embeddings=64, **small
        ),
        "gpt2": lambda: tf.GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=64),
        "mixtral": lambda: tf.MixtralConfig(**llama, num_local_experts=4),
        "qwen3-moe": lambda: tf.Qwen3MoeConfig(
            **llama, moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2, head_dim=16
        ),
    }


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that returns a folder with a random causal model of the named architecture, in float32."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            import torch
            from transformers import AutoModelForCausalLM

            torch.manual_seed(0)
            config = _configs()[name]()
            folder = tmp_path_factory.mktemp(f"tiny-{name}")
            AutoModelForCausalLM.from_config(config).save_pretrained(folder)
            made[name] = folder
        return made[name]

    return make
