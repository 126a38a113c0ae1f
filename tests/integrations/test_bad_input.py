"""Every damaged or contradictory checkpoint ends in one clear error before a model is returned.

The cases of the transformers ecosystem that load silently with wrong numbers are here: a relabelled checkpoint, a
missing norm, NaN scales, weights that are too short, a method that nobody serves.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qhub import QuantizedTensor
from qhub.errors import CheckpointError, ConfigError, PluginError, QhubError, UnknownMethodError

UP = "model.layers.1.mlp.up_proj"


@pytest.fixture
def saved(tiny, pow2, tmp_path) -> Path:
    folder = tmp_path / "checkpoint"
    AutoModelForCausalLM.from_pretrained(tiny("llama"), quantization_config={"quant_method": pow2}).save_pretrained(
        folder
    )
    return folder


def edit(folder: Path, change) -> None:
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def edit_config(folder: Path, **values) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"].update(values)
    file.write_text(json.dumps(config))


def refused(folder: Path, *words: str, kind: type[QhubError] = CheckpointError) -> None:
    with pytest.raises(kind) as caught:
        AutoModelForCausalLM.from_pretrained(folder)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_intact_checkpoint_loads(saved):
    AutoModelForCausalLM.from_pretrained(saved)


def test_truncated_file(saved):
    file = saved / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    refused(saved, "model.safetensors", str(len(data) // 2), "truncated")


def test_truncated_file_of_a_dense_model(tiny, pow2, tmp_path):
    folder = tmp_path / "dense"
    shutil.copytree(tiny("llama"), folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config={"quant_method": pow2})


def test_empty_file(saved):
    (saved / "model.safetensors").write_bytes(b"")
    refused(saved, "model.safetensors")


def test_missing_entry_of_a_quantized_weight(saved):
    edit(saved, lambda tensors: tensors.pop(f"{UP}.pow2_scales"))
    refused(saved, f"{UP}.pow2_scales is missing")


def test_missing_quantized_weight(saved):
    def change(tensors):
        del tensors[f"{UP}.pow2_codes"], tensors[f"{UP}.pow2_scales"]

    edit(saved, change)
    refused(saved, f"{UP}.weight is missing")


def test_missing_norm(saved):
    edit(saved, lambda tensors: tensors.pop("model.layers.0.input_layernorm.weight"))
    refused(saved, "model.layers.0.input_layernorm.weight is missing")


def test_surplus_tensor(saved):
    edit(saved, lambda tensors: tensors.update({"model.layers.0.mlp.extra.weight": torch.zeros(3)}))
    refused(saved, "model.layers.0.mlp.extra.weight", "no place in the model")


def test_surplus_quantized_weight(saved):
    def change(tensors):
        for part in ("pow2_codes", "pow2_scales"):
            tensors[f"model.layers.7.mlp.up_proj.{part}"] = tensors[f"{UP}.{part}"].clone()

    edit(saved, change)
    refused(saved, "model.layers.7.mlp.up_proj")


def test_too_short_weight(saved):
    edit(saved, lambda tensors: tensors.update({f"{UP}.pow2_codes": tensors[f"{UP}.pow2_codes"][:-1].clone()}))
    refused(saved, f"{UP}.pow2_codes has shape (95, 32), expected (96, 32)")


def test_wrong_shape_of_a_dense_weight(saved):
    edit(saved, lambda tensors: tensors.update({"model.norm.weight": torch.ones(63)}))
    refused(saved, "model.norm.weight", "(63,)", "(64,)")


def test_wrong_dtype(saved):
    edit(saved, lambda tensors: tensors.update({f"{UP}.pow2_codes": tensors[f"{UP}.pow2_codes"].to(torch.int32)}))
    refused(saved, f"{UP}.pow2_codes has dtype int32, expected uint8")


def test_integer_where_a_dense_weight_belongs(saved):
    """What is left of a quantized weight whose scales were lost: transformers would cast the codes to floats."""
    edit(saved, lambda tensors: tensors.update({"model.embed_tokens.weight": torch.zeros(128, 64, dtype=torch.int8)}))
    refused(saved, "model.embed_tokens.weight", "int8")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scales_that_are_not_finite(saved, value):
    def change(tensors):
        tensors[f"{UP}.pow2_scales"][3, 1] = value

    edit(saved, change)
    refused(saved, UP, "scales", "NaN or infinity")


def test_nan_in_a_dense_model_to_quantize(tiny, pow2, tmp_path):
    folder = tmp_path / "dense"
    shutil.copytree(tiny("llama"), folder)
    edit(folder, lambda tensors: tensors[f"{UP}.weight"].fill_(float("nan")))
    with pytest.raises(CheckpointError, match=f"{UP}.weight holds NaN"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config={"quant_method": pow2})


def test_nan_in_an_expert_to_quantize(tiny, pow2, tmp_path):
    folder = tmp_path / "moe"
    shutil.copytree(tiny("mixtral"), folder)
    edit(folder, lambda tensors: tensors["model.layers.1.block_sparse_moe.experts.2.w1.weight"].fill_(float("nan")))
    with pytest.raises(CheckpointError, match="experts.gate_up_proj holds NaN"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config={"quant_method": pow2})


def test_missing_expert(tiny, pow2, tmp_path):
    AutoModelForCausalLM.from_pretrained(tiny("mixtral"), quantization_config={"quant_method": pow2}).save_pretrained(
        tmp_path
    )

    def change(tensors):
        for part in ("pow2_codes", "pow2_scales"):
            del tensors[f"model.layers.0.block_sparse_moe.experts.2.w1.{part}"]

    edit(tmp_path, change)
    refused(tmp_path, "model.layers.0.mlp.experts.gate_up_proj is made of 8 matrices, found 7")


def test_config_that_contradicts_the_tensors(saved):
    edit_config(saved, group_size=16)
    refused(saved, "pow2_scales has shape (64, 2), expected (64, 4)")


def test_unknown_key_in_the_config(saved):
    edit_config(saved, grup_size=16)
    refused(saved, "grup_size", "group_size", kind=ConfigError)


def test_impossible_value_in_the_config(saved):
    edit_config(saved, group_size=-3)
    refused(saved, "group_size", kind=ConfigError)


def test_group_size_that_does_not_divide(tiny, pow2):
    with pytest.raises(ConfigError, match=r"group_size 48 does not divide 64 .*q_proj"):
        AutoModelForCausalLM.from_pretrained(
            tiny("llama"), quantization_config={"quant_method": pow2, "group_size": 48}
        )


def test_method_that_nobody_serves(saved):
    edit_config(saved, quant_method="nosuch_method")
    refused(saved, "'nosuch_method'", "pip install qhub-nosuch-method", kind=UnknownMethodError)


def test_method_that_nobody_serves_on_the_fly(tiny, pow2):
    with pytest.raises((QhubError, ValueError), match="nosuch"):
        AutoModelForCausalLM.from_pretrained(tiny("llama"), quantization_config={"quant_method": "nosuch"})


def test_dense_checkpoint_labelled_as_quantized(tiny, pow2, tmp_path):
    folder = tmp_path / "dense"
    shutil.copytree(tiny("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": pow2}
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, "no tensor in it is stored that way", "pow2_codes")


def test_disabled_plugin(saved, pow2, monkeypatch):
    monkeypatch.setenv("QHUB_DISABLE", pow2)
    refused(saved, "QHUB_DISABLE", kind=PluginError)


def test_pickle_is_refused_unless_asked_for(saved, monkeypatch):
    tensors = load_file(saved / "model.safetensors")
    (saved / "model.safetensors").unlink()
    torch.save(tensors, saved / "pytorch_model.bin")
    refused(saved, "pytorch_model.bin", "QHUB_ALLOW_PICKLE")
    monkeypatch.setenv("QHUB_ALLOW_PICKLE", "1")
    model = AutoModelForCausalLM.from_pretrained(saved)
    assert isinstance(model.get_parameter(f"{UP}.weight"), QuantizedTensor)
    del tensors[f"{UP}.pow2_scales"]
    torch.save(tensors, saved / "pytorch_model.bin")
    refused(saved, f"{UP}.pow2_scales is missing")


def test_tensor_that_stands_in_two_shards(saved):
    AutoModelForCausalLM.from_pretrained(saved).save_pretrained(saved, max_shard_size="30KB")
    shards = sorted(saved.glob("model-*.safetensors"))
    assert len(shards) > 1
    first, second = load_file(shards[0]), load_file(shards[1])
    name = next(iter(first))
    save_file({**second, name: first[name]}, shards[1], metadata={"format": "pt"})
    refused(saved, name, shards[0].name, shards[1].name)
