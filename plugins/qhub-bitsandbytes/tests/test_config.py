"""Config and plan: what is offered, what is refused, and which layout each weight gets."""

from __future__ import annotations

import pytest
import torch
from qhub_bitsandbytes import qhub_adapter, qhub_config, qhub_doctor, qhub_plan
from transformers import BitsAndBytesConfig

from qhub.errors import ConfigError
from qhub.layouts import Activation, Affine, Grid, Lookup
from qhub.plan import LayerPlan, Skip, WeightInfo

SPEC = qhub_config()


@pytest.mark.parametrize(
    "config",
    [
        BitsAndBytesConfig(load_in_8bit=True),
        BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0),
        BitsAndBytesConfig(load_in_4bit=True),
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="bfloat16"),
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage="float64", bnb_4bit_use_double_quant=True),
    ],
    ids=["int8", "no outliers", "fp4", "nf4", "storage"],
)
def test_configs_pass_and_survive_config_json(config):
    SPEC.verify(config)
    again = SPEC.parse({"quant_method": "bitsandbytes", **config.to_dict()})
    assert type(again) is BitsAndBytesConfig and again.to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "load_in_8bit=False and load_in_4bit=False"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "int4"}, "bnb_4bit_quant_type='int4'"),
        ({"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.int8}, "bnb_4bit_compute_dtype=torch.int8"),
        ({"load_in_4bit": True, "bnb_4bit_quant_storage": torch.int64}, "bnb_4bit_quant_storage=torch.int64"),
        ({"load_in_8bit": True, "llm_int8_threshold": -1.0}, "llm_int8_threshold=-1.0"),
        ({"load_in_8bit": True, "llm_int8_threshold": float("nan")}, "llm_int8_threshold=nan"),
        ({"load_in_8bit": True, "llm_int8_has_fp16_weight": True}, "llm_int8_has_fp16_weight=True"),
    ],
)
def test_impossible_configs_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        SPEC.verify(BitsAndBytesConfig(**values))


@pytest.mark.parametrize(
    "values",
    [
        {"load_in_8bit": True, "load_in_4bit": True},
        {"load_in_4bit": True, "bnb_4bit_compute_dtype": "load"},
        {"load_in_4bit": True, "bnb_4bit_compute_dtype": "no_such_thing"},
        {"load_in_4bit": True, "bnb_4bit_quant_storage": "complex64"},
        {"load_in_4bit": "yes"},
        {"load_in_4bit": True, "surprise": 1},
        {"load_in_8bit": True, "llm_int8_threshold": "6"},
    ],
    ids=str,
)
def test_hostile_config_json_ends_in_a_config_error(values):
    with pytest.raises(ConfigError):
        SPEC.parse({"quant_method": "bitsandbytes", **values})


def test_presets_and_options_make_configs_that_pass():
    for values in SPEC.presets.values():
        SPEC.verify(SPEC.resolve()(**values))
    assert SPEC.from_options({"bits": 8}) == {"load_in_8bit": True}
    four = SPEC.from_options({"bits": 4, "group_size": 64, "bnb_4bit_use_double_quant": True})
    assert four == {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    assert SPEC.from_options({"load_in_4bit": True}) == {"load_in_4bit": True}
    for refused in ({"bits": 3}, {"bits": 4, "group_size": 128}, {"bits": 8, "group_size": 64}):
        with pytest.raises(ConfigError):
            SPEC.from_options(refused)


def infos():
    """Return one weight of each kind."""
    return [
        WeightInfo("layer.weight", 128, 256, torch.bfloat16),
        WeightInfo("ragged.weight", 5, 37, torch.float32),
        WeightInfo("gpt2.c_attn.weight", 192, 64, torch.float16, "conv1d"),
        WeightInfo("moe.experts.gate_up_proj", 256, 128, torch.bfloat16, "experts", experts=4),
        WeightInfo("embed.weight", 512, 128, torch.bfloat16, "embedding"),
    ]


@pytest.mark.parametrize("nested", [False, True])
def test_the_4_bit_plan(nested):
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=nested, bnb_4bit_compute_dtype="float16")
    plan = qhub_plan(config, infos())
    assert isinstance(plan["embed.weight"], Skip) and "embedding" in plan["embed.weight"].reason
    for info in infos()[:-1]:
        planned = plan[info.name]
        assert isinstance(planned, LayerPlan) and isinstance(planned.layout, Lookup)
        assert (planned.layout.out_features, planned.layout.in_features) == (info.out_features, info.in_features)
        assert planned.compute_dtype == torch.float16 and planned.layout.bits == 4 and not planned.statistics
        assert (planned.layout.scales_nested is not None) == nested
    assert plan["layer.weight"].layout.grid == Grid("block", 1, 64)
    assert plan["ragged.weight"].layout.grid == Grid("flat", 1, 64)


def test_the_int8_plan():
    plan = qhub_plan(BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=3.5), infos())
    assert isinstance(plan["embed.weight"], Skip)
    layout = plan["layer.weight"].layout
    assert isinstance(layout, Affine) and layout.signed and layout.bits == 8
    assert layout.grid == Grid("block", 1, 256) and layout.activation == Activation("int8", 3.5)
    assert plan["layer.weight"].compute_dtype is None
    assert isinstance(plan["moe.experts.gate_up_proj"], LayerPlan)


def test_storage_that_does_not_divide_the_bytes_is_refused_at_plan_time():
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage="float32")
    fits = WeightInfo("fits.weight", 4, 6, torch.float32)
    assert isinstance(qhub_plan(config, [fits])["fits.weight"], LayerPlan)
    with pytest.raises(ConfigError, match=r"odd\.weight of 3x6 packs into 9 bytes, not a multiple of 4"):
        qhub_plan(config, [fits, WeightInfo("odd.weight", 3, 6, torch.float32)])


def test_the_adapter_policy_takes_the_nearer_grid():
    config = BitsAndBytesConfig(load_in_4bit=True)
    planned = qhub_plan(config, infos())["layer.weight"]
    policy = qhub_adapter(config, planned.layout)
    assert policy.grid == "best" and policy.refuse is None


def test_the_doctor_speaks_of_the_optional_package(monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (finding,) = qhub_doctor()
    assert finding.status == "ok" and "not needed" in finding.message and "bridge" in (finding.remedy or "")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    (finding,) = qhub_doctor()
    assert finding.status == "ok" and "is installed" in finding.message
