"""Whole models through transformers: load what EETQ wrote, quantize what it quantized, adapt it, refuse damage."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, EetqConfig

from qhub import QuantizedTensor
from qhub.errors import CheckpointError


def _quantized(model: Any) -> dict[str, QuantizedTensor]:
    return {name: p for name, p in model.named_parameters() if isinstance(p, QuantizedTensor)}


def _logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens).logits


def test_logits_are_those_of_the_dequantized_model(checkpoint: Path, reference: dict[str, Tensor]) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    assert len(_quantized(model)) == 14
    # Both are float32 forwards of the same dense weights; measured 1.5e-6.
    found = _logits(model, reference["input_ids"])
    torch.testing.assert_close(found, reference["logits_dequant"], rtol=0, atol=2e-5)


def test_the_file_is_written_back_byte_for_byte(checkpoint: Path, stored: dict[str, Tensor], tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(checkpoint).save_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    assert set(written) == set(stored)
    assert [name for name in stored if written[name].dtype != stored[name].dtype] == []
    assert [name for name in stored if not torch.equal(written[name], stored[name])] == []


def test_quantizing_on_the_fly_needs_neither_gpu_nor_kernels(checkpoint: Path, tmp_path: Path) -> None:
    """What EETQ's file holds, dequantized and quantized again, is the same within a step of the grid."""
    dense = tmp_path / "dense"
    AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).dequantize().save_pretrained(dense)
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float16, quantization_config=EetqConfig("int8"))
    before = load_file(dense / "model.safetensors")
    assert len(_quantized(model)) == 14 and "lm_head.weight" not in _quantized(model)
    for name, weight in _quantized(model).items():
        w = before[name]
        step = w.abs().amax(1, keepdim=True) / 128
        # A step where the largest magnitude is positive, and float16's rounding of weight and scale.
        assert bool(((weight.dequantize(torch.float32) - w).abs() <= step + 2.0**-10 * w.abs()).all()), name


def test_layers_of_other_shapes_stay_dense_and_are_reported(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    shapes: dict[str, Any] = dict(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=1)
    AutoModelForCausalLM.from_config(LlamaConfig(**shapes, num_attention_heads=2)).save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=EetqConfig("int8"))
    assert {name.split(".")[-2] for name in _quantized(model)} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert "64x64" in model.hf_quantizer.skipped["model.layers.0.mlp.up_proj.weight"]
    model.save_pretrained(tmp_path / "eetq")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "eetq")
    assert torch.equal(_logits(again, torch.arange(9)[None]), _logits(model, torch.arange(9)[None]))


def test_dora_trains_and_merges(checkpoint: Path, reference: dict[str, Tensor]) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    names = set(_quantized(model))
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules="all-linear"))
    tokens = reference["input_ids"]
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(5):
        loss = tuned(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tuned.eval()
    expected, untrained = _logits(tuned, tokens), reference["logits_dequant"]
    merged = tuned.merge_and_unload()
    assert set(_quantized(merged)) == names
    # 8 bits hold the adapter but for a small part of what it does.
    assert (_logits(merged, tokens) - expected).norm() < 0.1 * (untrained - expected).norm()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("weight_scales", None, ""),
        ("weight_scales", torch.zeros(256, dtype=torch.float16), "holds 0 for output channel 0"),
        ("weight_scales", torch.full((256,), float("inf"), dtype=torch.float16), "infinity"),
        ("weight", torch.zeros(256, 128, dtype=torch.int8), r"\(256, 128\)"),
    ],
)
def test_a_damaged_checkpoint_names_the_tensor(
    checkpoint: Path, tmp_path: Path, stored: dict[str, Tensor], name: str, value: Tensor | None, message: str
) -> None:
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    key = f"model.layers.1.mlp.up_proj.{name}"
    changed = {**stored, key: value}
    save_file({k: v for k, v in changed.items() if v is not None}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"(?s)model\.layers\.1\.mlp\.up_proj.*{message}"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
