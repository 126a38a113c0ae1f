"""The config's values and the layouts that follow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from qhub_quip.config import QuipConfig, spec
from qhub_quip.plan import plan

from qhub.errors import ConfigError
from qhub.layouts import Codebook, Grid, Transform
from qhub.plan import LayerPlan, Skip, WeightInfo

# As a released checkpoint has them (relaxml/Llama-2-7b-E8P-2Bit and its siblings).
RELEASED = {
    "codebook": "E8P12",
    "codebook_version": 1,
    "codesz": 8,
    "idx_dtype": "torch.int64",
    "lora_rank": 0,
    "model_version": 1,
    "packsz": 4,
    "rescale_WH": False,
    "resid_scale_override": -1,
}


def _weight(name: str = "model.layers.0.self_attn.q_proj.weight", n: int = 64, k: int = 128, **more: Any) -> WeightInfo:
    return WeightInfo(name, n, k, torch.float16, **more)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"codebook": "E8P12RVQ4B", "packsz": 2, "resid_scale_override": 3.6},
        {"codebook": "E8P12RVQ3B", "packsz": 8 / 3, "codebook_version": 0},
        {"lora_rank": -1, "rescale_WH": True, "train_mode": True},
    ],
)
def test_released_settings_are_understood(changes: dict[str, Any]) -> None:
    values = {**RELEASED, **changes}
    config = spec().parse({"quant_method": "quip", **values})
    assert type(config) is QuipConfig
    assert values.items() <= config.to_dict().items()


def test_the_checkpoints_own_settings_are_understood(checkpoint: Path) -> None:
    values = json.loads((checkpoint / "config.json").read_text())
    assert "quantization_config" not in values
    assert spec().parse({"quant_method": "quip", **values["quip_params"]}).codebook == "E8P12"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"codebook": "D4"}, "codebook='D4'"),
        ({"codebook": ["E8P12"]}, "codebook"),
        ({"codebook_version": 0}, "codebook_version=0"),
        ({"codebook": "E8P12RVQ3B", "codebook_version": 1}, "codebook_version=1"),
        ({"codesz": 4}, "codesz=4"),
        ({"codesz": 8.0}, "codesz=8.0"),
        ({"packsz": 2}, "packsz=2"),
        ({"packsz": "4"}, "packsz='4'"),
        ({"pack_out": True}, "pack_out=True"),
        ({"idx_dtype": "torch.int32"}, "idx_dtype"),
        ({"lora_rank": 16}, "lora_rank=16"),
        ({"lora_rank": None}, "lora_rank=None"),
        ({"rescale_WH": 1}, "rescale_WH=1"),
        ({"resid_scale_override": float("inf")}, "resid_scale_override=inf"),
        ({"resid_scale_override": 1e-30}, "resid_scale_override=1e-30"),
        ({"resid_scale_override": "3"}, "resid_scale_override='3'"),
        ({"model_version": 0}, "model_version=0"),
        ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert"),
        ({"bits": 2}, "bits"),
    ],
)
def test_impossible_values_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        spec().parse({"quant_method": "quip", **values})


def test_the_layout() -> None:
    planned = plan(QuipConfig(), [_weight()])["model.layers.0.self_attn.q_proj.weight"]
    assert isinstance(planned, LayerPlan)
    assert planned.layout == Codebook(
        out_features=64,
        in_features=128,
        nbits=(16,),
        out_group=1,
        in_group=8,
        grid=Grid("block", 64, 128),
        shared=True,
        folded=(0.25,),
        transforms=(
            Transform("scale", "in"),
            Transform("hadamard", "in"),
            Transform("hadamard", "out"),
            Transform("scale", "out"),
        ),
    )


@pytest.mark.parametrize(
    ("values", "divisors"),
    [
        ({"codebook": "E8P12RVQ4B"}, (1.0, 3.45)),
        ({"codebook": "E8P12RVQ3B"}, (1.0, 2.04)),
        ({"codebook": "E8P12RVQ4B", "resid_scale_override": 4}, (1.0, 4.0)),
        ({"codebook": "E8P12", "resid_scale_override": 4}, ()),
    ],
)
def test_the_residual_is_divided(values: dict[str, Any], divisors: tuple[float, ...]) -> None:
    planned = plan(QuipConfig(**values), [_weight()])["model.layers.0.self_attn.q_proj.weight"]
    assert isinstance(planned, LayerPlan) and isinstance(planned.layout, Codebook)
    assert planned.layout.divisors == divisors


@pytest.mark.parametrize(("n", "k"), [(64, 96), (24, 128), (7 * 64, 11 * 64), (64, 7 * 11 * 64)])
def test_shapes_that_quip_has_not_are_refused_by_name(n: int, k: int) -> None:
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.self_attn\.q_proj"):
        plan(QuipConfig(), [_weight(n=n, k=k)])


def test_embeddings_stay_dense() -> None:
    weight = _weight("model.embed_tokens.weight", kind="embedding")
    assert isinstance(plan(QuipConfig(), [weight])[weight.name], Skip)
