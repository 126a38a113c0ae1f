"""`qhub.quantize`: a live model in place, a folder into a folder, with data or without."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

import qhub
from qhub.errors import ConfigError


def logits(model):
    with torch.no_grad():
        return model(torch.arange(3, 40)[None]).logits


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3-moe"])
def test_a_live_model_is_as_one_from_pretrained(watched, tiny, tokens, tmp_path, architecture):
    data = tokens(count=8, length=64)
    config = watched.config(options={"data": data, "min_tokens": 1})
    loaded = AutoModelForCausalLM.from_pretrained(tiny(architecture), quantization_config=config)
    live = AutoModelForCausalLM.from_pretrained(tiny(architecture))
    blocks: list[str] = []
    again = qhub.quantize(
        live, watched.config(), data=data, min_tokens=1, progress=lambda done, total, name: blocks.append(name)
    )
    assert again is live and torch.equal(logits(live), logits(loaded))
    assert len(blocks) == 3
    live.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(live))
    with pytest.raises(ConfigError, match="quantized already"):
        qhub.quantize(live, config)


def test_a_method_without_data(pow2, tiny, tmp_path):
    from pow2_quant import Pow2Config

    live = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    qhub.quantize(live, Pow2Config())
    loaded = AutoModelForCausalLM.from_pretrained(tiny("llama"), quantization_config=Pow2Config())
    assert torch.equal(logits(live), logits(loaded))
    qhub.quantize(str(tiny("llama")), Pow2Config(), out=tmp_path / "out")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(live))


def test_a_folder_needs_a_place(pow2, tiny):
    from pow2_quant import Pow2Config

    with pytest.raises(ConfigError, match="give out"):
        qhub.quantize(str(tiny("llama")), Pow2Config())


def test_a_model_writes_its_own_text(watched, doclm):
    model = AutoModelForCausalLM.from_pretrained(doclm, dtype=torch.float32)
    qhub.quantize(model, watched.config(), samples=4, length=48)
    report = model.hf_quantizer.calibration
    assert report.layers[0].tokens == 4 * 48
    assert any("wrote 4 samples itself" in warning for warning in report.warnings)


def test_damaged_activations_name_layer_and_sample(watched, tiny, tokens):
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[3] = float("nan")
    with pytest.raises(
        qhub.QhubError, match=r"layers\.1\.self_attn\..*NaN or infinity in calibration sample 0 of batch 0"
    ):
        qhub.quantize(model, watched.config(), data=tokens())
