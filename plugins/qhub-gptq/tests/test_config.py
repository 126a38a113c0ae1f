"""The config's keys and values, overrides by module, and the layouts that follow."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from qhub_gptq.config import check, spec
from qhub_gptq.plan import ACT_ORDER, plan
from transformers import GPTQConfig

from qhub.errors import ConfigError
from qhub.layouts import Affine, Grid
from qhub.plan import Skip, WeightInfo

Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.11.mlp.up_proj"

# As published files have them: AutoGPTQ, optimum, gptqmodel, AutoRound.
AUTO_GPTQ = {
    "bits": 4, "checkpoint_format": "gptq", "damp_percent": 0.01, "desc_act": True, "group_size": 128,
    "is_marlin_format": False, "model_file_base_name": "model", "model_name_or_path": None, "quant_method": "gptq",
    "static_groups": False, "sym": True, "true_sequential": True,
}  # fmt: skip
OPTIMUM = {
    "backend": "auto", "batch_size": 1, "bits": 4, "block_name_to_quantize": "model.layers",
    "cache_block_outputs": True, "damp_percent": 0.1, "dataset": "ptb", "desc_act": False,
    "exllama_config": {"version": 2}, "group_size": -1, "max_input_length": None, "model_seqlen": 2048,
    "module_name_preceding_first_block": ["model.embed_tokens"],
    "modules_in_block_to_quantize": [["self_attn.q_proj"]], "pad_token_id": None, "quant_method": "gptq",
    "sym": False, "tokenizer": None, "true_sequential": True, "use_cuda_fp16": False, "use_exllama": True,
}  # fmt: skip
GPTQMODEL = {
    "bits": 4, "checkpoint_format": "gptq_v2", "desc_act": False, "dynamic": {"-:.*mlp": {}, "+:.*q_proj": {"bits": 8}},
    "format": "gptq_v2", "group_size": 32, "lm_head": True,
    "meta": {"damp_percent": 0.05, "quantizer": ["gptqmodel:7.7.0"]},
    "method": "gptq", "pack_dtype": "int32", "quant_method": "gptq", "sym": True,
}  # fmt: skip
AUTO_ROUND = {
    "autoround_version": "0.13.0", "bits": 4, "damp_percent": 0.01, "data_type": "int", "dataset": "NeelNanda/pile-10k",
    "desc_act": False, "dynamic": {r"-:.*model\.layers\.0\.mlp\.up_proj.*": {}}, "enable_quanted_input": False,
    "group_size": 128, "iters": 0, "low_gpu_mem_usage": True, "lm_head": False, "provider": "auto-round",
    "quant_method": "gptq", "sym": True, "true_sequential": False,
}  # fmt: skip
PUBLISHED = {"AutoGPTQ": AUTO_GPTQ, "optimum": OPTIMUM, "gptqmodel": GPTQMODEL, "AutoRound": AUTO_ROUND}


def _weight(module: str = Q, n: int = 64, k: int = 128, **more: Any) -> WeightInfo:
    return WeightInfo(f"{module}.weight", n, k, torch.float16, **more)


def _planned(values: dict[str, Any], weight: WeightInfo) -> Any:
    return plan(spec().parse({"quant_method": "gptq", **values}), [weight])[weight.name]


@pytest.mark.parametrize("values", PUBLISHED.values(), ids=PUBLISHED)
def test_published_configs_keep_every_key(values: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = spec().parse(values)
    assert isinstance(config, GPTQConfig)
    assert type(config).__name__ == "GPTQConfig"
    written = json.loads(json.dumps(config.to_dict()))
    assert {name: written[name] for name in values} == values
    assert written["format"] == written["checkpoint_format"] == values.get("checkpoint_format", "gptq")
    assert spec().parse(written).to_dict() == config.to_dict()


def test_configs_of_gptqmodel_are_understood(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())["quantization_config"]
    written = spec().parse(values).to_dict()
    assert {name: written[name] for name in values} == values
    assert written["damp_percent"] == values["meta"]["damp_percent"] == 0.05


def test_the_class_of_transformers_is_checked_too() -> None:
    check(GPTQConfig(bits=4))
    config = GPTQConfig(bits=4)
    config.bits = 5
    with pytest.raises(ConfigError, match="bits=5"):
        check(config)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "bits"),
        ({"bits": 5}, "bits"),
        ({"bits": "4"}, "bits"),
        ({"bits": 4.0}, "bits"),
        ({"bits": 4, "group_size": 0}, "group_size"),
        ({"bits": 4, "group_size": -2}, "group_size"),
        ({"bits": 4, "group_size": 32.0}, "group_size"),
        ({"bits": 4, "group_size": None}, "group_size"),
        ({"bits": 4, "sym": 1}, "sym=1"),
        ({"bits": 4, "desc_act": "no"}, "desc_act='no'"),
        ({"bits": 4, "format": "marlin"}, "format='marlin'"),
        ({"bits": 4, "checkpoint_format": "gptq_p"}, "format='gptq_p'"),
        ({"bits": 4, "format": 1}, "format=1"),
        ({"bits": 4, "format": "gptq", "checkpoint_format": "gptq_v2"}, "checkpoint_format='gptq_v2'"),
        ({"bits": 4, "pack_dtype": "int16"}, "pack_dtype='int16'"),
        ({"bits": 4, "rotation": "hadamard"}, "rotation='hadamard'"),
        ({"bits": 4, "adapter": {"name": "lora"}}, "adapter="),
        ({"bits": 4, "is_marlin_format": True}, "is_marlin_format=True"),
        ({"bits": 4, "data_type": "mx_fp"}, "data_type='mx_fp'"),
        ({"bits": 4, "act_bits": 8}, "act_bits=8"),
        ({"bits": 4, "method": "qqq"}, "method='qqq'"),
        ({"bits": 4, "spelling": True}, "spelling"),
        ({"bits": 4, "dynamic": [1]}, "dynamic"),
        ({"bits": 4, "dynamic": {"+:(": {}}}, "no regular expression"),
        ({"bits": 4, "dynamic": {"+:a": 4}}, "found 4"),
        ({"bits": 4, "dynamic": {"+:a": {"bits": 5}}}, "bits=5"),
        ({"bits": 4, "dynamic": {"+:a": {"group_size": 0}}}, "group_size=0"),
        ({"bits": 4, "dynamic": {"a": {"sym": "yes"}}}, "sym='yes'"),
        ({"bits": 4, "dynamic": {"a": {"format": "marlin"}}}, "unknown keys"),
        ({"bits": 4, "dynamic": {"a": {"data_type": "fp"}}}, "reads integers"),
    ],
)
def test_what_cannot_be_read_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        spec().parse({"quant_method": "gptq", **values})


def test_neutral_values_are_taken() -> None:
    values = {"pack_dtype": "torch.int32", "rotation": None, "act_bits": 16, "method": "gptq", "format": "GPTQ"}
    assert spec().parse({"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq", **values}).format == "gptq"


def test_layouts_follow_the_config() -> None:
    base = {"out_features": 64, "in_features": 128}
    found = _planned({"bits": 4, "group_size": 32}, _weight())
    assert found.layout == Affine(**base, bits=4, grid=Grid.along_k(32), zero_point=8.0)
    assert (found.statistics, found.rows_independent) == (("hessian",), True)
    found = _planned({"bits": 3, "group_size": -1, "desc_act": True, "sym": False}, _weight())
    assert found.layout == Affine(**base, bits=3, grid=Grid.along_k(128), zero="value")
    # A group larger than the row is the row.
    assert _planned({"bits": 8, "group_size": 1024, "desc_act": True}, _weight()).layout.grid == Grid.along_k(128)
    assert _planned({"bits": 8, "group_size": 64, "desc_act": True}, _weight()).layout.transforms == ACT_ORDER


def test_dynamic_goes_by_the_first_match_after_the_exclusions() -> None:
    dynamic = {
        r"+:.*\.q_proj$": {"bits": 8, "group_size": 64, "mse": 2.4},
        r".*self_attn": {"sym": False, "desc_act": True, "bits": None},
        r"+:.*\.up_proj$": {"bits": 3},
        r"-:.*layers\.1[0-9]\.": {},
        "lm_head": {"bits": 16},
    }
    values = {"bits": 4, "group_size": 32, "dynamic": dynamic}
    layout = _planned(values, _weight()).layout
    assert (layout.bits, layout.grid.cols, layout.zero, layout.transforms) == (8, 64, "constant", ())
    layout = _planned(values, _weight("model.layers.0.self_attn.k_proj")).layout
    assert (layout.bits, layout.grid.cols, layout.zero, layout.transforms) == (4, 32, "value", ACT_ORDER)
    assert _planned(values, _weight("model.layers.0.mlp.up_proj")).layout.bits == 3
    assert _planned(values, _weight("model.layers.0.mlp.down_proj")).layout.bits == 4
    # Patterns match from the start of a name, not anywhere in it.
    assert _planned({"bits": 4, "dynamic": {"-:q_proj": {}}}, _weight()).layout.bits == 4
    found = _planned(values, _weight(UP))
    assert isinstance(found, Skip)
    assert "layers" in found.reason
    assert isinstance(_planned(values, _weight("lm_head")), Skip)


def test_embeddings_stay_dense() -> None:
    assert isinstance(_planned({"bits": 4}, _weight("model.embed_tokens", kind="embedding")), Skip)
