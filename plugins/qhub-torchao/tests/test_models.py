"""Whole models through transformers: load what torchao wrote, write it back, quantize, train and merge."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TorchAoConfig

from qhub import QuantizedTensor
from qhub.errors import CheckpointError
from qhub.layouts import Affine
from qhub.testing.conformance.models import write_model

DATA = Path(__file__).parent / "data"
TINY = {"tiny-llama-intx4-g32": 0.05, "tiny-llama-int8-dynamic": 0.15}
PER_ROW = {"quant_type": "float8_dynamic_activation_float8_weight", "granularity": "PerRow"}
TYPES: dict[str, dict[str, Any]] = {
    "int4": {"quant_type": "int4_weight_only", "group_size": 32},
    "int8": {"quant_type": "int8_weight_only"},
    "int8-int8": {"quant_type": "int8_dynamic_activation_int8_weight"},
    "int8-int4": {"quant_type": "int8_dynamic_activation_int4_weight"},
    "float8": {"quant_type": "float8_weight_only"},
    "float8-float8": PER_ROW,
    "float8-int4": {"quant_type": "float8_dynamic_activation_int4_weight"},
}


def _dense(folder: Path, tied: bool = False) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        tie_word_embeddings=tied,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a small random Llama in bfloat16."""
    return _dense(tmp_path_factory.mktemp("dense"))


def _load(folder: Path, **more: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **more).eval()


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(24).reshape(2, 12)).logits


def _quantized(model: Any) -> dict[str, QuantizedTensor]:
    return {name: p for name, p in model.named_parameters() if isinstance(p, QuantizedTensor)}


def _headers(folder: Path) -> list[dict[str, str]]:
    found = []
    for file in sorted(folder.glob("*.safetensors")):
        if file.name.startswith("model"):
            with safe_open(file, framework="pt") as opened:
                found.append(opened.metadata())
    return found


@pytest.mark.parametrize("name", TINY)
def test_a_checkpoint_of_torchao_runs_and_is_written_back(name: str, tmp_path: Path) -> None:
    """The same logits, and the same tensors, header and config on the way back."""
    folder = DATA / name
    reference = load_file(folder / "reference.safetensors")
    model = _load(folder)
    assert len(_quantized(model)) == 7
    for key, wanted in reference.items():
        if key.startswith("dequantized."):
            weight = model.get_parameter(key.removeprefix("dequantized."))
            assert torch.equal(weight.dequantize(torch.bfloat16), wanted)
    with torch.no_grad():
        found = model(reference["input_ids"]).logits.float()
    # bfloat16 throughout; with rounded inputs a code may be the next one. Logits are up to 3.
    assert float((found - reference["logits"]).abs().max()) <= TINY[name]
    model.save_pretrained(tmp_path)
    before, after = (load_file(one / "model.safetensors") for one in (folder, tmp_path))
    assert before.keys() == after.keys()
    assert [key for key in before if not torch.equal(before[key], after[key])] == []
    (said,), (written,) = _headers(folder), _headers(tmp_path)
    assert {k: json.loads(v) for k, v in said.items() if k not in ("format", "tensor_names")} == {
        k: json.loads(v) for k, v in written.items() if k not in ("format", "tensor_names")
    }
    assert sorted(json.loads(said["tensor_names"])) == sorted(json.loads(written["tensor_names"]))
    configs = [json.loads((one / "config.json").read_text())["quantization_config"] for one in (folder, tmp_path)]
    assert configs[0] == configs[1]


def test_every_file_of_a_sharded_save_has_the_whole_header(dense: Path, tmp_path: Path) -> None:
    """torchao joins the headers of all files, and needs a tensor's before it reads its parts."""
    model = _load(dense, quantization_config=TorchAoConfig(**TYPES["int8"]))
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    headers = _headers(tmp_path)
    assert len(headers) > 2
    assert all(header == headers[0] for header in headers)
    assert set(json.loads(headers[0]["tensor_names"])) == {name for name, _ in model.named_parameters()}
    assert torch.equal(_logits(_load(tmp_path)), _logits(model))


def _damaged(name: str, target: Path, change: Any) -> Path:
    folder = Path(shutil.copytree(DATA / name, target))
    file = folder / "model.safetensors"
    tensors = load_file(file)
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    save_file(tensors, file, metadata=change(metadata))
    return folder


def test_a_header_that_contradicts_the_config_is_refused(tmp_path: Path) -> None:
    """The weight is named, before anything is loaded."""
    key = "model.layers.0.mlp.up_proj.weight"

    def change(metadata: dict[str, str]) -> dict[str, str]:
        said = json.loads(metadata[key])
        said["_data"]["block_size"] = [1, 64]
        return {**metadata, key: json.dumps(said)}

    with pytest.raises(CheckpointError, match=r"mlp\.up_proj\.weight has block_size"):
        _load(_damaged("tiny-llama-intx4-g32", tmp_path / "model", change))


def test_a_file_without_its_header_is_read(tmp_path: Path) -> None:
    """The config says what the tensors are; torchao itself could not load such a file."""
    folder = _damaged("tiny-llama-intx4-g32", tmp_path / "model", lambda _: {"format": "pt"})
    assert len(_quantized(_load(folder))) == 7


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_adapters_train_merge_and_reload(name: str, dora: bool, dense: Path, tmp_path: Path) -> None:
    """LoRA and DoRA on every kind of weight; what was trained is in the merged, quantized weights."""
    peft = pytest.importorskip("peft")
    model = _load(dense, dtype=torch.float32, quantization_config=TorchAoConfig(**TYPES[name]))
    assert len(_quantized(model)) == 7
    torch.manual_seed(0)
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, use_dora=dora, target_modules="all-linear"))
    ids = torch.arange(24).reshape(2, 12)
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = tuned(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    merged = tuned.eval().merge_and_unload()
    assert len(_quantized(merged)) == 7
    with torch.no_grad():
        assert float(merged(input_ids=ids, labels=ids).loss) < losses[0]
    merged.save_pretrained(tmp_path)
    assert torch.equal(_logits(_load(tmp_path, dtype=torch.float32)), _logits(merged))


def test_fused_experts_lie_in_the_file_as_one(tmp_path: Path) -> None:
    """As torchao has them: under the parameter's name, experts leading, with a header of three dimensions."""
    write_model("mixtral", 128, tmp_path / "dense")
    names = {"re:.*experts": {"_type": "Float8WeightOnlyConfig", "_data": {}}}
    config = TorchAoConfig({"_type": "FqnToConfig", "_data": {"fqn_to_config": names}})
    model = _load(tmp_path / "dense", quantization_config=config)
    found = _quantized(model)
    assert {name.rpartition(".")[2] for name in found} == {"gate_up_proj", "down_proj"}
    model.save_pretrained(tmp_path / "saved")
    (header,) = _headers(tmp_path / "saved")
    tensors = load_file(tmp_path / "saved" / "model.safetensors")
    for name, weight in found.items():
        owner, _, leaf = name.rpartition(".")
        assert tensors[f"{owner}._{leaf}_qdata"].shape == weight.shape
        assert tensors[f"{owner}._{leaf}_scale"].shape == (*weight.shape[:2], 1)
        assert json.loads(header[name])["_data"]["block_size"] == [1, 1, weight.shape[2]]
    assert torch.equal(_logits(_load(tmp_path / "saved")), _logits(model))


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings(tied: bool, tmp_path: Path) -> None:
    """include_input_output_embeddings: both tables, or the one that serves as both."""
    folder = _dense(tmp_path / "dense", tied)
    config = TorchAoConfig("intx_weight_only", weight_dtype=torch.int4, include_input_output_embeddings=True)
    model = _load(folder, quantization_config=config)
    found = _quantized(model)
    assert "model.embed_tokens.weight" in found
    assert len(found) == (8 if tied else 9)
    layout = found["model.embed_tokens.weight"].quant_layout
    assert isinstance(layout, Affine)
    assert layout.bits == 4
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(_logits(_load(tmp_path / "saved")), _logits(model))


def test_an_untied_head_keeps_the_dense_table(tmp_path: Path) -> None:
    """untie_embedding_weights: the embeddings are quantized, the head that was tied to them is not."""
    folder = _dense(tmp_path / "dense", tied=True)
    config = TorchAoConfig("int8_weight_only", include_input_output_embeddings=True, untie_embedding_weights=True)
    model = _load(folder, quantization_config=config)
    table = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(model.lm_head.weight, table)
    assert "model.embed_tokens.weight" in _quantized(model)
    assert "untie_embedding_weights" in model.hf_quantizer.skipped["lm_head.weight"]
    model.save_pretrained(tmp_path / "saved")
    again = _load(tmp_path / "saved")
    assert not again.config.tie_word_embeddings
    assert torch.equal(again.lm_head.weight, table)
    assert torch.equal(_logits(again), _logits(model))


def test_named_modules_stay_dense(dense: Path) -> None:
    config = TorchAoConfig("int8_weight_only", modules_to_not_convert=["o_proj"])
    model = _load(dense, quantization_config=config)
    assert "model.layers.0.self_attn.o_proj.weight" not in _quantized(model)
    assert "lm_head.weight" in _quantized(model)
