"""Whole models through transformers: load what gptqmodel wrote, save it, merge into it; refuse what is damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from qhub_gptq.dynamic import Settings
from qhub_gptq.format import GptqFormat
from qhub_gptq.plan import layout_of
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTQConfig,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from qhub import QuantizedTensor
from qhub.errors import CheckpointError


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
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(_logits(again), _logits(model))
    read = [json.loads((f / "config.json").read_text())["quantization_config"] for f in (folder, tmp_path)]
    assert {name: read[1][name] for name in read[0]} == read[0]


def test_logits_are_those_of_the_dequantized_model(folder: Path) -> None:
    """The reference's weights carry gptqmodel's rounding to float16; the model itself is as sensitive as it is."""
    reference = load_file(folder / "reference.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = _logits(model, reference["input_ids"])
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).dequantize()
    with torch.no_grad():
        for name in _quantized(model):
            weight = dense.get_parameter(name)
            weight.copy_(weight.half().float())
    # Both are float32 forwards of the same dense weights; measured 1e-6.
    torch.testing.assert_close(_logits(dense, reference["input_ids"]), reference["logits_dequant"], rtol=0, atol=2e-5)
    # 2^-11 of each weight; measured 1.2e-3 with logits up to 3.2.
    torch.testing.assert_close(found, reference["logits_dequant"], rtol=0, atol=1e-2)


@pytest.mark.parametrize("given", [{}, {"quality": "high", "sym": False}, {"desc_act": True}], ids=str)
def test_a_model_is_quantized_by_transformers_own_config(
    given: dict[str, Any], checkpoint: Path, tmp_path: Path
) -> None:
    """Excluded layers stay dense, and what is saved loads with the same logits and says how it was made."""
    AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).dequantize().save_pretrained(
        tmp_path / "dense"
    )
    samples = [torch.randint(0, 64, (1, 24), generator=torch.Generator().manual_seed(i)) for i in range(8)]
    config = GPTQConfig(bits=4, group_size=32, dataset=samples, dynamic={"-:.*o_proj": {}}, **given)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    assert len(_quantized(model)) == 6
    assert (model.model.layers[0].mlp.down_proj.weight.quant_layout.transforms == ()) == ("desc_act" not in given)
    model.save_pretrained(tmp_path / "quantized")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    assert torch.equal(_logits(again), _logits(model))
    written = json.loads((tmp_path / "quantized" / "config.json").read_text())["quantization_config"]
    assert "quality" not in written
    assert written["dataset"] is None
    assert (written["meta"] or {}).get("quality") == given.get("quality")
    assert written["dynamic"] == {"-:.*o_proj": {}}


def test_a_config_given_to_a_checkpoint_is_understood(checkpoint: Path) -> None:
    """transformers takes loading attributes from it, and compares the two classes by name."""
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint, quantization_config=GPTQConfig(bits=8, backend="torch")
        )
    assert next(iter(_quantized(model).values())).quant_layout.bits == 4


def test_writing_back_what_is_there_changes_nothing(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for weight in _quantized(model).values():
        before = weight.dequantize()
        with torch.no_grad():
            weight.copy_(before.clone())
        assert torch.equal(weight.dequantize(), before)


def test_an_update_is_written_within_the_grid(folder: Path, tmp_path: Path) -> None:
    """An update as large as the weights' own spread arrives but for the grid's step, and the file says the same."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    for weight in _quantized(model).values():
        before = weight.dequantize()
        target = before + torch.randn(before.shape, generator=generator) * before.std()
        with torch.no_grad():
            weight.copy_(target)
        # Normal numbers on 16 levels in groups of 32, on 8 in groups of 128: measured 0.09 to 0.12, 0.24 to 0.26.
        allowed = 0.15 if weight.quant_layout.bits == 4 else 0.28
        assert (weight.dequantize() - target).norm() < allowed * target.norm()
    model.save_pretrained(tmp_path)
    assert torch.equal(_logits(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)), _logits(model))


def _damaged(source: Path, target: Path, name: str, value: Tensor | None) -> Path:
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
        ("g_idx", None),
        ("g_idx", torch.full((128,), 4, dtype=torch.int32)),
        ("g_idx", torch.full((128,), -1, dtype=torch.int32)),
        ("qweight", torch.zeros(12, 256, dtype=torch.int32)),
        ("qzeros", torch.zeros(1, 32, dtype=torch.int32)),
        ("scales", torch.full((4, 256), float("nan"), dtype=torch.float16)),
    ],
)
def test_a_damaged_checkpoint_names_the_tensor(checkpoint: Path, tmp_path: Path, name: str, value: Any) -> None:
    folder = _damaged(checkpoint, tmp_path, name, value)
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.up_proj"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_bias_of_zeros_where_the_model_has_none_is_left_out(checkpoint: Path, tmp_path: Path) -> None:
    """AutoGPTQ's layers always had a bias: its files hold one for each. Any other number in it would be lost."""
    bias = torch.zeros(256, dtype=torch.float16)
    folder = _damaged(checkpoint, tmp_path, "bias", bias)
    found, expected = (_logits(AutoModelForCausalLM.from_pretrained(one)) for one in (folder, checkpoint))
    assert torch.equal(found, expected)
    bias[7] = 1e-3
    with pytest.raises(CheckpointError, match=r"up_proj\.bias.* has no place in the model"):
        AutoModelForCausalLM.from_pretrained(_damaged(checkpoint, tmp_path, "bias", bias))


def _gptq(folder: Path, chosen: Callable[[str], Settings | None], transposed: bool = False, **values: Any) -> Any:
    """Rewrite the dense checkpoint in ``folder`` in GPTQ's entries with random codes; return its logits as it was.

    ``chosen``: the settings of a module, None to leave it. ``transposed``: the dense file holds (K, N) (GPT-2).
    """
    tensors = load_file(folder / "model.safetensors")
    dense, generator = dict(tensors), torch.Generator().manual_seed(0)
    fmt = GptqFormat(v1=values.get("checkpoint_format", "gptq") == "gptq")
    for key in [key for key in tensors if key.endswith(".weight") and tensors[key].ndim == 2]:
        prefix = key.removesuffix(".weight")
        settings = chosen(prefix)
        if settings is None:
            continue
        n, k = reversed(tensors[key].shape) if transposed else tensors[key].shape
        del tensors[key]
        layout = layout_of(settings, n, k)
        groups = layout.scale_shape[1]
        parts = {
            "qweight": layout.pack_codes(torch.randint(0, 2**settings.bits, (n, k), generator=generator)),
            "scales": (torch.rand(n, groups, generator=generator) * 2.0 ** -(settings.bits + 2)).half(),
        }
        if not settings.sym:
            parts["zeros"] = torch.randint(0, 2**settings.bits, (n, groups), generator=generator).to(torch.uint8)
        if layout.transforms:
            g_idx = (torch.arange(k) // layout.grid.cols)[torch.randperm(k, generator=generator)]
            parts["in_perm"] = torch.argsort(g_idx, stable=True).int()
        tensors |= {f"{prefix}.{name}": entry for name, entry in fmt.pack(layout, parts, torch.float16).items()}
        weight = layout.dequantize(parts)
        dense[key] = weight.t().contiguous() if transposed else weight
    save_file(dense, folder / "model.safetensors", metadata={"format": "pt"})
    expected = _logits(AutoModelForCausalLM.from_pretrained(folder))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", **values}
    (folder / "config.json").write_text(json.dumps(config))
    return expected


def _check(folder: Path, expected: Tensor) -> Any:
    """Load ``folder``: it gives ``expected`` up to float32 rounding, and saves the tensors it holds."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(_logits(model), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    model.save_pretrained(folder / "again")
    _same_tensors(folder, folder / "again")
    return model


def test_overrides_exclusions_and_a_quantized_head(tmp_path: Path) -> None:
    """``dynamic`` as gptqmodel writes it, and ``lm_head``: what the file stores quantized is quantized."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=72)).save_pretrained(tmp_path)

    def chosen(module: str) -> Settings | None:
        if "layers.1.mlp" in module or "embed" in module:
            return None
        if module.endswith("q_proj"):
            return Settings(8, 16, False, False)
        return Settings(3 if module == "lm_head" else 4, 32, True, True)

    dynamic = {
        "+:.*q_proj": {"bits": 8, "group_size": 16, "desc_act": False, "sym": False},
        "lm_head": {"bits": 3},
        r"-:.*layers\.1\.mlp": {},
    }
    expected = _gptq(tmp_path, chosen, bits=4, group_size=32, desc_act=True, lm_head=True, dynamic=dynamic)
    model = _check(tmp_path, expected)
    bits = {name.removesuffix(".weight"): weight.quant_layout.bits for name, weight in _quantized(model).items()}
    assert bits["lm_head"] == 3
    assert bits["model.layers.1.self_attn.q_proj"] == 8
    assert len(bits) == 12
    assert not any("layers.1.mlp" in name for name in bits)
    # The config excludes what the file stores quantized: one of the two is of another model.
    values = json.loads((tmp_path / "config.json").read_text())
    values["quantization_config"]["dynamic"][r"-:.*layers\.0\.mlp"] = {}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp.*left out by"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_layers_with_biases(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "ffn_dim": 96, "word_embed_proj_dim": 64, "num_attention_heads": 4}
    model = OPTForCausalLM(OPTConfig(**sizes, num_hidden_layers=1, vocab_size=64, max_position_embeddings=32))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    linear = (".q_proj", ".k_proj", ".v_proj", ".out_proj", ".fc1", ".fc2")
    expected = _gptq(
        tmp_path,
        lambda m: Settings(2, 16, False, False) if m.endswith(linear) else None,
        bits=2,
        group_size=16,
        sym=False,
    )
    _check(tmp_path, expected)


def test_gpt2_holds_its_weights_the_other_way_round(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=32)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    linear = ("c_attn", "c_proj", "c_fc")
    expected = _gptq(
        tmp_path,
        lambda m: Settings(4, -1, False, True) if m.endswith(linear) else None,
        transposed=True,
        bits=4,
        group_size=-1,
        checkpoint_format="gptq_v2",
    )
    assert len(_quantized(_check(tmp_path, expected))) == 4


@pytest.mark.parametrize("desc_act", [False, True])
def test_experts_have_their_own_order(tmp_path: Path, desc_act: bool) -> None:
    """A checkpoint as published ones are: one set of entries per expert and projection."""
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
    settings = Settings(4, 8, desc_act, False)
    values = {"bits": 4, "group_size": 8, "desc_act": desc_act, "sym": False}
    expected = _gptq(tmp_path, lambda m: settings if ".experts." in m else None, **values)
    model = _check(tmp_path, expected)
    assert {name.rsplit(".", 1)[1] for name in _quantized(model)} == {"gate_up_proj", "down_proj"}
