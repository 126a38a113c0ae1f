"""Config, plan and adoption: what is offered, what is skipped, and what other methods' numbers become."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from qhub_eetq import qhub_adopt, qhub_config, qhub_doctor, qhub_plan
from transformers import EetqConfig

from qhub.errors import ConfigError
from qhub.layouts import Affine, Grid
from qhub.plan import LayerPlan, Skip, WeightInfo
from qhub.registry import registry

SPEC = qhub_config()


def test_a_config_json_of_transformers_is_understood() -> None:
    values = {"quant_method": "eetq", "weights": "int8", "modules_to_not_convert": None}
    config = SPEC.parse(values)
    assert type(config) is EetqConfig and config.to_dict() == values


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"weights": "int4"}, "int4"),
        ({"weights": None}, "None"),
        ({"bits": 8}, "bits"),
        ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert"),
        ({"modules_to_not_convert": [1]}, "modules_to_not_convert"),
    ],
)
def test_impossible_values_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SPEC.parse({"quant_method": "eetq", **values})


def test_an_object_is_checked_too() -> None:
    config = EetqConfig()
    config.weights = "int2"
    with pytest.raises(ConfigError, match="int2"):
        SPEC.verify(config)


def test_options_of_the_command_line() -> None:
    assert SPEC.from_options is not None
    assert SPEC.from_options({"bits": 8, "modules_to_not_convert": ["x"]}) == {"modules_to_not_convert": ["x"]}
    assert SPEC.from_options({"group_size": -1}) == {}
    for refused in ({"bits": 4}, {"group_size": 128}):
        with pytest.raises(ConfigError):
            SPEC.from_options(refused)


def test_the_plan() -> None:
    weights = [
        WeightInfo("layer.weight", 128, 256, torch.bfloat16),
        WeightInfo("gpt2.c_attn.weight", 192, 64, torch.float16, "conv1d"),
        WeightInfo("moe.experts.gate_up_proj", 256, 128, torch.bfloat16, "experts", experts=4),
        WeightInfo("embed.weight", 512, 128, torch.bfloat16, "embedding"),
        WeightInfo("narrow.weight", 128, 96, torch.float16),
        WeightInfo("flat.weight", 4, 128, torch.float16),
    ]
    plan = qhub_plan(weights)
    for info in weights[:3]:
        planned = plan[info.name]
        assert isinstance(planned, LayerPlan)
        assert planned.layout == Affine(
            out_features=info.out_features,
            in_features=info.in_features,
            bits=8,
            signed=True,
            grid=Grid("block", 1, info.in_features),
        )
    reasons = {name: one.reason for name, one in plan.items() if isinstance(one, Skip)}
    assert set(reasons) == {"embed.weight", "narrow.weight", "flat.weight"}
    assert "96 inputs" in reasons["narrow.weight"] and "4 outputs" in reasons["flat.weight"]


def test_other_methods_layouts_become_int8_rows() -> None:
    layouts = {
        "a.weight": Affine(out_features=64, in_features=128, bits=8, signed=True, grid=Grid("block", 1, 128)),
        "b.weight": Affine(out_features=64, in_features=100, bits=8, signed=True, grid=Grid("block", 1, 100)),
    }
    adoption = qhub_adopt(layouts, ["lm_head.weight", "x.weight"], {})
    assert type(adoption.config) is EetqConfig and adoption.config.modules_to_not_convert == ["lm_head", "x"]
    assert qhub_adopt(layouts, [], {}).config.modules_to_not_convert is None
    assert qhub_adopt(layouts, ["x.weight"], {"modules_to_not_convert": ["y"]}).config.modules_to_not_convert == ["y"]
    assert adoption.layouts["a.weight"] == layouts["a.weight"]
    assert isinstance(adoption.layouts["b.weight"], Skip)
    with pytest.raises(ConfigError, match="modules_to_not_convert"):
        qhub_adopt(layouts, [], {"modules_to_not_convert": 3})


def test_the_plugin_is_found_and_the_doctor_speaks() -> None:
    assert registry.list()["eetq"].distribution == "qhub-eetq"
    (finding,) = qhub_doctor()
    assert finding.status == "ok" and "without EETQ's GPU kernels" in finding.message
