"""Whole models through transformers: load what the library wrote, save it, quantize, merge; refuse what is damaged."""

from __future__ import annotations

import json
import re
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    CompressedTensorsConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from qhub import QuantizedTensor
from qhub.errors import CheckpointError, ConfigError

_DATA = Path(__file__).parent / "data"


def _quantized(model: Any) -> dict[str, QuantizedTensor]:
    return {name: p for name, p in model.named_parameters() if isinstance(p, QuantizedTensor)}


def _logits(model: Any, tokens: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(3, 35)[None] if tokens is None else tokens).logits


def _config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def _edited(source: Path, target: Path, tensors: dict[str, Tensor | None], **values: Any) -> Path:
    shutil.copytree(source, target)
    stored = load_file(source / "model.safetensors")
    stored = {key: tensor for key, tensor in {**stored, **tensors}.items() if tensor is not None}
    save_file(stored, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] |= values
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_a_checkpoint_is_written_back_byte_for_byte(folder: Path, tmp_path: Path) -> None:
    # In the dtype of its own dense tensors.
    before = load_file(folder / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=before["lm_head.weight"].dtype)
    assert len(_quantized(model)) == 7
    model.save_pretrained(tmp_path)
    after = load_file(tmp_path / "model.safetensors")
    assert set(before) == set(after)
    assert [n for n in before if before[n].dtype != after[n].dtype or before[n].shape != after[n].shape] == []
    assert [n for n in before if not torch.equal(before[n].view(torch.uint8), after[n].view(torch.uint8))] == []
    read = [_config(one) for one in (folder, tmp_path)]
    assert {name: read[1][name] for name in read[0]} == read[0]


def test_logits_are_the_librarys(folder: Path) -> None:
    reference = load_file(folder / "reference.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if "logits" in reference:
        # The library's forward in float32, inputs rounded by the same rules.
        torch.testing.assert_close(_logits(model), reference["logits"], rtol=0, atol=1e-4)
    else:
        # Of a model with weights rounded to bfloat16: 2^-9 of each; measured 1.1e-2 with logits of up to 3.
        found = _logits(model, reference["input_ids"])
        torch.testing.assert_close(found, reference["logits_dequant"], rtol=0, atol=5e-2)


def test_loading_dense(tmp_path: Path) -> None:
    folder = _DATA / "tiny-llama-w4a16-asym"
    packed = AutoModelForCausalLM.from_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dense = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=CompressedTensorsConfig(dequantize=True)
        )
    assert not _quantized(dense) and not getattr(dense.config, "quantization_config", None)
    torch.testing.assert_close(_logits(dense), _logits(packed), rtol=0, atol=2e-5)
    dense.save_pretrained(tmp_path)
    assert torch.equal(_logits(AutoModelForCausalLM.from_pretrained(tmp_path)), _logits(dense))


def test_scales_of_the_cache_come_and_go(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They are no part of the model, and not lost; what nobody announced is refused."""
    source = _DATA / "tiny-llama-w4a16"
    prefix = "model.layers.0.self_attn"
    scales = {f"{prefix}.k_scale": torch.tensor([0.25]), f"{prefix}.v_scale": torch.tensor([0.5], dtype=torch.bfloat16)}
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
    folder = _edited(source, tmp_path / "kv", {**scales}, kv_cache_scheme=scheme)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"]
    assert torch.equal(_logits(model), _logits(AutoModelForCausalLM.from_pretrained(source)))
    model.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    for key, scale in scales.items():
        assert again[key].dtype == scale.dtype and torch.equal(again[key], scale)
    assert _config(tmp_path / "again")["kv_cache_scheme"] == scheme
    strange = _edited(source, tmp_path / "strange", {f"{prefix}.z_scale": torch.ones(1)})
    with pytest.raises(CheckpointError, match="z_scale"):
        AutoModelForCausalLM.from_pretrained(strange)


def _llama() -> Any:
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, max_position_embeddings=64)
    )  # fmt: skip


def _opt() -> Any:
    return OPTForCausalLM(
        OPTConfig(vocab_size=64, hidden_size=128, ffn_dim=256, num_hidden_layers=1, num_attention_heads=4,
                  max_position_embeddings=64, word_embed_proj_dim=128)
    )  # fmt: skip


def _mixtral() -> Any:
    return MixtralForCausalLM(
        MixtralConfig(vocab_size=64, hidden_size=128, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
                      num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64)
    )  # fmt: skip


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[Callable[[], Any]], Path]:
    def save(make: Callable[[], Any]) -> Path:
        torch.manual_seed(0)
        make().save_pretrained(tmp_path / "dense")
        return tmp_path / "dense"

    return save


@pytest.mark.parametrize("scheme", ["W4A16", "W8A8", "FP8_DYNAMIC", "NVFP4A16", "MXFP4A16"])
@pytest.mark.parametrize("make", [_opt, _mixtral], ids=["opt", "mixtral"])
def test_models_quantize_save_and_reload(
    scheme: str, make: Callable[[], Any], saved: Callable[[Callable[[], Any]], Path], tmp_path: Path
) -> None:
    given = {"quant_method": "compressed-tensors", "config_groups": {scheme: ["Linear"]}, "ignore": ["re:.*gate$"]}
    model = AutoModelForCausalLM.from_pretrained(saved(make), quantization_config=given)
    model.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokens = torch.arange(3, 19)[None]
    assert torch.equal(_logits(again, tokens), _logits(model, tokens))
    names = load_file(tmp_path / "out" / "model.safetensors")
    config = _config(tmp_path / "out")
    assert config["quantization_status"] == "compressed"
    if make is _mixtral:
        # As published files have them: one matrix an expert.
        experts = [n for n in names if re.fullmatch(r".*block_sparse_moe\.experts\.\d\.w\d\.weight_scale", n)]
        assert len(experts) == 4 * 3
        assert config["ignore"] == ["re:.*gate$", "lm_head"]
    else:
        assert "model.decoder.layers.0.fc1.bias" in names
        # lm_head is tied, and no file holds it; the library finds a module of that name all the same.
        assert config["ignore"] == ["re:.*gate$", "lm_head"]


def test_experts_under_the_names_that_llm_compressor_gives_them(
    saved: Callable[[Callable[[], Any]], Path], tmp_path: Path
) -> None:
    """llm-compressor 0.14 writes Mixtral's w1, w2, w3 as gate_proj, down_proj, up_proj."""
    given = CompressedTensorsConfig(config_groups={"W4A16": ["Linear"]})
    model = AutoModelForCausalLM.from_pretrained(saved(_mixtral), quantization_config=given)
    model.save_pretrained(tmp_path / "out")
    other = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    tensors = {
        re.sub(r"(experts\.\d\.)(w\d)", lambda found: found[1] + other[found[2]], name): tensor
        for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items()
    }
    assert sum("experts.0.gate_proj" in name for name in tensors) == 3
    save_file(tensors, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(_logits(again), _logits(model))


def test_embeddings_and_head_where_targets_name_them(
    saved: Callable[[Callable[[], Any]], Path], tmp_path: Path
) -> None:
    groups = {"W8A16": ["Linear", "Embedding", "lm_head"]}
    config = CompressedTensorsConfig(config_groups=groups)
    model = AutoModelForCausalLM.from_pretrained(saved(_llama), quantization_config=config)
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= set(_quantized(model))
    model.save_pretrained(tmp_path / "out")
    assert _config(tmp_path / "out")["ignore"] == []
    assert torch.equal(_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), _logits(model))


def test_ignored_modules_stay_dense(saved: Callable[[Callable[[], Any]], Path], tmp_path: Path) -> None:
    config = CompressedTensorsConfig(
        config_groups={"W4A16": ["re:.*self_attn.*"], "FP8_DYNAMIC": ["re:.*down_proj$", "model.layers.1.mlp.up_proj"]},
        ignore=["re:.*layers\\.0\\.self_attn\\.[ko]_proj$"],
    )
    model = AutoModelForCausalLM.from_pretrained(saved(_llama), quantization_config=config)
    kinds = {name.removesuffix(".weight"): w.quant_layout.kind for name, w in _quantized(model).items()}
    wanted = {f"model.layers.{i}.self_attn.{p}_proj": "affine" for i in range(2) for p in "qkvo" if i or p in "qv"}
    wanted |= {f"model.layers.{i}.mlp.down_proj": "float8" for i in range(2)} | {"model.layers.1.mlp.up_proj": "float8"}
    assert kinds == wanted
    assert "ignore" in model.hf_quantizer.skipped["model.layers.0.self_attn.k_proj.weight"]
    assert "no target" in model.hf_quantizer.skipped["model.layers.0.mlp.up_proj.weight"]
    model.save_pretrained(tmp_path / "out")
    assert _config(tmp_path / "out")["format"] == "mixed-precision"
    assert torch.equal(_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), _logits(model))


@pytest.mark.parametrize(("scheme", "entry"), [("FP8", "input_scale"), ("NVFP4", "input_global_scale")])
def test_stored_scales_of_inputs_are_calibrated(
    scheme: str, entry: str, saved: Callable[[Callable[[], Any]], Path], tmp_path: Path
) -> None:
    from qhub.integrations.transformers.quantize import quantize

    folder = saved(_llama)
    dense = AutoModelForCausalLM.from_pretrained(folder)
    samples = torch.randint(64, (4, 16), generator=torch.Generator().manual_seed(1))
    seen: dict[str, Tensor] = {}
    layer = dense.model.layers[0].self_attn.q_proj
    layer.register_forward_pre_hook(lambda module, args: seen.update(x=torch.cat([seen.get("x", args[0]), args[0]])))
    _logits(dense, samples)
    config = CompressedTensorsConfig(config_groups={scheme: ["Linear"]})
    model = quantize(AutoModelForCausalLM.from_pretrained(folder), config, data=samples.tolist())
    model.save_pretrained(tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")[f"model.layers.0.self_attn.q_proj.{entry}"]
    largest = float(seen["x"].abs().max())
    wanted = largest / 448 if scheme == "FP8" else 448 * 6 / largest
    # Batches are cut elsewhere: sums of 128 products differ in their last places.
    torch.testing.assert_close(float(found), wanted, rtol=1e-5, atol=0)
    assert torch.equal(_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), _logits(model))


@pytest.mark.parametrize("scheme", ["W4A16_ASYM", "FP8_DYNAMIC", "NVFP4A16"])
def test_dora_trains_and_merges(scheme: str, saved: Callable[[Callable[[], Any]], Path], tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    config = CompressedTensorsConfig(config_groups={scheme: ["Linear"]})
    model = AutoModelForCausalLM.from_pretrained(saved(_llama), quantization_config=config)
    base = _logits(model)
    torch.manual_seed(0)
    tuned = get_peft_model(model, LoraConfig(r=4, use_dora=True, target_modules=["q_proj", "down_proj"]))
    tokens = torch.arange(3, 35)[None]
    optimizer = torch.optim.Adam([p for p in tuned.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(6):
        loss = tuned(tokens, labels=tokens).loss
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    moved = _logits(tuned)
    merged = tuned.merge_and_unload()
    assert len(_quantized(merged)) == 14
    away, change = (_logits(merged) - moved).norm(), (moved - base).norm()
    # Rounding to the grid costs something: measured 0.35 of the change at 4 bits, 0.1 at 8.
    assert float(away) < 0.8 * float(change)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), _logits(merged))


def test_groups_that_do_not_divide_are_refused_with_the_weights_name(
    saved: Callable[[Callable[[], Any]], Path],
) -> None:
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 96}}
    with pytest.raises(ConfigError, match=r"layers\.0\.self_attn\.q_proj has 128 inputs"):
        AutoModelForCausalLM.from_pretrained(
            saved(_llama), quantization_config=CompressedTensorsConfig(config_groups={"g": group})
        )


_PREFIX = "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize(
    ("tensors", "values"),
    [
        ({f"{_PREFIX}.weight_shape": torch.tensor([2**40, 2**40])}, {}),
        ({f"{_PREFIX}.weight_shape": torch.tensor([-1, 5])}, {}),
        ({f"{_PREFIX}.weight_packed": torch.zeros(128, 33, dtype=torch.int32)}, {}),
        ({f"{_PREFIX}.weight_scale": None}, {}),
        ({f"{_PREFIX}.weight_scale": torch.full((128, 2), torch.nan, dtype=torch.bfloat16)}, {}),
        ({f"{_PREFIX}.input_scale": torch.ones(1)}, {}),
        ({}, {"bits": 8}),
        ({}, {"group_size": 64}),
        ({}, {"symmetric": False}),
        ({}, {"type": "float", "num_bits": 8}),
        ({}, {"ignore": ["re:.*down_proj$"]}),
    ],
    ids=str,
)  # fmt: skip
def test_files_that_contradict_their_config_are_refused(
    tensors: dict[str, Tensor | None], values: dict[str, Any], tmp_path: Path
) -> None:
    """One error that names the tensor, at once, whatever sizes the file claims."""
    source = _DATA / "tiny-llama-w4a16"
    changes: dict[str, Any] = {}
    if "ignore" in values:
        changes["ignore"] = values["ignore"]
    elif values:
        groups = _config(source)["config_groups"]
        names = {"bits": "num_bits"}
        groups["group_0"]["weights"] |= {names.get(name, name): value for name, value in values.items()}
        if "type" in values:
            groups["group_0"] = {**groups["group_0"], "format": "float-quantized"}
            groups["group_0"]["weights"] |= {"strategy": "tensor", "group_size": None}
        changes["config_groups"] = groups
    folder = _edited(source, tmp_path / "bad", tensors, **changes)
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match=r"down_proj|model\.layers\.0"):
        AutoModelForCausalLM.from_pretrained(folder)
    assert time.perf_counter() - start < 10
