"""Whole models through transformers: load what QuIP#'s code packed, save it, adapt it; refuse what is damaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from qhub_quip.config import QuipConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qhub import QuantizedTensor
from qhub.errors import CheckpointError, ConfigError, UnknownMethodError, UnsupportedError

LAYER = "model.layers.0.self_attn.k_proj.weight"


def _quantized(model: Any) -> dict[str, QuantizedTensor]:
    return {name: p for name, p in model.named_parameters() if isinstance(p, QuantizedTensor)}


def _logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens).logits


def test_a_checkpoint_runs_and_is_written_back_byte_for_byte(checkpoint: Path, tmp_path: Path) -> None:
    """Its config.json has ``quip_params`` and no ``quantization_config``; what is written has both."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    reference = load_file(checkpoint / "reference.safetensors")
    assert len(_quantized(model)) == 7
    expected = reference[f"dequant.{LAYER}"]
    found = _quantized(model)[LAYER].dequantize(torch.float32)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-6
    model.save_pretrained(tmp_path)
    before, after = load_file(checkpoint / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert set(before) == set(after)
    quantized = [name for name in before if name.startswith("model.layers") and "norm" not in name]
    assert [name for name in quantized if before[name].dtype != after[name].dtype] == []
    assert [name for name in quantized if not torch.equal(before[name], after[name])] == []
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(_logits(again, reference["input_ids"]), _logits(model, reference["input_ids"]))
    read = [json.loads((folder / "config.json").read_text()) for folder in (checkpoint, tmp_path)]
    assert read[0]["quip_params"].items() <= read[1]["quip_params"].items()
    assert read[1]["quantization_config"]["quant_method"] == "quip"


def test_logits_are_those_of_the_dequantized_model(checkpoint: Path) -> None:
    reference = load_file(checkpoint / "reference.safetensors")
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    # Both are float32 forwards of the same dense weights, one rotates activations; measured 2.0e-6.
    found = _logits(model, reference["input_ids"])
    torch.testing.assert_close(found, reference["logits_dequant"], rtol=0, atol=2e-5)


def test_a_dequantized_model_says_nothing_of_quip(checkpoint: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).dequantize()
    reference = load_file(checkpoint / "reference.safetensors")
    model.save_pretrained(tmp_path)
    assert not {"quip_params", "quantization_config"} & set(json.loads((tmp_path / "config.json").read_text()))
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(_logits(again, reference["input_ids"]), _logits(model, reference["input_ids"]))


def test_quantizing_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).dequantize().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="does not quantize"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=QuipConfig())


def test_a_disabled_plugin_loads_no_random_weights(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QHUB_DISABLE", "quip")
    with pytest.raises(UnknownMethodError, match="QHUB_DISABLE"):
        AutoModelForCausalLM.from_pretrained(checkpoint)


@pytest.mark.parametrize("use_dora", [False, True])
def test_adapters_train_and_merge(checkpoint: Path, use_dora: bool) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    names = set(_quantized(model))
    config = peft.LoraConfig(r=8, lora_alpha=16, use_dora=use_dora, target_modules="all-linear")
    tuned = peft.get_peft_model(model, config)
    tokens = load_file(checkpoint / "reference.safetensors")["input_ids"]
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(30):
        loss = tuned(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    merged = tuned.eval().merge_and_unload()
    assert set(_quantized(merged)) == names
    with torch.no_grad():
        loss = float(merged(input_ids=tokens, labels=tokens).loss)
    # At 2 bits part of the training is lost to rounding; half of it has to arrive.
    assert loss < (losses[0] + losses[-1]) / 2, f"{losses[0]} -> {losses[-1]}, merged {loss}"


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
        ("SU", None),
        ("Wscale", torch.tensor(0.0)),
        ("SV", torch.full((256,), float("nan"), dtype=torch.float16)),
        ("codebook_id", torch.tensor(18)),
        ("Qidxs", torch.zeros(256, 8, dtype=torch.int64)),
    ],
)
def test_a_damaged_checkpoint_names_the_tensor(checkpoint: Path, tmp_path: Path, name: str, value: Any) -> None:
    folder = _damaged(checkpoint, tmp_path, name, value)
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.up_proj"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("params", [{"codebook": "E8P13"}, {"lora_rank": 64}, {"codesz": 1 << 60}, {"hostile": 1}])
def test_hostile_settings_are_refused(checkpoint: Path, tmp_path: Path, params: dict[str, Any]) -> None:
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    values = json.loads((tmp_path / "config.json").read_text())
    values["quip_params"] |= params
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=next(iter(params))):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_settings_that_are_no_object_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    values = json.loads((tmp_path / "config.json").read_text())
    values["quip_params"] = "E8P12"
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="'quip_params'"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
