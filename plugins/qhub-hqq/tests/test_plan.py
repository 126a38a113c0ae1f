"""Which layer gets which layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from qhub_hqq.hqq_config import HqqConfig
from qhub_hqq.plan import layer_tag, plan

from qhub.errors import ConfigError
from qhub.layouts import Affine, Grid
from qhub.plan import LayerPlan, Skip, WeightInfo


def _weight(name: str = "model.layers.0.self_attn.q_proj.weight", n: int = 64, k: int = 128, **more: Any) -> WeightInfo:
    return WeightInfo(name, n, k, more.pop("dtype", torch.bfloat16), **more)


def _layout(weight: WeightInfo, **arguments: Any) -> Affine:
    planned = plan(HqqConfig(**arguments), [weight])[weight.name]
    assert isinstance(planned, LayerPlan)
    assert isinstance(planned.layout, Affine)
    return planned.layout


@pytest.mark.parametrize(
    ("arguments", "grid"),
    [
        ({"group_size": 64}, Grid("block", 1, 64)),
        ({"group_size": None}, Grid("block", 1, 128)),
        ({"group_size": 256}, Grid("flat", 1, 256)),
        ({"group_size": 64, "axis": 0}, Grid("strided", 1, 64)),
        ({"group_size": None, "axis": 0}, Grid("strided", 1, 64)),
    ],
)
def test_groups_lie_where_hqq_puts_them(arguments: dict[str, Any], grid: Grid) -> None:
    layout = _layout(_weight(), nbits=3, **arguments)
    assert layout == Affine(out_features=64, in_features=128, bits=3, grid=grid, zero="value", math="scales")


@pytest.mark.parametrize(
    ("weight", "arguments", "message"),
    [
        (_weight(n=10, k=24), {"group_size": 64}, "model.layers.0.self_attn.q_proj"),
        (_weight(n=10, k=24), {"group_size": 64, "axis": 0}, "model.layers.0.self_attn.q_proj"),
        (_weight(n=3, k=64), {"group_size": 64}, "packs 2 rows"),
        (_weight(n=4, k=64), {"nbits": 1, "group_size": None}, "packs 8 rows"),
        (_weight(n=6, k=64), {"nbits": 2, "group_size": None, "axis": 0}, "packs 4 rows"),
        (_weight(n=8, k=5), {"nbits": 8, "group_size": 8, "axis": 0, "view_as_float": True}, "5 bytes"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(weight: WeightInfo, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        plan(HqqConfig(**arguments), [weight])
    assert weight.module in str(caught.value)


def test_three_bits_take_any_number_of_rows() -> None:
    assert _layout(_weight(n=3, k=64), nbits=3).bits == 3


def test_tags_are_those_of_transformers() -> None:
    assert layer_tag("model.layers.31.self_attn.k_proj") == "self_attn.k_proj"
    assert layer_tag("model.decoder.layers.0.fc1") == "decoder.fc1"
    assert layer_tag("lm_head") == "lm_head"


def test_settings_per_layer_leave_the_rest_dense() -> None:
    config = HqqConfig(
        dynamic_config={"self_attn.q_proj": {"nbits": 8, "group_size": 128}, "mlp.up_proj": {"nbits": 2}}
    )
    weights = [_weight(), _weight("model.layers.1.mlp.up_proj.weight"), _weight("model.layers.1.mlp.down_proj.weight")]
    planned = plan(config, weights)
    bits = [one.layout.bits if isinstance(one, LayerPlan) else one for one in planned.values()]  # type: ignore[attr-defined]
    assert bits[:2] == [8, 2]
    assert isinstance(bits[2], Skip)
    assert "mlp.down_proj" in bits[2].reason


def test_tags_that_name_no_layer_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"self_attn\.q_proj"):
        plan(HqqConfig(dynamic_config={"attn.q": {"nbits": 4}}), [_weight()])


def test_skip_modules_may_hold_tags() -> None:
    weight = _weight("model.decoder.layers.0.fc1.weight")
    assert isinstance(plan(HqqConfig(skip_modules=["decoder.fc1"]), [weight])[weight.name], Skip)


def test_experts_are_quantized_and_embeddings_are_not() -> None:
    experts = _weight("model.layers.0.mlp.experts.gate_up_proj", kind="experts", experts=4)
    embedding = _weight("model.embed_tokens.weight", kind="embedding")
    planned = plan(HqqConfig(), [experts, embedding])
    assert isinstance(planned[experts.name], LayerPlan)
    assert isinstance(planned[embedding.name], Skip)
