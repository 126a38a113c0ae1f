"""A checkpoint that transformers wrote, tiny models, and files with any tensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qhub.testing import threads

DATA = Path(__file__).parent / "data"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with threads.one_thread():
        yield


@pytest.fixture
def library() -> Path:
    """Return the folder of a one-layer Llama that transformers quantized in blocks of 64x64."""
    return DATA / "tiny-llama-b64"


@pytest.fixture
def ids() -> Tensor:
    """Return 2 x 24 tokens."""
    return torch.randint(0, 250, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def llama() -> Callable[..., Any]:
    """Return a function that makes a random two-layer Llama; its widths are no multiples of 128, 64 or 48."""

    def make(seed: int = 0, **changes: Any) -> Any:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(seed)
        values = {
            "vocab_size": 250, "hidden_size": 80, "intermediate_size": 144, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False, "bos_token_id": 1,
            "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.1,
        }  # fmt: skip
        return LlamaForCausalLM(LlamaConfig(**{**values, **changes})).eval()

    return make


@pytest.fixture
def mixtral() -> Callable[..., Any]:
    """Return a function that makes a random one-layer mixture with four experts."""

    def make(**changes: Any) -> Any:
        from transformers import MixtralConfig, MixtralForCausalLM

        torch.manual_seed(0)
        values = {
            "vocab_size": 250, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
            "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2,
            "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
            "initializer_range": 0.1,
        }  # fmt: skip
        return MixtralForCausalLM(MixtralConfig(**{**values, **changes})).eval()

    return make


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a dense model as a checkpoint with other tensors for its linear layers."""

    def make(model: Any, quantization: dict[str, Any], entries: Callable[[str, Tensor], dict[str, Tensor]]) -> Path:
        folder = tmp_path / f"made-{len(list(tmp_path.iterdir()))}"
        model.save_pretrained(folder)
        tensors = load_file(folder / "model.safetensors")
        found: dict[str, Tensor] = {}
        for name, value in tensors.items():
            if value.ndim == 2 and "embed" not in name and "lm_head" not in name and "gate.weight" not in name:
                prefix = name.removesuffix(".weight")
                found |= {f"{prefix}.{local}": entry.contiguous() for local, entry in entries(prefix, value).items()}
            else:
                found[name] = value
        save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = quantization
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


@pytest.fixture
def same_bytes() -> Callable[[Tensor, Tensor], bool]:
    """Return a comparison by dtype, shape and bytes: torch compares no 8-bit floats."""

    def same(first: Tensor, second: Tensor) -> bool:
        if first.dtype != second.dtype or first.shape != second.shape:
            return False
        bits = (one.contiguous().reshape(-1).view(torch.uint8) for one in (first, second))
        return torch.equal(*bits)

    return same
