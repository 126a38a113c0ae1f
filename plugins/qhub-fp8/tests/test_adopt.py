"""Other methods' 8-bit floats become fp8's: the same weights, in a file that holds them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from qhub_fp8.format import Fp8Format
from qhub_fp8.plan import adopt
from qhub_fp8.settings import settings_of

from qhub.errors import ConfigError
from qhub.layouts import Activation, Affine, Float8, Grid
from qhub.layouts.translating import exact_weight, translate
from qhub.plan import Skip

ROWS = Activation(kind="float8")
STATIC = Activation(kind="float8", granularity="tensor", static=True)


def source(n, k, rows, cols, activation=ROWS, dtype=torch.float32, codes="e4m3fn"):
    layout = Float8(out_features=n, in_features=k, format=codes, grid=Grid("block", rows, cols), activation=activation)
    generator = torch.Generator().manual_seed(0)
    parts = {
        "qweight": torch.randn(n, k, generator=generator).to(layout.dtype),
        "scales": (torch.rand(layout.scale_shape, generator=generator) + 0.5).to(dtype),
    }
    if activation.static:
        parts["input_scale"] = torch.tensor(0.125)
    return layout, parts


@pytest.mark.parametrize(
    ("grids", "block", "scheme"),
    [
        ([(24, 40, STATIC), (24, 40, STATIC)], None, "static"),
        ([(1, 40, ROWS), (1, 40, ROWS)], None, "dynamic"),
        ([(8, 8, ROWS), (24, 40, ROWS)], [8, 8], "dynamic"),
        ([(16, 16, Activation()), (8, 32, Activation())], [8, 16], "none"),
        ([(1, 40, ROWS), (24, 40, ROWS)], [1, 128], "dynamic"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_are_the_same(grids, block, scheme, dtype):
    sources = {f"{i}.weight": source(24, 40, r, c, a, dtype) for i, (r, c, a) in enumerate(grids)}
    adoption = adopt({name: layout for name, (layout, _) in sources.items()}, ["lm_head.weight"], {})
    assert adoption.config.modules_to_not_convert == ["lm_head"]
    settings = settings_of(adoption.config)
    assert adoption.config.weight_block_size == block
    assert settings.scheme == scheme
    fmt = Fp8Format(settings)
    for name, (layout, parts) in sources.items():
        target = adoption.layouts[name]
        made = translate(layout, parts, target)
        entries = fmt.pack(target, made, torch.float32)
        assert entries["weight_scale_inv"].dtype == torch.float32
        read, again = fmt.unpack(settings.layout(24, 40), entries)
        assert torch.equal(exact_weight(read, again), exact_weight(layout, parts))
        assert read.activation.scheme == target.activation.scheme


def test_what_fp8_files_cannot_hold_is_said():
    layout, _ = source(24, 40, 24, 40)
    fnuz = dataclasses.replace(layout, format="e4m3fnuz")
    other = Affine(out_features=24, in_features=40, bits=4, grid=Grid.along_k(40))
    adoption = adopt({"a": layout, "b": fnuz, "c": other}, [], {})
    assert adoption.config.modules_to_not_convert == ["c"]
    assert isinstance(adoption.layouts["a"], Float8)
    assert isinstance(adoption.layouts["b"], Skip) and "e4m3fnuz" in adoption.layouts["b"].reason
    assert isinstance(adoption.layouts["c"], Skip) and "affine" in adoption.layouts["c"].reason
    with pytest.raises(ConfigError, match="none of these weights"):
        adopt({"c": other}, [], {})


def test_what_the_user_asks_for_wins():
    layout, parts = source(24, 40, 24, 40, codes="e5m2")
    adoption = adopt({"a": layout}, [], {"weight_block_size": [8, 16], "activation_scheme": "none"})
    assert (adoption.config.weight_block_size, adoption.config.fmt) == ([8, 16], "e5m2")
    made = translate(layout, parts, adoption.layouts["a"])
    assert made["scales"].shape == (3, 3)
