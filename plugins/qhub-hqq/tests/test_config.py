"""HqqConfig: what it may hold, as an object and in config.json, with and without the hqq package."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import transformers
from qhub_hqq.config import check, spec
from qhub_hqq.hqq_config import HqqConfig
from qhub_hqq.settings import Settings, settings_of

from qhub.errors import ConfigError


def test_a_config_json_of_transformers_is_understood(tiny_checkpoint: Path) -> None:
    values = json.loads((tiny_checkpoint / "config.json").read_text())["quantization_config"]
    config = spec().parse(values)
    assert isinstance(config, transformers.HqqConfig)
    assert type(config).__name__ == "HqqConfig"
    assert settings_of(config) == {None: Settings(3, 64, 0, round_zero=False)}
    assert json.loads(json.dumps(config.to_dict())) == values


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {
            "nbits": 3,
            "group_size": None,
            "axis": 0,
            "view_as_float": True,
            "skip_modules": ["lm_head", "mlp.down_proj"],
        },
        {
            "dynamic_config": {
                "self_attn.q_proj": {"nbits": 8, "group_size": 128},
                "mlp.up_proj": {"nbits": 2, "axis": 0},
            }
        },
    ],
)
def test_values_survive_config_json(arguments: dict[str, Any]) -> None:
    config = HqqConfig(**arguments)
    check(config)
    values = json.loads(json.dumps(config.to_dict()))
    back = spec().parse(values)
    assert back.to_dict() == config.to_dict()
    assert settings_of(back) == settings_of(config)


def test_arguments_of_the_class_are_accepted_as_a_dictionary() -> None:
    config = spec().parse({"quant_method": "hqq", "nbits": 2, "group_size": 16})
    assert settings_of(config) == {None: Settings(2, 16, 1, round_zero=False)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"nbits": 5}, "nbits=5"),
        ({"nbits": 1.58}, "nbits=1.58"),
        ({"nbits": True}, "nbits=True"),
        ({"nbits": "4"}, "nbits='4'"),
        ({"axis": 2}, "axis=2"),
        ({"group_size": 0}, "group_size=0"),
        ({"group_size": -64}, "group_size=-64"),
        ({"group_size": 12}, "multiple of 8"),
        ({"group_size": "64"}, "group_size='64'"),
        ({"view_as_float": 1}, "view_as_float=1"),
        ({"dynamic_config": {"mlp": {"bits": 4}}}, "bits"),
        ({"dynamic_config": {"mlp": 4}}, "dynamic_config"),
        ({"dynamic_config": {"mlp": {"nbits": 6}}}, "nbits=6"),
    ],
)
def test_impossible_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        HqqConfig(**arguments)


def _file(**changes: Any) -> dict[str, Any]:
    values = HqqConfig().to_dict()
    params = {**values["quant_config"]["weight_quant_params"], **changes}
    return {**values, "quant_config": {**values["quant_config"], "weight_quant_params": params}}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (_file(nbits=7), "nbits=7"),
        (_file(bits=4), "bits"),
        (_file(optimize="yes"), "optimize='yes'"),
        (_file(nbits=3, channel_wise=False), "channel_wise=False"),
        ({**_file(), "nbits": 4}, "quant_config"),
        ({**_file(), "groupsize": 4}, "groupsize"),
        ({**_file(), "quant_config": None}, "weight_quant_params"),
        ({**_file(), "quant_config": {}}, "weight_quant_params"),
        ({**_file(), "quant_config": {"weight_quant_params": 4}}, "weight_quant_params"),
        ({**_file(), "quant_config": {**_file()["quant_config"], "extra": 1}}, "extra"),
        ({**_file(), "skip_modules": "lm_head"}, "skip_modules"),
        ({**_file(), "skip_modules": [1]}, "skip_modules"),
    ],
)
def test_impossible_files_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        spec().parse(values)


def test_layers_that_a_file_could_not_tell_apart_are_refused() -> None:
    config = HqqConfig(dynamic_config={"a": {"nbits": 4}, "b": {"nbits": 4, "view_as_float": True}})
    with pytest.raises(ConfigError, match="view_as_float"):
        check(config)


def test_what_hqq_has_given_up_is_named() -> None:
    with pytest.warns(UserWarning, match="quant_zero"):
        config = HqqConfig(dynamic_config={"a": {"nbits": 4, "quant_zero": True}})
    config.quant_config["a"]["zero_quant_params"] = {"nbits": 8}
    with pytest.warns(UserWarning, match="zero_quant_params"):
        check(config)
    with pytest.warns(UserWarning, match="bits"):
        HqqConfig(bits=4)


def test_options_of_the_command_line_are_translated() -> None:
    options = spec().from_options
    assert options is not None
    assert options({"bits": 3, "group_size": -1, "axis": 0}) == {"nbits": 3, "group_size": None, "axis": 0}
    for preset in spec().presets.values():
        check(HqqConfig(**preset))


@pytest.mark.skipif(find_spec("hqq") is not None, reason="hqq is installed: transformers' own class works by itself")
@pytest.mark.parametrize(
    "first", ["from transformers import HqqConfig", "import torch, transformers; HqqConfig = transformers.HqqConfig"]
)
def test_transformers_own_class_can_be_made_in_a_fresh_process(first: str) -> None:
    code = f"{first}\nconfig = HqqConfig(nbits=3)\nprint(type(config).__module__, config.to_dict()['quant_config'])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.startswith("transformers.utils.quantization_config {'weight_quant_params': {'nbits': 3,")
