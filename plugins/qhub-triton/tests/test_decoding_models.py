"""Whole models on the fused operations: recognised parts take them, and the tokens stay the same."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from qhub_triton.decoding import attention, gating, norms, picking
from transformers import AutoConfig, AutoModelForCausalLM

import qhub
from qhub.decoding import decoder, steps
from qhub.decoding.operations import Operations

CALLS: dict[str, int] = {}


def counted(name: str, function: Any, *args: Any, **kwargs: Any) -> Any:
    CALLS[name] = CALLS.get(name, 0) + 1
    return function(*args, **kwargs)


FAMILY = Operations(
    "interpreted",
    **{
        name: partial(counted, name, function)
        for name, function in {
            "add_norm": norms.add_norm,
            "attend_token": attention.attend_token,
            "gate": gating.gate,
            "pick": picking.pick,
        }.items()
    },
)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is interpreted; tests/gpu/test_decoding.py is for a GPU")
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text"])
def test_same_tokens(kind, monkeypatch):
    monkeypatch.setattr(steps, "offered", lambda device: (FAMILY,))
    monkeypatch.setattr(decoder, "_ROUND", 32)
    extra = {} if kind == "llama" else {"head_dim": 16}
    if kind == "gemma3_text":
        extra |= {"sliding_window": 8, "query_pre_attn_scalar": 16}
    config = AutoConfig.for_model(
        kind,
        vocab_size=80,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        eos_token_id=2,
        **extra,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) * 1.5 / parameter.shape[-1] ** 0.5)
    ids = torch.randint(3, 80, (2, 9))
    mask = torch.ones_like(ids)
    ids[1, :4], mask[1, :4] = 0, 0
    arguments = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    wanted = model.generate(**arguments)
    CALLS.clear()
    qhub.optimize(model)
    assert torch.equal(model.generate(**arguments), wanted)
    count = wanted.shape[1] - 9 - 1
    assert CALLS["attend_token"] >= 2 * count
    assert CALLS["add_norm"] >= 5 * count
    assert CALLS["gate"] >= 2 * count
    assert CALLS["pick"] >= count
