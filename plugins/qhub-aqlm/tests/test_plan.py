"""The config's values and the layouts that follow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from qhub_aqlm.config import check, spec
from qhub_aqlm.plan import plan
from transformers import AqlmConfig

from qhub.errors import ConfigError
from qhub.layouts import Codebook, Grid
from qhub.plan import LayerPlan, Skip, WeightInfo


def _weight(name: str = "model.layers.0.self_attn.q_proj.weight", n: int = 64, k: int = 128, **more: Any) -> WeightInfo:
    return WeightInfo(name, n, k, torch.float16, **more)


def test_a_config_json_of_transformers_is_understood(tiny_checkpoint: Path) -> None:
    values = json.loads((tiny_checkpoint / "config.json").read_text())["quantization_config"]
    config = spec().parse(values)
    assert type(config) is AqlmConfig
    assert json.loads(json.dumps(config.to_dict())) == values


def test_defaults_are_those_of_transformers() -> None:
    config = spec().parse({"quant_method": "aqlm"})
    planned = plan(config, [_weight()])["model.layers.0.self_attn.q_proj.weight"]
    assert isinstance(planned, LayerPlan)
    assert planned.layout == Codebook(
        out_features=64, in_features=128, nbits=(16,), out_group=1, in_group=8, grid=Grid("block", 1, 128)
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"in_group_size": 0}, "in_group_size=0"),
        ({"out_group_size": -1}, "out_group_size=-1"),
        ({"num_codebooks": 0}, "num_codebooks=0"),
        ({"num_codebooks": 1 << 40}, "num_codebooks"),
        ({"nbits_per_codebook": 17}, "nbits_per_codebook=17"),
        ({"nbits_per_codebook": True}, "nbits_per_codebook=True"),
        ({"nbits_per_codebook": "8"}, "nbits_per_codebook"),
        ({"linear_weights_not_to_quantize": "lm_head"}, "linear_weights_not_to_quantize"),
        ({"linear_weights_not_to_quantize": [1]}, "linear_weights_not_to_quantize"),
        ({"bits": 2}, "bits"),
    ],
)
def test_impossible_values_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        spec().parse({"quant_method": "aqlm", **values})


def test_an_object_is_checked_too() -> None:
    config = AqlmConfig()
    config.num_codebooks = 65
    with pytest.raises(ConfigError, match="num_codebooks=65"):
        check(config)


@pytest.mark.parametrize(
    "listed", ["model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj", "up_proj.weight"]
)
def test_dense_weights_are_listed_as_parameters_or_as_modules(listed: str) -> None:
    weights = [_weight(), _weight("model.layers.0.mlp.up_proj.weight"), _weight("lm_head.weight")]
    planned = plan(AqlmConfig(linear_weights_not_to_quantize=[listed, "lm_head.weight"]), weights)
    kinds = [type(one) for one in planned.values()]
    assert kinds == [LayerPlan, Skip, Skip]


@pytest.mark.parametrize(("n", "k"), [(64, 100), (66, 128)])
def test_groups_that_do_not_divide_are_refused_by_name(n: int, k: int) -> None:
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.self_attn\.q_proj"):
        plan(AqlmConfig(out_group_size=4), [_weight(n=n, k=k)])


def test_embeddings_stay_dense() -> None:
    weight = _weight("model.embed_tokens.weight", kind="embedding")
    assert isinstance(plan(AqlmConfig(), [weight])[weight.name], Skip)
