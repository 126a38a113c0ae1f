"""Whole models through transformers: load what aqlm holds, save it, merge into it; refuse what is damaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AqlmConfig, AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from qhub import QuantizedTensor
from qhub.errors import CheckpointError, UnsupportedError


def _quantized(model: Any) -> dict[str, QuantizedTensor]:
    return {name: p for name, p in model.named_parameters() if isinstance(p, QuantizedTensor)}


def _logits(model: Any, tokens: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(24).reshape(2, 12) if tokens is None else tokens).logits


def test_a_checkpoint_runs_and_is_written_back_byte_for_byte(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    reference = load_file(tiny_checkpoint / "reference.safetensors")
    assert len(_quantized(model)) == 7
    name = "model.layers.0.self_attn.k_proj.weight"
    assert torch.equal(_quantized(model)[name].dequantize(torch.float32), reference[f"dequant.{name}"])
    model.save_pretrained(tmp_path)
    before, after = load_file(tiny_checkpoint / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert set(before) == set(after)
    assert [name for name in before if before[name].dtype != after[name].dtype] == []
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(_logits(again, reference["input_ids"]), _logits(model, reference["input_ids"]))
    read = [json.loads((f / "config.json").read_text())["quantization_config"] for f in (tiny_checkpoint, tmp_path)]
    assert read[0] == read[1]


def test_logits_are_those_of_the_dequantized_model(tiny_checkpoint: Path) -> None:
    reference = load_file(tiny_checkpoint / "reference.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    # Both are float32 forwards of the same dense weights; measured 1.0e-6.
    found = _logits(model, reference["input_ids"])
    torch.testing.assert_close(found, reference["logits_dequant"], rtol=0, atol=2e-5)


def test_quantizing_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32).dequantize().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="does not quantize"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=AqlmConfig())


def test_writing_back_what_is_there_changes_nothing(tiny_checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    for weight in _quantized(model).values():
        before = weight.dequantize()
        with torch.no_grad():
            weight.copy_(before.clone())
        torch.testing.assert_close(weight.dequantize(), before, rtol=0, atol=1e-3 * float(before.std()))


def test_a_large_update_moves_the_weight_towards_it(tiny_checkpoint: Path) -> None:
    """2 bits hold little of an update: of one as large as the weight itself more than half must arrive."""
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    weight = next(iter(_quantized(model).values()))
    before = weight.dequantize()
    torch.manual_seed(0)
    target = before + torch.randn(before.shape) * before.std()
    with torch.no_grad():
        weight.copy_(target)
    assert (weight.dequantize() - target).norm() < 0.5 * (before - target).norm()


def _damaged(source: Path, target: Path, name: str, value: torch.Tensor | None) -> Path:
    shutil.copytree(source, target, dirs_exist_ok=True)
    tensors = load_file(target / "model.safetensors")
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
        ("scales", None),
        ("codes", torch.zeros(256, 16, 1, dtype=torch.int8)),
        ("codebooks", torch.full((2, 256, 1, 8), float("nan"), dtype=torch.float16)),
    ],
)
def test_a_damaged_checkpoint_names_the_tensor(tiny_checkpoint: Path, tmp_path: Path, name: str, value: Any) -> None:
    folder = _damaged(tiny_checkpoint, tmp_path, name, value)
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.up_proj"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_experts_of_a_mixture_have_their_own_codebooks(tmp_path: Path) -> None:
    """A checkpoint as published ones are: one set of codes and codebooks per expert and projection."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=64,
        num_experts=3,
        num_experts_per_tok=2,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    dense = dict(tensors)
    for key in [key for key in tensors if ".experts." in key]:
        n, k = tensors.pop(key).shape
        prefix = key.removesuffix(".weight")
        codes = torch.randint(-128, 128, (n, k // 8, 2), dtype=torch.int8)
        books, scales = torch.randn(2, 256, 1, 8) * 0.02, torch.rand(n, 1, 1, 1) + 0.5
        tensors |= {f"{prefix}.codes": codes, f"{prefix}.codebooks": books, f"{prefix}.scales": scales}
        index = codes.long() % 256
        dense[key] = ((books[0][index[..., 0]] + books[1][index[..., 1]]) * scales).reshape(n, k)
    save_file(dense, tmp_path / "model.safetensors", metadata={"format": "pt"})
    expected = _logits(AutoModelForCausalLM.from_pretrained(tmp_path))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((tmp_path / "config.json").read_text())
    values["quantization_config"] = AqlmConfig(num_codebooks=2, nbits_per_codebook=8).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(values))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(_logits(model), expected, rtol=0, atol=1e-5)
    assert {name.rsplit(".", 1)[1] for name in _quantized(model)} == {"gate_up_proj", "down_proj"}
    model.save_pretrained(tmp_path / "again")
    written = load_file(tmp_path / "again" / "model.safetensors")
    assert set(written) == set(tensors)
    assert [key for key in tensors if not torch.equal(written[key], tensors[key])] == []
