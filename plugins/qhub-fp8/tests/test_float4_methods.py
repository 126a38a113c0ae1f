"""mxfp4 and nvfp4: entries as their libraries decode them, gpt-oss files, layers that do not fit."""

from __future__ import annotations

import json

import pytest
import torch
from qhub_fp8.mxfp4 import Mxfp4Format
from qhub_fp8.nvfp4 import Nvfp4Format
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM, Mxfp4Config, NVFP4Config

from qhub import QuantizedTensor
from qhub.errors import CheckpointError, ConfigError, LayoutError
from qhub.layouts.float4 import mxfp4, nvfp4, quantize_float4

VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def nibbles(packed):
    """Return codes (..., 2 * bytes) int64, the low nibble first."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2).long()


def test_mxfp4_entries(same_bytes):
    layout = mxfp4(6, 96)
    parts = quantize_float4(torch.randn(6, 96), layout)
    entries = Mxfp4Format().pack(layout, parts, torch.float32)
    dense = VALUES[nibbles(entries["weight_blocks"])] * torch.exp2(entries["weight_scales"].double() - 127)[..., None]
    assert torch.equal(layout.dequantize(parts).double(), dense.reshape(6, 96))
    _, again = Mxfp4Format().unpack(layout, entries)
    assert all(same_bytes(again[name], parts[name]) for name in parts)
    entries["weight_scales"][2, 1] = 255
    with pytest.raises(LayoutError, match="weight_scales"):
        Mxfp4Format().unpack(layout, entries)


def test_nvfp4_entries(same_bytes):
    layout = nvfp4(6, 96, divide=False)
    parts = quantize_float4(torch.randn(6, 96), layout)
    entries = Nvfp4Format().pack(layout, parts, torch.float32)
    scales = (entries["weight_scale"].float() * entries["weight_scale_2"]).repeat_interleave(16, 1)
    torch.testing.assert_close(layout.dequantize(parts), VALUES[nibbles(entries["weight"])] * scales)
    _, again = Nvfp4Format().unpack(layout, entries)
    assert all(same_bytes(again[name], parts[name]) for name in parts)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_an_impossible_scale_over_all_is_named(value):
    layout = nvfp4(6, 96, divide=False)
    entries = Nvfp4Format().pack(layout, quantize_float4(torch.randn(6, 96), layout), torch.float32)
    with pytest.raises(LayoutError, match="weight_scale_2"):
        Nvfp4Format().unpack(layout, entries | {"weight_scale_2": torch.tensor(value)})


@pytest.mark.parametrize("config", [Mxfp4Config(), NVFP4Config()], ids=["mxfp4", "nvfp4"])
def test_layers_that_do_not_fit_stay_as_they_are(llama, tmp_path, ids, config):
    # 80 input features are five groups of 16 and two and a half of 32.
    llama(intermediate_size=160).save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    assert len(model.hf_quantizer.plan) == (2 if isinstance(config, Mxfp4Config) else 14)
    assert any("multiple of 32" in reason for reason in model.hf_quantizer.skipped.values()) == isinstance(
        config, Mxfp4Config
    )
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), ids), logits(model, ids))


def test_nothing_fits(llama, tmp_path):
    llama(intermediate_size=72).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="multiple of 32"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=Mxfp4Config())


@pytest.fixture
def gpt_oss(tmp_path):
    """Return the folder of a tiny dense gpt-oss, and the config that its published checkpoints have."""
    torch.manual_seed(0)
    model = GptOssForCausalLM(
        GptOssConfig(
            vocab_size=250, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, num_local_experts=4, num_experts_per_tok=2, bos_token_id=1,
            eos_token_id=2, pad_token_id=0,
        )
    )  # fmt: skip
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.1 if "norm" not in name else 1.0)
    model.save_pretrained(tmp_path / "dense")
    left = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    return tmp_path / "dense", Mxfp4Config(modules_to_not_convert=left)


def test_experts_of_gpt_oss_are_one_tensor(gpt_oss, tmp_path, ids):
    folder, config = gpt_oss
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    assert set(model.hf_quantizer.plan) == {
        f"model.layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")
    }
    model.save_pretrained(tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    prefix = "model.layers.0.mlp.experts.gate_up_proj"
    blocks, scales = stored[f"{prefix}_blocks"], stored[f"{prefix}_scales"]
    assert (tuple(blocks.shape), tuple(scales.shape)) == ((4, 192, 2, 16), (4, 192, 2))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    experts = again.model.layers[0].mlp.experts
    assert isinstance(experts.gate_up_proj, QuantizedTensor)
    assert torch.equal(logits(again, ids), logits(model, ids))
    # As transformers itself decodes it, into (experts, in, out).
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    dense = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert torch.equal(experts.gate_up_proj.dequantize(torch.float32), dense.reshape(4, 64, 192))


@pytest.mark.parametrize("damage", ["missing", "shape", "value"])
def test_damage_to_stacked_experts_is_named(gpt_oss, tmp_path, damage):
    folder, config = gpt_oss
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    model.save_pretrained(tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    stored = load_file(file)
    name = "model.layers.0.mlp.experts.down_proj_scales"
    if damage == "missing":
        del stored[name]
    elif damage == "shape":
        stored[name] = stored[name][:3].clone()
    else:
        stored[name][2, 5, 1] = 255
    save_file(stored, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="down_proj"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["quant_method"] == "mxfp4"
