"""Other methods' layouts as schemes: which group, which layout, and a config that upstream's rules read back."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from qhub_compressed_tensors.adopt import adopt
from qhub_compressed_tensors.format import CompressedTensorsFormat
from qhub_compressed_tensors.matching import matching_pattern, scheme_for
from qhub_compressed_tensors.plan import plan
from qhub_compressed_tensors.record import record
from qhub_compressed_tensors.scheme import Scheme, numbers_of
from qhub_compressed_tensors.targets import expressions

from qhub.errors import ConfigError
from qhub.layouts import Activation, Affine, Codebook, Float8, Grid, Layout, Lookup, Nested, Transform
from qhub.layouts.float4 import mxfp4, nvfp4
from qhub.layouts.translating import exact_weight, translate
from qhub.plan import LayerPlan, Skip, WeightInfo

N, K = 64, 128


def _affine(**values: Any) -> Affine:
    return Affine(**{"out_features": N, "in_features": K, "bits": 4, "grid": Grid.along_k(32), **values})


def _parts(layout: Layout) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    parts = {}
    for name, spec in layout.part_specs().items():
        dtype = spec.dtypes[0]
        if name == "in_perm":
            parts[name] = torch.randperm(K, generator=generator).to(torch.int32)
        elif name == "zeros":
            parts[name] = torch.randint(0, 16, spec.shape, generator=generator).float()
        elif name == "qweight":
            raw = torch.randint(0, 126, (*spec.shape,), generator=generator, dtype=torch.uint8)
            parts[name] = raw.view(dtype) if dtype.itemsize == 1 else raw.to(dtype)
        elif name == "table":
            from qhub.layouts.float4 import float4_table

            parts[name] = float4_table()
        elif dtype == torch.float8_e4m3fn:
            parts[name] = torch.rand(spec.shape, generator=generator).add(0.5).to(dtype)
        elif name == "scales" and isinstance(layout, Lookup):
            parts[name] = torch.ones(spec.shape).to(torch.float8_e8m0fnu)
        else:
            parts[name] = torch.rand(spec.shape, generator=generator).add(0.5).half().float()
    return parts


_ZERO = {"zero": "value"}
CASES: dict[str, tuple[Layout, dict[str, Any]]] = {
    "gptq": (_affine(zero_point=8.0), {"num_bits": 4, "group_size": 32, "symmetric": True}),
    "gptq, asymmetric": (_affine(**_ZERO), {"num_bits": 4, "group_size": 32, "symmetric": False}),
    "gptq, act-order": (
        _affine(zero_point=8.0, transforms=(Transform("permute", "in"),)), {"actorder": "group", "group_size": 32},
    ),
    "gptq, 3 bits": (_affine(bits=3, zero_point=4.0), {"num_bits": 3}),
    "awq": (_affine(**_ZERO), {"num_bits": 4, "symmetric": False}),
    "hqq": (_affine(**_ZERO, grid=Grid.along_k(64)), {"group_size": 64, "symmetric": False}),
    "groups that cross rows": (_affine(zero_point=8.0, grid=Grid("flat", 1, 96)), {"group_size": 32}),
    "eetq": (_affine(bits=8, signed=True, grid=Grid.along_k(K)), {"num_bits": 8, "strategy": "channel"}),
    "bitsandbytes int8": (
        _affine(bits=8, signed=True, grid=Grid.along_k(K), unit=1 / 128, activation=Activation("int8", threshold=6.0)),
        {"num_bits": 8, "strategy": "channel"},
    ),
    "torchao int8, int8 inputs": (
        _affine(bits=8, signed=True, grid=Grid.along_k(K), activation=Activation("int8")), {"strategy": "channel"},
    ),
    "fp8": (Float8(out_features=N, in_features=K, grid=Grid("block", N, K)), {"type": "float", "strategy": "tensor"}),
    "fp8, rows": (Float8(out_features=N, in_features=K, grid=Grid.along_k(K)), {"strategy": "channel"}),
    "fp8, blocks": (
        Float8(out_features=N, in_features=K, grid=Grid("block", 32, 64)), {"block_structure": [32, 64]},
    ),
    "nvfp4": (nvfp4(N, K), {"num_bits": 4, "type": "float", "group_size": 16}),
    "mxfp4": (mxfp4(N, K), {"num_bits": 4, "type": "float", "group_size": 32, "scale_dtype": "torch.uint8"}),
}  # fmt: skip


@pytest.mark.parametrize("name", list(CASES))
def test_numbers_are_taken_over_and_read_back(name: str) -> None:
    """source -> adopted layout -> entries -> what this plugin plans for its own config -> the same weight."""
    layout, wanted = CASES[name]
    parts = _parts(layout)
    adopted = adopt({"model.a.weight": layout}, ["lm_head.weight"], {})
    target = adopted.layouts["model.a.weight"]
    assert isinstance(target, Layout)
    (group,) = adopted.config.config_groups.values()
    assert {key: group["weights"][key] for key in wanted} == wanted
    assert adopted.config.ignore == ["lm_head"] and group["targets"] == ["Linear"]
    made = translate(layout, parts, target)
    entries = CompressedTensorsFormat().pack(target, made, torch.float32)
    infos = [WeightInfo(f"{module}.weight", N, K, torch.float32) for module in ("model.a", "lm_head")]
    plans = plan(adopted.config, infos)
    assert isinstance(plans["lm_head.weight"], Skip)
    planned = plans["model.a.weight"]
    assert isinstance(planned, LayerPlan)
    read, found = CompressedTensorsFormat().unpack(planned.layout, entries)
    assert torch.equal(exact_weight(read, found), exact_weight(layout, parts))


@pytest.mark.parametrize(
    ("name", "fmt", "inputs"),
    [
        ("eetq", "pack-quantized", None),
        ("bitsandbytes int8", "pack-quantized", None),
        ("torchao int8, int8 inputs", "int-quantized", ("int", "token")),
        ("fp8", "naive-quantized", None),
    ],
)
def test_formats_are_those_that_upstream_chooses(name: str, fmt: str, inputs: tuple[str, str] | None) -> None:
    (group,) = adopt({"a": CASES[name][0]}, [], {}).config.config_groups.values()
    assert group["format"] == fmt
    found = group["input_activations"]
    assert (None if found is None else (found["type"], found["strategy"])) == inputs


@pytest.mark.parametrize(
    ("layout", "word"),
    [
        (_affine(transforms=(Transform("scale", "in"),)), "in scale"),
        (_affine(grid=Grid("strided", 1, 64)), "axis 0"),
        (_affine(in_features=130, grid=Grid.along_k(64)), "130"),
        (Float8(out_features=N, in_features=K, format="e5m2", grid=Grid.along_k(K)), "e5m2"),
        (Lookup(out_features=N, in_features=K, grid=Grid.along_k(64)), "table"),
        (Lookup(out_features=N, in_features=K, grid=Grid.along_k(64), scales_nested=Nested()), "table"),
        (Codebook(out_features=N, in_features=K, nbits=(8,), in_group=8, out_group=1, grid=Grid.along_k(8)), "code"),
    ],
)  # fmt: skip
def test_what_has_no_scheme_is_left_out_with_the_reason(layout: Layout, word: str) -> None:
    adopted = adopt({"a.weight": layout, "b.weight": CASES["gptq"][0]}, [], {})
    skipped = adopted.layouts["a.weight"]
    assert isinstance(skipped, Skip) and word in skipped.reason
    assert adopted.config.ignore == ["a"]


def test_several_schemes_and_experts() -> None:
    """The scheme of most weights is the class's; the others' expressions mean their modules and no others."""
    many = {f"model.layers.{i}.mlp.experts.{e}.w{w}.weight": CASES["gptq"][0]
            for i in range(3) for e in range(4) for w in (1, 2, 3)}  # fmt: skip
    few = {
        f"model.layers.{i}.self_attn.{p}.weight": CASES["fp8, rows"][0] for i in (0, 2) for p in ("q_proj", "k_proj")
    }
    adopted = adopt({**many, **few}, ["model.layers.0.mlp.gate.weight"], {"ignore": ["re:.*vision.*"]})
    groups = list(adopted.config.config_groups.values())
    assert groups[0]["targets"] == ["Linear"] and adopted.config.format == "mixed-precision"
    assert adopted.config.ignore == ["model.layers.0.mlp.gate", "re:.*vision.*"]
    (expression,) = groups[1]["targets"]
    named = {name.removesuffix(".weight") for name in few}
    every = {f"model.layers.{i}.self_attn.{p}_proj" for i in range(30) for p in "qkvo"}
    assert {name for name in every if re.match(expression[3:], name)} == named


def test_options_that_are_none_are_refused() -> None:
    with pytest.raises(ConfigError, match="bits"):
        adopt({"a": CASES["gptq"][0]}, [], {"bits": 8})


def test_expressions_are_exact_where_numbers_depend_on_each_other() -> None:
    names = {f"layers.{i}.experts.{e}.w" for i, e in ((0, 0), (0, 1), (1, 1), (2, 0), (2, 1))} | {"head", "layers.10.x"}
    found = expressions(names)
    every = {f"layers.{i}.experts.{e}.{w}" for i in range(12) for e in range(12) for w in "wv"}
    every |= {"head", "ahead", "heads", "layers.10.x", "layers.1.x", *names}
    assert {name for name in every if any(re.match(one[3:], name) for one in found)} == names


def _scheme(name: str, *targets: str) -> Scheme:
    return Scheme(name, targets, numbers_of({"num_bits": 4, "group_size": 32}, ""), None, "pack-quantized")


def test_names_go_before_expressions_and_these_before_classes() -> None:
    schemes = [_scheme("class", "Linear"), _scheme("expression", "re:.*up_proj"), _scheme("name", "layers.0.up_proj")]
    for module, wanted in (("layers.0.up_proj", "name"), ("layers.1.up_proj", "expression"), ("x.down", "class")):
        found = scheme_for(module, schemes)
        assert found is not None and found.name == wanted
    assert scheme_for("a", [_scheme("e", "re:.*b$")]) is None
    # An expression matches from the start, a name is whole.
    assert matching_pattern("model.lm_head", ["lm_head", "re:lm_head", "re:.*gate$"]) is None
    assert matching_pattern("model.mlp.gate", ["lm_head", "re:.*gate$"]) == "re:.*gate$"


def test_a_file_whose_names_mean_something_else() -> None:
    """A config that was made for a model's own names is made one of the file's."""
    from qhub_compressed_tensors.config import spec

    config = spec().parse({"config_groups": {"W8A8": ["re:.*w1$"], "W4A16": ["Linear"]}, "ignore": ["re:.*w2$"]})
    four = plan(config, [WeightInfo("a.weight", 64, 128, torch.float32)])["a.weight"]
    assert isinstance(four, LayerPlan)
    record(config, {"e.0.w1": four.layout, "e.0.w2": four.layout}, ["gate", "lm_head", "x.w2"])
    assert config.ignore == ["gate", "lm_head", "x.w2"]
    infos = [WeightInfo(f"{m}.weight", 64, 128, torch.float32) for m in ("e.0.w1", "e.0.w2", "lm_head")]
    plans = plan(config, infos)
    assert plans["e.0.w1.weight"] == plans["e.0.w2.weight"] == four
    assert isinstance(plans["lm_head.weight"], Skip)
    before = config.to_dict()
    record(config, {"e.0.w1": four.layout, "e.0.w2": four.layout}, ["gate", "lm_head", "x.w2"])
    assert config.to_dict() == before


def test_a_config_may_have_the_files_names() -> None:
    """Where transformers renames what a file holds, expressions of its config go by the file's names."""
    from qhub_compressed_tensors.config import spec

    config = spec().parse({"config_groups": {"W8A8": ["re:language_model.*"]}, "ignore": ["visual.x"]})
    infos = [
        WeightInfo(f"model.{name}.weight", 64, 128, torch.float32, stored=name)
        for name in ("language_model.a", "visual.x")
    ]
    plans = plan(config, infos)
    assert isinstance(plans["model.language_model.a.weight"], LayerPlan)
    assert plans["model.visual.x.weight"] == Skip("'visual.x' in ignore")
