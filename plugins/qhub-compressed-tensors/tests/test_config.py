"""Configs: presets, what a config that asks for quantizing becomes, what is refused and how."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from qhub_compressed_tensors.config import from_options, schemes_of, spec
from qhub_compressed_tensors.presets import PRESETS, preset
from qhub_compressed_tensors.scheme import numbers_of, scheme_of
from transformers import CompressedTensorsConfig

from qhub.errors import ConfigError
from qhub.layouts import Affine, Float8, Lookup

_GROUP = {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 32}}


def _parse(**values: Any) -> Any:
    return spec().parse({"quant_method": "compressed-tensors", **values})


def test_transformers_class_needs_no_library() -> None:
    config = CompressedTensorsConfig(config_groups={"W4A16": ["Linear"]}, ignore=["lm_head"])
    written = config.to_dict()
    assert written["quant_method"] == "compressed-tensors"
    assert written["format"] == "pack-quantized" and written["quantization_status"] == "compressed"
    assert written["config_groups"]["W4A16"]["weights"]["group_size"] == 128
    assert config.is_quantized and config.is_quantization_compressed and not config.has_fp8_modules
    assert json.loads(json.dumps(written)) == written


def test_objects_of_the_library_are_taken_as_data() -> None:
    class Scheme:
        def model_dump(self, mode: str = "python") -> dict[str, Any]:
            return dict(_GROUP)

    config = CompressedTensorsConfig(config_groups={"g": Scheme()})
    assert config.config_groups["g"]["weights"] == _GROUP["weights"]


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_plans_a_layout(name: str) -> None:
    from qhub_compressed_tensors.layout import layout_of

    group = preset(name.lower(), ["Linear"])
    assert group is not None
    (scheme,) = schemes_of(_parse(config_groups={"g": group}))
    layout = layout_of(scheme, 64, 128, "a")
    assert isinstance(layout, Affine | Float8 | Lookup)
    layout.core_specs()


def test_each_groups_format_is_filled_in() -> None:
    config = _parse(config_groups={"W8A8": ["re:.*mlp.*"], "W4A16": ["Linear"]})
    assert [group["format"] for group in config.config_groups.values()] == ["int-quantized", "pack-quantized"]
    assert config.format == "mixed-precision"


def test_a_stored_config_is_left_as_it_is() -> None:
    values = {"config_groups": {"g": dict(_GROUP)}, "format": "pack-quantized", "quantization_status": "compressed",
              "ignore": ["re:.*gate$"], "kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "attn_head"},
              "sparsity_config": {"format": "dense"}, "transform_config": {}, "version": "0.9.1"}  # fmt: skip
    written = _parse(**values).to_dict()
    assert {name: written[name] for name in values} == values


def test_older_files_nest_the_config() -> None:
    inner = {"config_groups": {"g": _GROUP}, "format": "pack-quantized", "quantization_status": "frozen"}
    config = spec().resolve().from_dict({"quantization_config": inner})  # type: ignore[attr-defined]
    assert config.quantization_status == "frozen"
    assert schemes_of(config)[0].weights.bits == 4


def test_block_structure_as_a_word() -> None:
    numbers = numbers_of({"type": "float", "strategy": "block", "block_structure": "128x64"}, "here")
    assert numbers.block == (128, 64)


@pytest.mark.parametrize(
    ("weights", "word"),
    [
        ({"num_bits": 4, "strategy": "group"}, "group_size"),
        ({"num_bits": 4, "strategy": "token"}, "token"),
        ({"num_bits": 4, "dynamic": True}, "dynamic"),
        ({"num_bits": 4, "group_size": 0}, "group_size"),
        ({"num_bits": 4, "strategy": "rows"}, "strategy"),
        ({"num_bits": 8, "type": "complex"}, "type"),
        ({"num_bits": 8, "type": "float", "symmetric": False}, "symmetric"),
        ({"num_bits": 4, "type": "float", "group_size": 64}, "NVFP4"),
        ({"num_bits": 8, "strategy": "block"}, "block_structure"),
        ({"num_bits": 8, "strategy": "block", "block_structure": [0, 3]}, "block_structure"),
        ({"num_bits": 4, "group_size": 32, "actorder": "sideways"}, "actorder"),
        ({"num_bits": 8, "scale_dtype": "torch.int64"}, "scale_dtype"),
        ({"num_bits": True}, "num_bits"),
        ({"num_bits": 4, "grp_size": 32}, "grp_size"),
        ("W4A16", "dictionary"),
    ],
)
def test_impossible_weights_are_refused(weights: Any, word: str) -> None:
    with pytest.raises(ConfigError, match=word) as caught:
        scheme_of("g", {"targets": ["Linear"], "weights": weights}, "pack-quantized")
    assert "config_groups['g']" in str(caught.value)


@pytest.mark.parametrize(
    ("inputs", "word"),
    [
        ({"strategy": "token"}, "dynamic"),
        ({"strategy": "group", "group_size": 32}, "dynamic"),
        ({"num_bits": 6, "type": "float", "dynamic": True}, "num_bits"),
        ({"num_bits": 4, "type": "float", "strategy": "token", "dynamic": True}, "4-bit"),
        ({"dynamic": "sometimes"}, "dynamic"),
    ],
)
def test_impossible_inputs_are_refused(inputs: Any, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        scheme_of("g", {**_GROUP, "input_activations": inputs}, "int-quantized")


@pytest.mark.parametrize(
    ("group", "word"),
    [
        ({**_GROUP, "output_activations": {"num_bits": 8}}, "output_activations"),
        ({"targets": ["LlamaAttention"], "input_activations": {"num_bits": 8}}, "weights=None"),
        ({**_GROUP, "targets": "Linear"}, "targets"),
        ({**_GROUP, "targets": ["re:["]}, "regular expression"),
        ({**_GROUP, "format": "float-quantized"}, "format"),
        ({**_GROUP, "format": "sparse-24-bitmask"}, "sparse"),
        ({**_GROUP, "colour": 1}, "colour"),
    ],
)
def test_impossible_groups_are_refused(group: Any, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        _parse(config_groups={"g": group})


def test_options_of_the_command_line() -> None:
    plain = from_options({"bits": 8, "group_size": -1})["config_groups"]["group_0"]["weights"]
    assert (plain["num_bits"], plain["strategy"], plain["group_size"]) == (8, "channel", None)
    scheme = from_options({"scheme": "fp8_dynamic"})["config_groups"]["group_0"]
    assert scheme["weights"]["type"] == "float"
    changed = from_options({**spec().presets["W4A16"], "group_size": 32, "symmetric": False})
    weights = changed["config_groups"]["group_0"]["weights"]
    assert (weights["group_size"], weights["symmetric"]) == (32, False)
    with pytest.raises(ConfigError, match="W9A9"):
        from_options({"scheme": "W9A9"})
    _parse(**changed)


def test_the_head_is_quantized_where_a_target_names_it() -> None:
    assert not _parse(config_groups={"W4A16": ["Linear"]}).targets_head
    assert _parse(config_groups={"W4A16": ["Linear", "lm_head"]}).targets_head
    assert _parse(config_groups={"W4A16": ["re:.*lm_head"]}).targets_head


def test_inputs_are_rounded_as_upstream_does() -> None:
    """Half the range of integers for the largest magnitude, where the scale is found while running."""
    from qhub_compressed_tensors.layout import activation_of

    assert activation_of(numbers_of(PRESETS["W8A8"]["input_activations"], "")).top == 127.5
    assert activation_of(None).kind == "none"
    static = activation_of(numbers_of(PRESETS["FP8"]["input_activations"], ""))
    assert static.static and static.part_specs()["input_scale"].dtypes == (torch.float32,)
