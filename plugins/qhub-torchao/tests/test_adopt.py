"""Other methods' numbers in torchao's tensors: the same weights, read back from the entries of a file."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from qhub_torchao.adopt import adopt
from qhub_torchao.format import TorchAoFormat
from torch import Tensor

from qhub.errors import ConfigError
from qhub.layouts import Activation, Affine, Float8, Grid, Layout, Lookup
from qhub.layouts.translating import exact_weight, translate
from qhub.plan import Skip

SIZE: dict[str, Any] = {"out_features": 32, "in_features": 128}
ROWS_OF_INT8 = Activation(kind="int8", symmetric=False)
LAYOUTS: dict[str, Layout] = {
    "gptq": Affine(**SIZE, bits=4, grid=Grid.along_k(32), zero="value"),
    "gptq, 3 bits": Affine(**SIZE, bits=3, grid=Grid.along_k(64), zero="constant", zero_point=4.0),
    "8 bits, unsigned": Affine(**SIZE, bits=8, grid=Grid.along_k(128), zero="value"),
    "signed rows": Affine(**SIZE, bits=8, grid=Grid.along_k(128), signed=True),
    "rounded inputs": Affine(**SIZE, bits=4, grid=Grid.along_k(32), zero="value", activation=ROWS_OF_INT8),
    "flat runs": Affine(**SIZE, bits=2, grid=Grid("flat", 1, 192), zero="value"),
    "float8 rows": Float8(**SIZE, grid=Grid.along_k(128)),
    "float8 blocks": Float8(**SIZE, grid=Grid("block", 16, 64)),
    "float8 of one scale": Float8(**SIZE, format="e5m2", grid=Grid("block", 32, 128)),
    "float8, rounded inputs": Float8(**SIZE, grid=Grid.along_k(128), activation=Activation(kind="float8")),
}


def _parts(layout: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    scales = torch.rand(layout.scale_shape).add(0.5).half()
    if isinstance(layout, Float8):
        return {"qweight": torch.randn(32, 128).to(layout.dtype), "scales": scales}
    low, high = layout.code_range
    parts = {"qweight": layout.pack_codes(torch.randint(low, high + 1, (32, 128))), "scales": scales}
    if layout.zero == "value":
        parts["zeros"] = torch.randint(0, 2**layout.bits, layout.scale_shape, dtype=torch.uint8)
    return parts


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_same_weights_in_torchaos_entries(name: str) -> None:
    layout = LAYOUTS[name]
    parts = _parts(layout)
    adoption = adopt({"m.weight": layout}, [], {})
    target = adoption.layouts["m.weight"]
    assert not isinstance(target, Skip)
    assert target.activation == layout.activation
    fmt = TorchAoFormat(adoption.config)
    again, found = fmt.unpack(target, fmt.pack(target, translate(layout, parts, target), torch.float16))
    assert torch.equal(exact_weight(again, found), exact_weight(layout, parts))


def test_several_kinds_are_told_apart_by_name() -> None:
    adoption = adopt(
        {f"{number}.weight": layout for number, layout in enumerate(LAYOUTS.values())}, ["head.weight"], {}
    )
    assert adoption.config.to_dict()["quant_type"]["default"]["_type"] == "FqnToConfig"
    assert adoption.config.modules_to_not_convert == ["head"]
    assert not any(isinstance(one, Skip) for one in adoption.layouts.values())


def test_what_torchao_has_no_tensors_for() -> None:
    lookup = Lookup(**SIZE, bits=4, grid=Grid.along_k(64))
    (reason,) = adopt({"m.weight": lookup}, [], {}).layouts.values()
    assert isinstance(reason, Skip)
    assert "lookup" in reason.reason
    with pytest.raises(ConfigError, match="quant_type"):
        adopt({"m.weight": LAYOUTS["gptq"]}, [], {"quant_type": "int8_weight_only"})
