"""transformers' own GPTQConfig, as users make it without optimum: nothing they give is lost, and files stay plain."""

from __future__ import annotations

import json
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from qhub_gptq.config import quality_of, solver_options, spec
from qhub_gptq.hessian import Damping
from qhub_gptq.initialize import stand_in
from qhub_gptq.plan import plan
from qhub_gptq.quantize import Options
from transformers import GPTQConfig

from qhub.errors import ConfigError
from qhub.integrations.config_classes import calibration_of
from qhub.plan import LayerPlan, Skip, WeightInfo

WEIGHT = WeightInfo("model.layers.0.self_attn.q_proj.weight", 64, 128, torch.float16)


def _options(values: dict[str, Any]) -> Options:
    config = spec().parse({"quant_method": "gptq", "bits": 4, "group_size": 32, **values})
    planned = plan(config, [WEIGHT])[WEIGHT.name]
    assert isinstance(planned, LayerPlan)
    return solver_options(config, planned.layout)


def test_every_argument_is_kept_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = GPTQConfig(
            bits=4, desc_act=True, dynamic={"-:.*mlp": {}}, static_groups=True, damp_auto_increment=0.02,
            modules_in_block_to_quantize=[["self_attn.q_proj"]], quality="high", meta={"by": "me"},
        )  # fmt: skip
    assert type(config) is transformers.GPTQConfig
    assert (config.dynamic, config.static_groups, config.damp_auto_increment) == ({"-:.*mlp": {}}, True, 0.02)
    assert config.modules_in_block_to_quantize == [["self_attn.q_proj"]]
    assert not config.act_group_aware
    assert quality_of(config) == "high"
    written = json.loads(json.dumps(config.to_dict()))
    assert "quality" not in written
    assert written["meta"] == {"by": "me", "quality": "high"}
    assert spec().parse(written).to_dict() == written


def test_what_nobody_knows_is_named() -> None:
    with pytest.warns(UserWarning, match="ignores grup_size"):
        GPTQConfig(bits=4, grup_size=32)


@pytest.mark.parametrize("data", [None, "ptb", "texts.jsonl", ["a text"], [torch.arange(4)[None]]], ids=str)
def test_data_reach_the_engine_and_not_the_file(data: Any) -> None:
    tokenizer = SimpleNamespace()
    config = GPTQConfig(bits=4, dataset=data, tokenizer=tokenizer, model_seqlen=64, batch_size=2)
    options = calibration_of(config)
    assert options.data is data
    assert options.tokenizer is tokenizer
    assert (options.length, options.batch_size, options.sequential) == (64, 2, "groups")
    written = config.to_dict()
    assert written["dataset"] == (data if isinstance(data, str) else None)
    assert written["tokenizer"] is None
    assert config.dataset is data
    assert calibration_of(GPTQConfig(bits=4, true_sequential=False)).sequential == "block"
    assert calibration_of(GPTQConfig(bits=4)).batch_size is None


def test_values_are_still_checked() -> None:
    for values in ({"bits": 5}, {"bits": 4, "group_size": 0}, {"bits": 4, "damp_percent": 1.0}):
        with pytest.raises(ValueError, match=r"\[2,3,4,8\]|group_size|damp_percent"):
            GPTQConfig(**values)
    for values in ({"quality": "best"}, {"damp_auto_increment": -1}, {"modules_in_block_to_quantize": ["q_proj"]}):
        with pytest.raises(ConfigError, match=next(iter(values))):
            spec().parse({"bits": 4, **values})


def test_the_subclass_of_another_method_is_left_alone() -> None:
    class GPTQConfig:
        dataset = tokenizer = modules_in_block_to_quantize = None

        def __init__(self, bits: int, **kwargs: Any) -> None:
            self.given = {"bits": bits, **kwargs}

        def post_init(self) -> None: ...

        def to_dict(self) -> dict[str, Any]:
            return {"dataset": self.dataset}

    class AwqConfig(GPTQConfig): ...

    stand_in(SimpleNamespace(GPTQConfig=GPTQConfig))  # type: ignore[arg-type]
    own, other = GPTQConfig(bits=4, dynamic={}), AwqConfig(bits=4, dynamic={})
    assert (own.given, other.given) == ({"bits": 4}, {"bits": 4, "dynamic": {}})
    own.dataset = other.dataset = ["a text"]  # type: ignore[assignment]
    assert (own.to_dict(), other.to_dict()) == ({"dataset": None}, {"dataset": ["a text"]})


def test_the_solver_does_what_the_config_says() -> None:
    assert _options({}) == Options("groups", False, Damping(0.1, 0.01), search=True)
    assert not _options({"mse": 0.0}).search
    assert _options({"damp_percent": 0.05, "damp_auto_increment": 0}).damping == Damping(0.05, 0)
    assert _options({"act_group_aware": False}).order == "natural"
    assert _options({"desc_act": True}).order == "features"
    static = _options({"desc_act": True, "static_groups": True})
    assert (static.order, static.static_groups) == ("features", True)
    assert _options({"quality": "high"}).high
    assert _options({"meta": {"quality": "high"}}).high


def test_plans_ask_for_what_the_quality_needs() -> None:
    def planned(**values: Any) -> Any:
        return plan(spec().parse({"bits": 4, **values}), [WEIGHT])[WEIGHT.name]

    assert planned().statistics == ("hessian",)
    assert planned(quality="high").statistics == ("cross", "hessian")
    # Groups of neighbours need no permutation at run time.
    assert planned(desc_act=True, static_groups=True, group_size=32).layout.transforms == ()
    assert planned(modules_in_block_to_quantize=[["k_proj"], ["self_attn.q_proj"]]).rows_independent
    assert isinstance(planned(modules_in_block_to_quantize=[["k_proj"], ["proj"]]), Skip)
