"""Whole models through transformers: load what hqq wrote, quantize, save, load again, merge."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    HqqConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from qhub import QuantizedTensor
from qhub.errors import CheckpointError, ConfigError


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a small random Llama in bfloat16."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
    )
    folder = tmp_path_factory.mktemp("dense")
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def _load(folder: Path, **more: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **more)


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(24).reshape(2, 12)).logits


def _quantized(model: Any) -> dict[str, QuantizedTensor]:
    return {name: p for name, p in model.named_parameters() if isinstance(p, QuantizedTensor)}


def test_a_checkpoint_of_hqq_runs_and_is_written_back_byte_for_byte(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = _load(tiny_checkpoint)
    reference = load_file(tiny_checkpoint / "reference.safetensors")
    assert len(_quantized(model)) == 7
    with torch.no_grad():
        logits = model(reference["input_ids"]).logits
    # Both are float32 forwards of the same dense weights; measured 1.4e-6.
    torch.testing.assert_close(logits, reference["logits_dequant"], rtol=0, atol=2e-5)
    model.save_pretrained(tmp_path)
    before, after = load_file(tiny_checkpoint / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert set(before) == set(after)
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    read = [
        json.loads((folder / "config.json").read_text())["quantization_config"]
        for folder in (tiny_checkpoint, tmp_path)
    ]
    assert read[0] == read[1]


@pytest.mark.parametrize(
    "arguments",
    [
        {"nbits": 4, "group_size": 64},
        {"nbits": 3, "group_size": 32, "axis": 0},
        {"nbits": 2, "group_size": 16, "view_as_float": True},
        {"nbits": 8, "group_size": None},
        {"dynamic_config": {"self_attn.q_proj": {"nbits": 8}, "mlp.up_proj": {"nbits": 1, "group_size": 32}}},
    ],
)
def test_quantized_saved_and_loaded_logits_are_bit_identical(
    dense: Path, tmp_path: Path, arguments: dict[str, Any]
) -> None:
    model = _load(dense, dtype=torch.bfloat16, quantization_config=HqqConfig(**arguments))
    count = 4 if "dynamic_config" in arguments else 14
    assert len(_quantized(model)) == count
    logits = _logits(model)
    model.save_pretrained(tmp_path)
    again = _load(tmp_path)
    assert len(_quantized(again)) == count
    assert torch.equal(_logits(again), logits)


def test_scales_take_the_dtype_of_the_model(dense: Path) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        model = _load(dense, dtype=dtype, quantization_config=HqqConfig(nbits=4))
        weights = _quantized(model).values()
        assert {weight.parts["scales"].dtype for weight in weights} == {dtype}


def test_an_update_of_one_percent_is_merged(dense: Path) -> None:
    model = _load(dense, dtype=torch.float32, quantization_config=HqqConfig(nbits=8, group_size=32))
    weight = next(iter(_quantized(model).values()))
    before = weight.dequantize()
    torch.manual_seed(0)
    delta = torch.randn(weight.shape) * before.std() * 0.05
    with torch.no_grad():
        weight.copy_(before + delta)
    # 8 bits of a group spanning about 4 sigma to either side: a step of 8/255 sigma, an error of step/sqrt(12) = 0.009
    # sigma.
    left = (weight.dequantize() - before - delta).std() / before.std()
    assert left < 0.012


def test_a_group_size_that_does_not_fit_names_the_module(dense: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.self_attn\.\w+"):
        _load(dense, quantization_config=HqqConfig(nbits=4, group_size=24))


def _damaged(source: Path, target: Path, **changes: torch.Tensor | None) -> Path:
    shutil.copytree(source, target, dirs_exist_ok=True)
    tensors = load_file(target / "model.safetensors")
    for name, value in changes.items():
        key = f"model.layers.0.mlp.up_proj.{name}"
        if value is None:
            del tensors[key]
        else:
            tensors[key] = value
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("scale", None),
        ("W_q", torch.zeros(3, 3, dtype=torch.int32)),
        ("nbits", torch.tensor(5, dtype=torch.int32)),
        ("shape", torch.tensor([1 << 40, 2])),
        ("zero", torch.full((1, 512), float("nan"))),
    ],
)
def test_a_damaged_checkpoint_names_the_tensor(tiny_checkpoint: Path, tmp_path: Path, name: str, value: Any) -> None:
    folder = _damaged(tiny_checkpoint, tmp_path, **{name: value})
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.up_proj"):
        _load(folder)


@pytest.mark.parametrize("arguments", [{"nbits": 4}, {"dynamic_config": {"mlp.experts.gate_up_proj": {"nbits": 3}}}])
@pytest.mark.parametrize("axis", [0, 1])
def test_experts_are_quantized_one_by_one(tmp_path: Path, arguments: dict[str, Any], axis: int) -> None:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=96,
        num_experts=4,
        num_experts_per_tok=2,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "dense")
    values = HqqConfig(axis=axis, **arguments)
    if "dynamic_config" in arguments:
        values = HqqConfig(dynamic_config={"mlp.experts.gate_up_proj": {"nbits": 3, "axis": axis}})
    model = _load(tmp_path / "dense", quantization_config=values)
    fused = [weight for name, weight in _quantized(model).items() if name.endswith("experts.gate_up_proj")]
    assert [tuple(weight.shape) for weight in fused] == [(4, 128, 64)]
    logits = _logits(model)
    model.save_pretrained(tmp_path / "quantized")
    again = _load(tmp_path / "quantized")
    assert set(_quantized(again)) == set(_quantized(model))
    assert torch.equal(_logits(again), logits)
