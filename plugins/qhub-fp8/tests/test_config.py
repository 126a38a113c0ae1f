"""transformers' own config class keeps what files say, and takes inputs that are left alone."""

from __future__ import annotations

import pytest
import torch
from qhub_fp8.config import from_options, spec
from qhub_fp8.settings import settings_of
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

from qhub.errors import ConfigError


@pytest.mark.parametrize("scheme", ["none", "NONE", None])
def test_inputs_may_be_left_alone(scheme):
    config = FineGrainedFP8Config(activation_scheme=scheme)
    assert settings_of(config).scheme == "none"
    again = spec().parse(config.to_dict())
    assert settings_of(again) == settings_of(config)


def test_what_files_say_is_kept():
    values = {
        "quant_method": "fp8", "fmt": "e5m2", "activation_scheme": "static", "weight_block_size": None,
        "ignored_layers": ["lm_head"], "kv_cache_scheme": None,
    }  # fmt: skip
    config = spec().parse(values)
    assert config.modules_to_not_convert == ["lm_head"]
    assert settings_of(config).format == "e5m2"
    assert config.to_dict()["fmt"] == "e5m2"


def test_data_does_not_go_into_a_file():
    config = FineGrainedFP8Config(activation_scheme="static", dataset=["text"], tokenizer=object())
    assert {"dataset", "tokenizer"}.isdisjoint(config.to_dict())
    assert config.dataset == ["text"]


def test_unknown_arguments_are_named():
    with pytest.warns(UserWarning, match="blocksize"):
        FineGrainedFP8Config(blocksize=64)
    with pytest.raises(ConfigError, match="blocksize"):
        spec().parse({"quant_method": "fp8", "blocksize": 64})


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"modules_to_convert": ["embed_tokens"]}, "embeddings"),
        ({"fmt": "e4m3fnuz"}, "fnuz"),
    ],
)
def test_what_there_is_not_is_refused_with_a_way_out(values, said):
    with pytest.raises(ConfigError, match=said):
        spec().verify(FineGrainedFP8Config(**values))


def test_options_of_the_command_line():
    assert from_options({"bits": 8, "group_size": 64}) == {"weight_block_size": [64, 64]}
    assert from_options({"group_size": -1}) == {"weight_block_size": None}
    with pytest.raises(ConfigError, match="bits=4"):
        from_options({"bits": 4})


def test_modules_to_not_convert(llama, tmp_path):
    llama().save_pretrained(tmp_path)
    config = FineGrainedFP8Config(
        modules_to_not_convert=["lm_head", "model.layers.0", "q_proj"], weight_block_size=(48, 48)
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    names = set(model.hf_quantizer.plan)
    assert names and all("layers.1" in name and "q_proj" not in name for name in names)
    assert model.lm_head.weight.dtype.itemsize > 1
    assert torch.equal(model.dequantize().lm_head.weight, model.lm_head.weight)


def test_dequantize_gives_a_dense_model(library):
    quantized = AutoModelForCausalLM.from_pretrained(library)
    dense = AutoModelForCausalLM.from_pretrained(library, quantization_config=FineGrainedFP8Config(dequantize=True))
    name = "model.layers.0.mlp.down_proj.weight"
    assert type(dense.get_parameter(name)) is torch.nn.Parameter
    assert torch.equal(dense.get_parameter(name), quantized.get_parameter(name).dequantize(dense.dtype))
