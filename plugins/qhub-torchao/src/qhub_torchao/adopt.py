"""What another method's numbers become in a torchao checkpoint: intx weights with whole zeros, or float8."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from qhub.errors import ConfigError
from qhub.layouts import Activation, Affine, Float8, Grid, Layout
from qhub.plan import Adoption, LayerPlan, Skip, WeightInfo
from qhub_torchao.config import spec
from qhub_torchao.plan import plan
from qhub_torchao.words import group, named, per_row, per_tensor

__all__ = ["adopt"]


def adopt(layouts: Mapping[str, Layout], others: Sequence[str], options: Mapping[str, Any]) -> Adoption:
    """Return a config for all of ``layouts``: one for every weight where one does, else a FqnToConfig by module.

    Integers become ``IntxUnpackedToInt8Tensor``, which has codes of 1 to 8 bits, scales of any float dtype and whole
    zeros; float8 weights stay that. ``others``: weights that stay dense. ``options``: config values besides
    ``quant_type``.
    """
    if "quant_type" in options:
        raise ConfigError("quant_type follows from the numbers that are converted: leave it out")
    found: dict[str, dict[str, Any]] = {}
    adopted: dict[str, Layout | Skip] = {}
    for name, layout in layouts.items():
        made = _config(layout)
        if isinstance(made, Skip):
            adopted[name] = made
        else:
            found[name.removesuffix(".weight")] = made
    kinds = list(found.values())
    if kinds and all(one == kinds[0] for one in kinds):
        quant_type = kinds[0]
    else:
        quant_type = named("FqnToConfig", {"fqn_to_config": found})
    if not kinds:
        return Adoption(None, adopted)
    values = {"modules_to_not_convert": [name.removesuffix(".weight") for name in others] or None, **options}
    config = spec().parse({"quant_method": "torchao", "quant_type": {"default": quant_type}, **values})
    infos = [
        WeightInfo(name, layout.out_features, layout.in_features, torch.bfloat16)
        for name, layout in layouts.items()
        if name not in adopted
    ]
    for name, planned in plan(config, infos).items():
        if isinstance(planned, Skip):
            adopted[name] = planned
            continue
        made_layout = planned.layout if isinstance(planned, LayerPlan) else planned
        adopted[name] = dataclasses.replace(made_layout, transforms=_kept(layouts[name]))
    return Adoption(config, adopted)


def _kept(layout: Layout) -> Any:
    """Return the transforms that are tried: input scales have a place in torchao's float8 tensors, others have none."""
    return tuple(t for t in layout.transforms if (t.kind, t.side) == ("scale", "in") and isinstance(layout, Float8))


def _config(layout: Layout) -> dict[str, Any] | Skip:
    """Return the config that holds ``layout``, as JSON, or why there is none."""
    if isinstance(layout, Affine):
        return _integers(layout)
    if isinstance(layout, Float8):
        return _float8(layout)
    return Skip(f"its numbers are {layout.kind}, torchao's files hold integers under scales and float8")


def _integers(layout: Affine) -> dict[str, Any] | Skip:
    size = _along_k(layout.grid, layout.in_features)
    if size < 2:
        return Skip(f"its scales do not stay the same along a row ({layout.grid.kind} groups)")
    middle = layout.zero == "constant" and layout.zero_point == (0 if layout.signed else 2 ** (layout.bits - 1))
    data = {
        "weight_dtype": named("torch.dtype", f"int{layout.bits}", None),
        "mapping_type": named("MappingType", "SYMMETRIC" if middle else "ASYMMETRIC", None),
        "granularity": group(size) if size < layout.in_features else named("PerAxis", {"axis": 0}),
    }
    if layout.activation != Activation(kind="int8", symmetric=False):
        return named("IntxWeightOnlyConfig", data, 2)
    renamed = {"weight_mapping_type": data.pop("mapping_type"), "weight_granularity": data.pop("granularity")}
    return named("Int8DynamicActivationIntxWeightConfig", {**data, **renamed}, 2)


def _along_k(grid: Grid, in_features: int) -> int:
    """Return how many neighbours along K share a scale in groups that fill a row; 0 where none do."""
    if grid.kind == "block":
        return min(grid.cols, in_features) if in_features % min(grid.cols, in_features) == 0 else 0
    return math.gcd(grid.cols, in_features) if grid.kind == "flat" else 0


def _float8(layout: Float8) -> dict[str, Any] | Skip:
    if layout.format not in ("e4m3fn", "e5m2"):
        return Skip(f"its codes are {layout.format}, torchao's are e4m3fn and e5m2")
    n, k, grid = layout.out_features, layout.in_features, layout.grid
    dtype = named("torch.dtype", f"float8_{layout.format}", None)
    rows, cols = min(grid.rows, n), min(grid.cols, k)
    if grid.kind != "block" or n % rows or k % cols:
        return Skip(f"its scales are those of {grid.kind} groups that do not divide {n}x{k} weights")
    whole, row = (rows, cols) == (n, k), rows == 1 and cols == k
    rounds = layout.activation
    if rounds.kind == "float8" and (whole or row) and rounds.format in ("e4m3fn", "e5m2"):
        wanted: Literal["tensor", "row"] = "tensor" if whole else "row"
        usual = Activation(kind="float8", granularity=wanted, format=rounds.format)
        if rounds == usual and n % 16 == 0 and k % 16 == 0:
            grain = per_tensor() if whole else per_row()
            data = {
                "weight_dtype": dtype,
                "activation_dtype": named("torch.dtype", f"float8_{rounds.format}", None),
                "granularity": [grain, grain],
            }
            return named("Float8DynamicActivationFloat8WeightConfig", data, 2)
    # A scale for many rows is the same scale for each: groups along K, or whole rows.
    grain = per_tensor() if whole else per_row() if cols == k else group(cols)
    return named("Float8WeightOnlyConfig", {"weight_dtype": dtype, "granularity": grain}, 2)
