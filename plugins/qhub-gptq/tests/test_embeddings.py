"""Input embeddings quantized on request, with an output head that is tied to them or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GPTQConfig, LlamaConfig, LlamaForCausalLM

import qhub
from qhub.tensor import QuantizedTensor

TOKENS = torch.arange(3, 27)[None]


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def dense(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=80, tie_word_embeddings=request.param)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def _config(**values: Any) -> GPTQConfig:
    data = [[(7 * i + 3 * j) % 80 for j in range(48)] for i in range(4)]
    return GPTQConfig(bits=4, group_size=32, dataset=data, embeddings=True, **values)


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def test_a_model_in_memory_and_its_file(dense: Path, tmp_path: Path) -> None:
    """The table is quantized, a tied head with it; saved under gptq's names, reloaded with the same logits."""
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=_config(desc_act=True))
    table, head = model.model.embed_tokens.weight, model.lm_head.weight
    assert isinstance(table, QuantizedTensor) and table.quant_layout.bits == 4
    tied = model.config.tie_word_embeddings
    assert (head is table) == tied and isinstance(head, QuantizedTensor) == tied
    original = AutoModelForCausalLM.from_pretrained(dense).model.embed_tokens.weight
    # Not above rounding on the range of each group: step / sqrt(12), with steps of the largest weight / 7.5.
    ranges = original.float().reshape(80, 2, 32).abs().amax(-1) / 7.5
    off = float((table.dequantize(torch.float32) - original.float()).square().mean().sqrt())
    assert off <= float((ranges / 12**0.5).square().mean().sqrt())
    model.save_pretrained(tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert {"model.embed_tokens.qweight", "model.embed_tokens.scales"} <= set(file.keys())
        assert "model.embed_tokens.weight" not in file.keys()  # noqa: SIM118 - the handle is no container
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    assert torch.equal(_logits(again), _logits(model))
    plain = again.dequantize()
    assert not isinstance(plain.model.embed_tokens.weight, QuantizedTensor)
    torch.testing.assert_close(_logits(plain), _logits(model), rtol=0, atol=1e-4)


def test_from_folder_to_folder(dense: Path, tmp_path: Path) -> None:
    """Streaming writes what quantizing in memory does."""
    live = qhub.quantize(AutoModelForCausalLM.from_pretrained(dense), _config())
    qhub.quantize(str(dense), _config(), out=tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert isinstance(again.model.embed_tokens.weight, QuantizedTensor)
    assert torch.equal(_logits(again), _logits(live))


def test_only_on_request_and_never_for_the_rules_that_exclude(dense: Path) -> None:
    """Without the key nothing changes; ``dynamic`` leaves the table out, or gives it other bits."""
    data = [[(7 * i + 3 * j) % 80 for j in range(48)] for i in range(4)]
    usual = AutoModelForCausalLM.from_pretrained(
        dense, quantization_config=GPTQConfig(bits=4, group_size=32, dataset=data)
    )
    assert not isinstance(usual.model.embed_tokens.weight, QuantizedTensor)
    out = AutoModelForCausalLM.from_pretrained(dense, quantization_config=_config(dynamic={"-:.*embed": {}}))
    assert not isinstance(out.model.embed_tokens.weight, QuantizedTensor)
    wide = AutoModelForCausalLM.from_pretrained(dense, quantization_config=_config(dynamic={"+:.*embed": {"bits": 8}}))
    assert wide.model.embed_tokens.weight.quant_layout.bits == 8
