"""Fused parts of a deep model: what roundings move is no reason to leave them out, what is wrong is."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import qhub
from qhub.decoding import recipes, steps
from qhub.decoding.operations import REFERENCE
from qhub.decoding.recipes import difference, tolerance
from qhub.decoding.rounding import rounded_outputs


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


def written(model: Any, caplog: pytest.LogCaptureFixture) -> bool:
    """Generate with ``model`` optimized, and return whether its parts were left out."""
    qhub.optimize(model)
    ids = torch.randint(3, 300, (2, 6), generator=torch.Generator().manual_seed(1))
    with caplog.at_level(logging.INFO, "qhub"):
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False, pad_token_id=0)
    return "left out" in caplog.text


def test_a_model_that_amplifies_roundings_keeps_its_fused_parts(caplog, monkeypatch):
    seen = []

    def noted(found: torch.Tensor, wanted: torch.Tensor) -> float:
        seen.append(difference(found, wanted))
        return seen[-1]

    monkeypatch.setattr(steps, "difference", noted)
    # Were the bound fixed, this model would not stay within it.
    monkeypatch.setitem(recipes._SLACK, torch.bfloat16, 0.5)
    assert not written(deep(0.3), caplog)
    moved, error = seen
    assert 0.5 * tolerance(torch.bfloat16) < error < 3 * moved


@pytest.mark.parametrize("std", [0.05, 0.3])
def test_parts_that_compute_something_else_are_left_out(std, caplog, monkeypatch):
    """Each is so little off that it passes alone; in 24 layers they add up to something else."""

    def gate(up_gate: torch.Tensor, *rest: Any) -> torch.Tensor:
        return REFERENCE.gate(up_gate, *rest) * 1.03

    def add_norm(*given: Any) -> Any:
        total, normed = REFERENCE.add_norm(*given)
        return total, normed * 1.03

    wrong = replace(REFERENCE, name="wrong", gate=gate, add_norm=add_norm)
    monkeypatch.setattr(steps, "offered", lambda device: (wrong,))
    monkeypatch.setitem(recipes._SLACK, torch.bfloat16, 0.5)
    monkeypatch.setattr(steps, "_ROUNDINGS", 0.3)
    assert written(deep(std), caplog)


def test_rounded_outputs_use_no_random_numbers_and_end():
    model = deep(0.05)
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        plain = model(ids).logits
        state = torch.random.get_rng_state()
        with rounded_outputs(model):
            first = model(ids).logits
        assert torch.equal(torch.random.get_rng_state(), state)
        with rounded_outputs(model):
            assert torch.equal(model(ids).logits, first)
        assert not torch.equal(first, plain)
        assert torch.equal(model(ids).logits, plain)
