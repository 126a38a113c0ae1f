"""Quantizing through transformers: the head on request, overrides by module, the config in both files."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, GPTQConfig, LlamaConfig, LlamaForCausalLM

from qhub import QuantizedTensor
from qhub.errors import ConfigError

DATA = torch.randint(3, 128, (8, 32), generator=torch.Generator().manual_seed(0)).tolist()
IDS = torch.arange(3, 40)[None]


@pytest.fixture
def llama(tmp_path):
    def make(tied: bool = False):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=tied,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return make


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def test_the_output_head_on_request(llama, tmp_path):
    path = llama()
    config = GPTQConfig(bits=4, group_size=32, lm_head=True, dataset=DATA)
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=config)
    assert isinstance(model.lm_head.weight, QuantizedTensor)
    report = {layer.name: layer for layer in model.hf_quantizer.calibration.layers}
    assert report["lm_head.weight"].tokens == 8 * 32 and report["lm_head.weight"].error < 0.1
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(model))
    plain = AutoModelForCausalLM.from_pretrained(
        path, quantization_config=GPTQConfig(bits=4, group_size=32, dataset=DATA)
    )
    assert not isinstance(plain.lm_head.weight, QuantizedTensor)


def test_a_tied_head_is_refused(llama):
    config = GPTQConfig(bits=4, group_size=32, lm_head=True, dataset=DATA)
    with pytest.raises(ConfigError, match="tied"):
        AutoModelForCausalLM.from_pretrained(llama(tied=True), quantization_config=config)


def test_overrides_by_module(llama, tmp_path):
    dynamic = {r"+:.*\.down_proj$": {"bits": 8, "group_size": 96}, r"-:.*\.1\.self_attn\..*": {}}
    config = GPTQConfig(bits=4, group_size=32, dynamic=dynamic, dataset=DATA)
    model = AutoModelForCausalLM.from_pretrained(llama(), quantization_config=config)
    layers = model.model.layers
    assert layers[0].mlp.down_proj.weight.quant_layout.bits == 8
    assert layers[0].mlp.down_proj.weight.quant_layout.grid.cols == 96
    assert layers[0].mlp.up_proj.weight.quant_layout.bits == 4
    assert not isinstance(layers[1].self_attn.q_proj.weight, QuantizedTensor)
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(model))


def test_the_config_lies_in_both_files(llama, tmp_path):
    config = GPTQConfig(bits=4, group_size=32, desc_act=True, dataset=DATA)
    model = AutoModelForCausalLM.from_pretrained(llama(), quantization_config=config)
    out = tmp_path / "out"
    model.save_pretrained(out)
    beside = json.loads((out / "quantize_config.json").read_text())
    whole = json.loads((out / "config.json").read_text())
    assert beside["bits"] == 4 and beside["desc_act"] is True and beside["quant_method"] == "gptq"
    # Older folders have it in the one file alone.
    del whole["quantization_config"]
    (out / "config.json").write_text(json.dumps(whole))
    again = AutoModelForCausalLM.from_pretrained(out)
    assert isinstance(again.model.layers[0].mlp.up_proj.weight, QuantizedTensor)
    assert torch.equal(logits(again), logits(model))
