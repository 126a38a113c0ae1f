"""The config's keys and values, and the layouts that follow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from qhub_awq.config import check, spec
from qhub_awq.plan import STATISTICS, plan
from transformers import AwqConfig

from qhub.errors import ConfigError
from qhub.integrations.config_classes import calibration_of
from qhub.layouts import Affine, Grid
from qhub.plan import LayerPlan, Skip, WeightInfo

# As published files have them.
AUTOAWQ = {
    "quant_method": "awq", "zero_point": True, "group_size": 128, "bits": 4, "version": "gemm",
    "modules_to_not_convert": None,
}  # fmt: skip
TRANSFORMERS_4 = {
    "backend": "autoawq", "bits": 4, "do_fuse": False, "exllama_config": None, "fuse_max_seq_len": None,
    "group_size": 64, "modules_to_fuse": None, "modules_to_not_convert": ["visual"], "quant_method": "awq",
    "version": "gemv", "zero_point": True,
}  # fmt: skip
LLM_AWQ = {
    "backend": "llm-awq",
    "bits": 4,
    "group_size": 128,
    "quant_method": "awq",
    "version": "gemm",
    "zero_point": True,
}
QUANT_CONFIG_JSON = {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"}
AUTO_ROUND = {
    "autoround_version": "0.13.0", "bits": 4, "data_type": "int", "group_size": 128, "iters": 200, "provider":
    "auto-round", "quant_method": "awq", "sym": False, "version": "gemm", "zero_point": True,
}  # fmt: skip
PUBLISHED = {"autoawq": AUTOAWQ, "transformers 4": TRANSFORMERS_4, "AutoRound": AUTO_ROUND}


def _weight(name: str = "model.layers.0.self_attn.q_proj", n: int = 64, k: int = 256, **more: Any) -> WeightInfo:
    return WeightInfo(f"{name}.weight", n, k, torch.float16, **more)


def _planned(values: dict[str, Any], weight: WeightInfo) -> Any:
    return plan(spec().parse({"quant_method": "awq", **values}), [weight, _weight("fits", 64, 3840)])[weight.name]


@pytest.mark.parametrize("values", PUBLISHED.values(), ids=PUBLISHED)
def test_published_configs_keep_what_they_say(values: dict[str, Any]) -> None:
    config = spec().parse(dict(values))
    assert isinstance(config, AwqConfig)
    written = json.loads(json.dumps(config.to_dict()))
    # transformers writes its legacy backend as the automatic one.
    assert {name: written[name] for name in values if name != "backend"} == {
        name: value for name, value in values.items() if name != "backend"
    }
    assert written["format"] == written["version"] == values["version"]
    assert spec().parse(written).to_dict() == config.to_dict()


def test_configs_of_gptqmodel_are_understood(checkpoint: Path) -> None:
    values = json.loads((checkpoint / "config.json").read_text())["quantization_config"]
    config = spec().parse(values)
    written = config.to_dict()
    kept = {name: value for name, value in values.items() if name != "checkpoint_format"}
    assert {name: written[name] for name in kept} == kept
    assert config.format == "gemm"


def test_other_names_are_understood() -> None:
    assert spec().parse(dict(LLM_AWQ)).format == "llm-awq"
    old = spec().parse(dict(QUANT_CONFIG_JSON))
    assert (old.bits, old.group_size, old.format, old.zero_point) == (4, 64, "gemm", True)
    for kernel in ("exllama", "ipex"):
        assert spec().parse({"bits": 4, "version": kernel}).format == "gemm"
    assert spec().parse({"bits": 4, "format": "llm_awq"}).format == "llm-awq"
    assert spec().parse({"bits": 4, "checkpoint_format": "GEMV_FAST", "group_size": 64}).format == "gemv_fast"


def test_what_users_make_with_transformers_is_taken() -> None:
    config = AwqConfig(bits=4, group_size=64, zero_point=False, version="GEMV", modules_to_not_convert=["lm_head"])
    check(config)
    again = spec().parse(json.loads(json.dumps(config.to_dict())))
    assert (again.format, again.group_size, again.zero_point) == ("gemv", 64, False)
    assert again.modules_to_not_convert == ["lm_head"]
    config.bits = 3
    with pytest.raises(ConfigError, match="bits=3"):
        check(config)


def test_a_config_keeps_its_arguments_and_writes_no_data() -> None:
    dynamic = {"-:.*down_proj": {}}
    config = AwqConfig(bits=4, zero_point=False, dataset=["a text"], tokenizer=object(), dynamic=dynamic, lm_head=False)
    assert config.dynamic == dynamic
    written = json.loads(json.dumps(config.to_dict()))
    assert (written["dataset"], written["tokenizer"], written["dynamic"]) == (None, None, dynamic)
    assert written["sym"] is True
    assert config.dataset == ["a text"]
    assert AwqConfig(dataset="file.txt").to_dict()["dataset"] == "file.txt"
    with pytest.warns(UserWarning, match="ignores spelling"):
        AwqConfig(spelling=1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bits": 3}, "bits=3"),
        ({"bits": 8}, "bits=8"),
        ({"bits": "4"}, "bits"),
        ({"bits": 4, "w_bit": 3}, "w_bit"),
        ({"group_size": 0}, "group_size"),
        ({"group_size": -2}, "group_size"),
        ({"group_size": 32.0}, "group_size"),
        ({"group_size": None}, "group_size"),
        ({"group_size": 64, "q_group_size": 128}, "q_group_size"),
        ({"zero_point": 1}, "zero_point=1"),
        ({"version": "marlin"}, "marlin"),
        ({"format": 1}, "format"),
        ({"format": "gemm", "version": "gemv"}, "mean the same"),
        ({"version": "gemv", "group_size": 16}, "group_size=16"),
        ({"format": "gemv_fast", "group_size": 96}, "group_size=96"),
        ({"backend": "mystery"}, "backend"),
        ({"desc_act": True}, "desc_act=True"),
        ({"pack_dtype": "int64"}, "pack_dtype='int64'"),
        ({"rotation": "hadamard"}, "rotation='hadamard'"),
        ({"adapter": {"name": "lora"}}, "adapter="),
        ({"act_bits": 8}, "act_bits=8"),
        ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert"),
        ({"dynamic": [1]}, "dynamic"),
        ({"dynamic": {"+:.*q_proj": {"bits": 8}}}, "exclusions"),
        ({"dynamic": {"-:(": {}}}, "no regular expression"),
        ({"spelling": True}, "spelling"),
    ],
)
def test_what_cannot_be_read_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        spec().parse({"quant_method": "awq", **values})


def test_layouts_follow_the_config() -> None:
    base = {"out_features": 64, "in_features": 256, "bits": 4}
    found = _planned({}, _weight())
    assert found == LayerPlan(
        Affine(**base, grid=Grid.along_k(128), zero="value"), statistics=STATISTICS, rows_independent=True
    )
    assert _planned({"zero_point": False, "group_size": 32}, _weight()).layout == Affine(
        **base, grid=Grid.along_k(32), zero="constant", zero_point=8.0
    )
    assert _planned({"group_size": -1}, _weight()).layout.grid == Grid.along_k(256)
    for name in ("gemv_fast", "llm-awq"):
        assert _planned({"version": name}, _weight()).layout == Affine(**base, grid=Grid.along_k(128), zero="offset")


@pytest.mark.parametrize(
    ("values", "weight", "reason"),
    [
        ({}, _weight(k=192), "192 input features are no multiple of group_size=128"),
        ({}, _weight(n=60), "60 output features are no multiple of 8"),
        ({"group_size": -1, "version": "gemv"}, _weight(k=132), "multiple of 8"),
        ({"group_size": 32, "version": "llm-awq"}, _weight(k=96), "multiple of 64"),
        ({}, _weight(n=24, kind="experts", experts=2), "24 output features are no multiple of 16"),
        ({}, _weight("embed", kind="embedding"), "linear"),
        ({"dynamic": {"-:.*q_proj": {}}}, _weight(), "left out by"),
    ],
)
def test_layers_that_do_not_fit_stay_as_they_are(values: dict[str, Any], weight: WeightInfo, reason: str) -> None:
    found = _planned(values, weight)
    assert isinstance(found, Skip)
    assert reason in found.reason


def test_groups_that_fit_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="group_size=56.*fits none"):
        plan(spec().parse({"bits": 4, "group_size": 56}), [_weight()])


def test_the_config_speaks_to_the_engine() -> None:
    options = calibration_of(
        AwqConfig(bits=4, dataset=["some text"], tokenizer="folder", model_seqlen=256, batch_size=4)
    )
    assert (options.data, options.tokenizer, options.length, options.batch_size) == (["some text"], "folder", 256, 4)
    assert options.sequential == "groups"
    options = calibration_of(AwqConfig(bits=4, true_sequential=False))
    assert (options.data, options.length, options.sequential) == (None, None, "block")
    # The engine chooses, by the length: one sample at a time would be slow.
    assert options.batch_size is None and options.batch(16) > 1
