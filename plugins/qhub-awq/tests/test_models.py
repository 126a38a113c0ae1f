"""Whole models through transformers: load what others wrote, save, merge, quantize; refuse what is damaged."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AwqConfig, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from qhub import QuantizedTensor
from qhub.errors import CheckpointError, ConfigError
from qhub.layouts import Transform

# What a user's script looks like: nothing of qhub is imported.
_SCRIPT = """
import sys, torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
with torch.no_grad():
    torch.save(model(torch.arange(24).reshape(2, 12)).logits, sys.argv[2])
print(type(model.model.layers[0].mlp.up_proj.weight).__name__)
"""


def _quantized(model: Any) -> dict[str, QuantizedTensor]:
    return {name: p for name, p in model.named_parameters() if isinstance(p, QuantizedTensor)}


def _logits(model: Any, tokens: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(24).reshape(2, 12) if tokens is None else tokens).logits


def _same_tensors(first: Path, second: Path) -> None:
    before, after = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    assert set(before) == set(after)
    assert [name for name in before if before[name].dtype != after[name].dtype] == []
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def test_a_checkpoint_runs_and_is_written_back_byte_for_byte(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert len(_quantized(model)) == 7
    model.save_pretrained(tmp_path)
    _same_tensors(folder, tmp_path)
    assert torch.equal(_logits(AutoModelForCausalLM.from_pretrained(tmp_path)), _logits(model))
    read = [json.loads((f / "config.json").read_text())["quantization_config"] for f in (folder, tmp_path)]
    assert {name: read[1][name] for name in read[0] if name != "checkpoint_format"} == {
        name: value for name, value in read[0].items() if name != "checkpoint_format"
    }


def test_logits_are_those_of_the_dequantized_model(folder: Path) -> None:
    reference = load_file(folder / "reference.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = _logits(model, reference["input_ids"])
    # gemv's weights are the reference's; the others differ by roundings to float16. Measured 1e-6, 1.2e-3, 1.1e-2
    # with logits up to 3.2.
    bound = {"tiny-llama-gemv-g64": 2e-5}.get(folder.name, 3e-2)
    torch.testing.assert_close(found, reference["logits_dequant"], rtol=0, atol=bound)


def test_a_process_that_imports_only_transformers_loads_it(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "logits.pt"
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(folder), str(out)], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "QuantizedTensor"
    expected = _logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    assert torch.equal(torch.load(out, weights_only=True), expected)


def test_an_update_is_written_within_the_grid(folder: Path, tmp_path: Path) -> None:
    """An update as large as the weights' own spread arrives but for the grid's step, and the file says the same."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    for weight in _quantized(model).values():
        before = weight.dequantize()
        target = before + torch.randn(before.shape, generator=generator) * before.std()
        with torch.no_grad():
            weight.copy_(target)
        # Normal numbers on 16 levels in groups of 32 to 128.
        assert (weight.dequantize() - target).norm() < 0.15 * target.norm()
    model.save_pretrained(tmp_path)
    assert torch.equal(_logits(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)), _logits(model))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("scales", None),
        ("qzeros", None),
        ("qweight", torch.zeros(16, 256, dtype=torch.int32)),
        ("qzeros", torch.zeros(1, 32, dtype=torch.int32)),
        ("in_scale", torch.ones(4)),
        ("scales", torch.full((4, 256), float("nan"), dtype=torch.float16)),
    ],
)
def test_a_damaged_checkpoint_names_the_tensor(checkpoint: Path, tmp_path: Path, name: str, value: Any) -> None:
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    key = f"model.layers.0.mlp.up_proj.{name}"
    if value is None:
        del tensors[key]
    else:
        tensors[key] = value
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.up_proj"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


# -- quantizing ------------------------------------------------------------------------------------------------------


def _llama(folder: Path) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=96, max_position_embeddings=64))
    model.save_pretrained(folder)
    return model


def _samples(vocabulary: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, vocabulary, (1, 32), generator=generator) for _ in range(8)]


@pytest.mark.parametrize("version", ["gemm", "gemv", "gemv_fast", "llm-awq"])
def test_a_dense_model_is_quantized_by_the_config_of_transformers(tmp_path: Path, version: str) -> None:
    dense = _llama(tmp_path / "dense")
    config = AwqConfig(bits=4, group_size=32, version=version, dataset=_samples(96))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config, dtype=torch.float32)
    weights = _quantized(model)
    assert len(weights) == 14
    # The scales fold into norms, value and up projections: every layer is one that upstream reads.
    assert not any(weight.quant_layout.transforms for weight in weights.values())
    off = (_logits(model) - _logits(dense)).norm() / _logits(dense).norm()
    assert float(off) < 0.2
    model.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(_logits(again), _logits(model))
    entry = "scaled_zeros" if version == "llm-awq" else "qzeros"
    assert f"model.layers.0.mlp.up_proj.{entry}" in load_file(tmp_path / "out" / "model.safetensors")


def test_input_scales_without_a_place_to_fold_are_stored(tmp_path: Path) -> None:
    """OPT's second matrix of an MLP reads a ReLU of the first, its output projection the values: whatever folds or not,
    the saved model is the one in memory."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "ffn_dim": 128, "word_embed_proj_dim": 64, "num_attention_heads": 4}
    dense = OPTForCausalLM(OPTConfig(**sizes, num_hidden_layers=2, vocab_size=96, max_position_embeddings=64)).eval()
    dense.save_pretrained(tmp_path / "dense")
    config = AwqConfig(bits=4, group_size=32, dataset=_samples(96))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config, dtype=torch.float32)
    off = (_logits(model) - _logits(dense)).norm() / _logits(dense).norm()
    assert float(off) < 0.2
    scaled = {
        n for n, weight in _quantized(model).items() if weight.quant_layout.transforms == (Transform("scale", "in"),)
    }
    model.save_pretrained(tmp_path / "out")
    stored = {name for name in load_file(tmp_path / "out" / "model.safetensors") if name.endswith("in_scale")}
    assert stored == {name.removesuffix("weight") + "in_scale" for name in scaled}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(_logits(again), _logits(model))


def test_groups_that_fit_no_layer_are_refused(tmp_path: Path) -> None:
    _llama(tmp_path)
    with pytest.raises(ConfigError, match="group_size=48"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=AwqConfig(bits=4, group_size=48))
