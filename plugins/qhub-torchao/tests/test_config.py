"""TorchAoConfig from objects, their JSON and the old strings, and which weights get what."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from qhub_torchao.config import from_options, spec
from qhub_torchao.plan import plan
from qhub_torchao.strings import STRINGS
from transformers import TorchAoConfig

from qhub.errors import ConfigError
from qhub.layouts import Activation, Affine, Float8, Grid
from qhub.plan import LayerPlan, Skip, WeightInfo


def _weight(name: str = "model.layers.0.self_attn.q_proj", n: int = 64, k: int = 256, **more: Any) -> WeightInfo:
    return WeightInfo(f"{name}.weight", n, k, torch.bfloat16, **more)


def _planned(config: Any, weight: WeightInfo | None = None) -> Any:
    weight = weight or _weight()
    spec().verify(config)
    return plan(config, [weight, _weight("fits", 64, 1024)])[weight.name]


def _affine(bits: int, group: int, zero: Any = "constant", n: int = 64, k: int = 256, **more: Any) -> Affine:
    point = {"zero_point": 8.0} if zero == "offset" else {}
    return Affine(out_features=n, in_features=k, bits=bits, grid=Grid.along_k(group), zero=zero, **{**point, **more})


INT8_ROWS = Activation(kind="int8", top=127.5)
STRING_LAYOUTS = {
    "int8_weight_only": ({}, _affine(8, 256, signed=True)),
    "int4_weight_only": ({"group_size": 32}, _affine(4, 32, "offset")),
    "int8_dynamic_activation_int8_weight": ({}, _affine(8, 256, signed=True, activation=INT8_ROWS)),
    "int8_dynamic_activation_int4_weight": (
        {},
        _affine(4, 32, zero_point=8.0, math="scales", activation=Activation(kind="int8", symmetric=False)),
    ),
    "float8_weight_only": ({}, Float8(out_features=64, in_features=256, grid=Grid.along_k(256))),
    "float8_dynamic_activation_float8_weight": (
        {},
        Float8(
            out_features=64, in_features=256, grid=Grid("block", 64, 256),
            activation=Activation(kind="float8", granularity="tensor"),
        ),
    ),
    "float8_dynamic_activation_int4_weight": ({}, _affine(4, 128, "offset", activation=Activation(kind="float8"))),
    "intx_weight_only": ({"weight_dtype": torch.int3}, _affine(3, 256, zero_point=4.0, math="scales")),
    "int8_dynamic_activation_intx_weight": (
        {"weight_dtype": "int2"},
        _affine(2, 32, zero_point=2.0, math="scales", activation=Activation(kind="int8", symmetric=False)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STRINGS)
def test_old_strings(name: str) -> None:
    """Each of the strings that transformers 5 no longer takes, with its arguments."""
    arguments, layout = STRING_LAYOUTS[name]
    config = TorchAoConfig(name, **arguments)
    assert _planned(config) == LayerPlan(layout)
    # As transformers 4 wrote it, and as it is written now.
    old = {"quant_type": name, "quant_type_kwargs": dict(arguments), "include_embedding": False}
    assert _planned(spec().parse(old)) == LayerPlan(layout)
    written = json.loads(json.dumps(config.to_dict()))
    assert set(written["quant_type"]) == {"default"}
    assert _planned(spec().parse(written)) == LayerPlan(layout)


def test_granularities_of_strings() -> None:
    rows = TorchAoConfig("float8_dynamic_activation_float8_weight", granularity="PerRow")
    layout = _planned(rows).layout
    assert (layout.grid, layout.activation) == (Grid.along_k(256), Activation(kind="float8"))
    grouped = _planned(TorchAoConfig("int8_weight_only", group_size=64)).layout
    assert grouped == _affine(8, 64, signed=True)


def test_version_one_of_torchaos_configs() -> None:
    """Files of torchao up to 0.12 say version 1: the same numbers under older fields."""
    old = {
        "default": {
            "_type": "Int4WeightOnlyConfig",
            "_version": 1,
            "_data": {
                "group_size": 64, "layout": {"_type": "TensorCoreTiledLayout", "_data": {"inner_k_tiles": 8}},
                "use_hqq": True, "zero_point_domain": {"_type": "ZeroPointDomain", "_data": "NONE"},
                "set_inductor_config": True, "preserve_zero": None,
            },
        }
    }  # fmt: skip
    config = spec().parse({"quant_type": old})
    assert _planned(config).layout == _affine(4, 64, "offset")
    assert config.to_dict()["quant_type"]["default"]["_data"]["int4_choose_qparams_algorithm"]["_data"] == "HQQ"
    eight = {"_type": "Int8WeightOnlyConfig", "_version": 1, "_data": {"group_size": 32, "set_inductor_config": True}}
    assert _planned(spec().parse({"quant_type": {"default": eight}})).layout == _affine(8, 32, signed=True)


FQN = {
    "_type": "FqnToConfig",
    "_version": 1,
    "_data": {
        "fqn_to_config": {
            "model.a.weight": {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {}},
            "model.a": None,
            "re:model\\.b.*": {"_type": "Float8WeightOnlyConfig", "_version": 2, "_data": {}},
            "re:model\\..*": None,
            "_default": {"_type": "IntxWeightOnlyConfig", "_version": 2, "_data": {"weight_dtype": "int4"}},
        }
    },
}


def test_names_of_a_fqn_to_config() -> None:
    """Parameter before module before patterns, the first of which wins, before the default."""
    config = spec().parse({"quant_type": {"default": FQN}})
    found = plan(config, [_weight(name) for name in ("model.a", "model.bc", "model.c", "head")])
    assert isinstance(found["model.a.weight"].layout, Affine)  # type: ignore[union-attr]
    assert isinstance(found["model.bc.weight"].layout, Float8)  # type: ignore[union-attr]
    assert found["model.c.weight"] == Skip("'re:model\\\\..*' is None in FqnToConfig")
    assert found["head.weight"].layout.bits == 4  # type: ignore[union-attr]
    bare = {**FQN, "_type": "ModuleFqnToConfig", "_data": {"module_fqn_to_config": FQN["_data"]["fqn_to_config"]}}  # type: ignore[index]
    assert (
        plan(spec().parse({"quant_type": {"default": bare}}), [_weight("model.bc")])["model.bc.weight"]
        == found["model.bc.weight"]
    )


def test_what_is_left_alone() -> None:
    config = TorchAoConfig("int4_weight_only", group_size=64)
    odd = _planned(config, _weight(k=96))
    assert isinstance(odd, Skip)
    assert "group_size" in odd.reason
    for kind in ("experts", "conv1d"):
        assert isinstance(_planned(config, _weight(kind=kind)), Skip)
    small = _planned(TorchAoConfig("float8_dynamic_activation_float8_weight"), _weight(n=24))
    assert isinstance(small, Skip)
    assert "16" in small.reason


def test_embeddings_have_no_inputs_to_round() -> None:
    config = TorchAoConfig("int8_dynamic_activation_int8_weight", include_input_output_embeddings=True)
    assert _planned(config, _weight("embed", kind="embedding")).layout.activation == Activation()


def test_which_tables_a_fqn_to_config_means() -> None:
    """A name or a pattern is enough for embeddings; what is left over goes for linear layers, unless asked for."""
    eight = {"_type": "Int8WeightOnlyConfig", "_data": {}}
    table = _weight("model.embed_tokens", kind="embedding")
    for names, asked, quantized in [
        ({"model.embed_tokens": eight}, False, True),
        ({"re:.*embed.*": eight}, False, True),
        ({"_default": eight}, False, False),
        ({"_default": eight}, True, True),
        ({"re:.*proj": eight}, True, False),
    ]:
        values = {"_type": "FqnToConfig", "_data": {"fqn_to_config": names}}
        config = spec().parse({"quant_type": values, "include_input_output_embeddings": asked})
        assert config.takes_tables
        found = plan(config, [table, _weight("model.q_proj")])["model.embed_tokens.weight"]
        assert isinstance(found, LayerPlan) == quantized
    assert not TorchAoConfig("int8_weight_only").takes_tables


def test_experts_are_quantized_where_they_are_named() -> None:
    """By their parameter or the module that holds them, in tensors that torchao can stack."""
    name = "model.layers.0.mlp.experts.down_proj"
    for values, key, quantized in [
        ({"_type": "Int8WeightOnlyConfig", "_data": {}}, name, True),
        ({"_type": "Float8WeightOnlyConfig", "_data": {}}, "re:.*experts", True),
        ({"_type": "Int8WeightOnlyConfig", "_data": {}}, "_default", False),
        ({"_type": "Int8WeightOnlyConfig", "_data": {"granularity": {"_type": "PerTensor"}}}, name, False),
        ({"_type": "IntxWeightOnlyConfig", "_data": {}}, name, False),
    ]:
        parts = {"_type": "FqnToConfig", "_data": {"fqn_to_config": {key: values}}}
        config = spec().parse({"quant_type": parts})
        for transposed in (False, True):
            expert = WeightInfo(name, 64, 256, torch.bfloat16, "experts", 4, transposed)
            found = plan(config, [expert])[name]
            assert isinstance(found, LayerPlan) == (quantized and not transposed)


def test_two_configs_for_one_layout() -> None:
    """Where the layout cannot tell which of two configs a weight has, no file could either."""
    data = {"weight_dtype": "int4", "mapping_type": "SYMMETRIC"}
    pair = {
        "a": {"_type": "IntxWeightOnlyConfig", "_data": data},
        "b": {"_type": "IntxWeightOnlyConfig", "_data": {**data, "mapping_type": "SYMMETRIC_NO_CLIPPING_ERR"}},
    }
    config = spec().parse({"quant_type": {"_type": "FqnToConfig", "_data": {"fqn_to_config": pair}}})
    with pytest.raises(ConfigError, match="laid out alike"):
        plan(config, [_weight("a"), _weight("b")])


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"quant_type": "int3_weight_only"}, "int3_weight_only"),
        ({"quant_type": "int4_weight_only", "granularity": "PerRow"}, "granularity"),
        ({"quant_type": None}, "quant_type"),
        ({}, "quant_type"),
        ({"quant_type": {"default": FQN}, "group_size": 32}, "group_size"),
        ({"quant_type": {"_type": "Int4WeightOnlyConfig", "_data": {"group_size": 0}}}, "group_size"),
        ({"quant_type": {"_type": "Int4WeightOnlyConfig", "_data": {"groups": 3}}}, "groups"),
        ({"quant_type": {"_type": "Int4WeightOnlyConfig", "_data": {"int4_packing_format": "spiral"}}}, "spiral"),
        ({"quant_type": {"_type": "Int4WeightOnlyConfig", "_data": {"int4_tile_packed_ntile": 16}}}, "ntile"),
        ({"quant_type": {"_type": "IntxWeightOnlyConfig", "_data": {"weight_dtype": "int9"}}}, "int9"),
        ({"quant_type": {"_type": "Float8WeightOnlyConfig", "_data": {"weight_dtype": "float8_e8m0fnu"}}}, "e8m0fnu"),
        ({"quant_type": {"_type": "FqnToConfig", "_data": {}}}, "fqn_to_config"),
        ({"quant_type": "int8_weight_only", "modules_to_not_convert": "lm_head"}, "modules_to_not_convert"),
        (
            {"quant_type": {"_type": "Float8DynamicActivationFloat8WeightConfig", "_data": {"activation_value_lb": 1}}},
            "activation_value_lb",
        ),
    ],
)  # fmt: skip
def test_bad_values_are_named(values: dict[str, Any], names: str) -> None:
    with pytest.raises(ConfigError, match=names):
        spec().parse(values)


def test_options_of_the_command_line() -> None:
    assert from_options({"bits": 4, "group_size": 32}) == {"quant_type": "int4_weight_only", "group_size": 32}
    three = spec().parse(from_options({"bits": 3, "group_size": 32}))
    assert _planned(three).layout == _affine(3, 32, zero_point=4.0, math="scales")
    with pytest.raises(ConfigError, match="bits"):
        from_options({"bits": 9})


_FRESH = """
import json, sys
from transformers import TorchAoConfig
config = TorchAoConfig("int8_weight_only")
again = TorchAoConfig.from_dict(json.loads(json.dumps(config.to_dict())))
assert again.to_dict() == config.to_dict()
assert "torchao" not in sys.modules
"""


def test_made_without_torchao() -> None:
    """A process that imports only transformers, and nothing of torchao."""
    result = subprocess.run([sys.executable, "-c", _FRESH], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
def test_torchaos_own_objects() -> None:
    """Objects are kept as they are, and written as torchao writes them."""
    from torchao.core.config import config_from_dict, config_to_dict
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, Int4WeightOnlyConfig, PerRow

    for given in (Int4WeightOnlyConfig(group_size=32), Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())):
        config = TorchAoConfig(given)
        assert config.quant_type is given
        written = config.to_dict()["quant_type"]["default"]
        assert written == config_to_dict(given)
        assert config_from_dict(written) == given
