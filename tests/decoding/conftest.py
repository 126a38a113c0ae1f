"""Tiny models with random weights, plain and quantized, for decoding."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from qhub.decoding.operations import REFERENCE, NormRule, Operations

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": 12, "head_dim": 8},
    "gemma2": {"head_dim": 16, "sliding_window": 12, "query_pre_attn_scalar": 16},
    "gemma3_text": {"head_dim": 16, "sliding_window": 12, "sliding_window_pattern": 2, "query_pre_attn_scalar": 16},
    "phi3": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 512},
}


def build(kind: str, seed: int = 0, **changes: Any) -> torch.nn.Module:
    """Return a model of ``kind`` in float32 whose logits are far from ties."""
    settings = {**SMALL, **KINDS[kind], **changes}
    if kind == "gpt2":
        settings = {k: v for k, v in settings.items() if k.startswith(("n_", "vocab", "pad", "bos", "eos"))}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 1.5 / parameter.shape[-1] ** 0.5)
            elif "norm" in name or "ln_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


@pytest.fixture
def make() -> Callable[..., torch.nn.Module]:
    return build


def deep(std: float) -> Any:
    """Return a model of 24 layers in bfloat16 whose weights are ``std`` large: the larger, the more it amplifies."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=24,
        num_attention_heads=4,
        num_key_value_heads=2,
        dtype="bfloat16",
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, std)
    return model


def once_rounded() -> Operations:
    """Return operations that round what they compute once, at its end: right, but not as the models' own code."""

    def add_norm(x: Tensor, delta: Tensor | None, weight: Tensor, rule: NormRule) -> tuple[Tensor, Tensor]:
        total = x if delta is None else x + delta
        wide = total.double()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + rule.eps)
        return total, (wide * (weight.double() + rule.offset)).to(x.dtype)

    def gate(gate_up: Tensor, activation: str) -> Tensor:
        return REFERENCE.gate(gate_up.double(), activation).to(gate_up.dtype)

    return replace(REFERENCE, name="once rounded", add_norm=add_norm, gate=gate)


@contextlib.contextmanager
def counted() -> Iterator[list[None]]:
    """Within: the list grows by one with each forward of a Llama."""
    calls: list[None] = []
    own = LlamaForCausalLM.forward

    @functools.wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return own(*args, **kwargs)

    LlamaForCausalLM.forward = forward
    try:
        yield calls
    finally:
        LlamaForCausalLM.forward = own
