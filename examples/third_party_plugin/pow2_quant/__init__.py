"""Weights as signed powers of two under one scale per group: a complete quantization method in one file."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from qhub import ConfigSpec, MethodConfig, hookimpl
from qhub.errors import ConfigError
from qhub.formats import Entry, Format
from qhub.layouts import Grid, Lookup
from qhub.plan import LayerPlan

# Code 0 to 7: +2^0 ... +2^-7; code 8 to 15: the same, negative.
TABLE = torch.tensor([sign * 2.0**-exponent for sign in (1, -1) for exponent in range(8)])


@dataclass
class Pow2Config(MethodConfig):
    quant_method: ClassVar[str] = "pow2"
    group_size: int = 32

    def __post_init__(self) -> None:
        if not isinstance(self.group_size, int) or self.group_size < 1:
            raise ConfigError(f"pow2: group_size must be a positive whole number, got {self.group_size!r}")


class Pow2Format(Format):
    """`X.pow2_codes` (N, K/2) uint8, two codes a byte; `X.pow2_scales` (N, K/group)."""

    markers = frozenset({"pow2_codes"})
    names = frozenset({"pow2_codes", "pow2_scales"})

    def entries(self, layout):
        specs = layout.part_specs()
        return {
            "pow2_codes": Entry(specs["qweight"].shape, (torch.uint8,)),
            "pow2_scales": Entry(specs["scales"].shape, specs["scales"].dtypes),
        }

    def pack(self, layout, parts, dtype):
        return {"pow2_codes": parts["qweight"], "pow2_scales": parts["scales"]}

    def unpack(self, layout, entries):
        table = TABLE.to(entries["pow2_codes"].device)
        return layout, {"qweight": entries["pow2_codes"], "scales": entries["pow2_scales"], "table": table}


@hookimpl
def qhub_config():
    return ConfigSpec(cls=Pow2Config, skip="modules_to_not_convert")


@hookimpl
def qhub_plan(config, weights):
    plan = {}
    for weight in weights:
        if weight.in_features % config.group_size:
            raise ConfigError(
                f"pow2: group_size {config.group_size} does not divide {weight.in_features} ({weight.name})"
            )
        grid = Grid.along_k(config.group_size)
        plan[weight.name] = LayerPlan(
            Lookup(out_features=weight.out_features, in_features=weight.in_features, grid=grid)
        )
    return plan


@hookimpl
def qhub_quantize(config, weight, layout):
    specs = layout.part_specs()
    empty = {name: torch.zeros(spec.shape, dtype=spec.dtypes[0], device=weight.device) for name, spec in specs.items()}
    return layout.encode(weight.float(), {**empty, "table": TABLE.to(weight.device)}, grid="refit")


@hookimpl
def qhub_format(config):
    return Pow2Format()
