"""The value tables: NF4 and FP4 for weights, the 8-bit dynamic map for nested scales."""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch
from torch import Tensor

__all__ = ["QUANT_TYPES", "QuantType", "dynamic_map", "quant_type_of", "value_table"]

QuantType = Literal["nf4", "fp4"]
QUANT_TYPES: tuple[QuantType, ...] = ("nf4", "fp4")

# QLoRA (Dettmers et al. 2023), appendix E: quantiles of N(0, 1), scaled to [-1, 1], with an exact zero.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# bitsandbytes functional.py, get_4bit_type("fp4"): sign, two exponent bits, one mantissa bit, listed by bit pattern.
_FP4_MAGNITUDES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)


@cache
def value_table(quant_type: QuantType) -> Tensor:
    """Return the values of ``"nf4"`` or ``"fp4"`` by code: (16,) float32 on the CPU, the largest magnitude 1.

    All callers share the tensor: copy it before writing.
    """
    # The device is named because transformers builds models with the meta device as the default.
    if quant_type == "nf4":
        return torch.tensor(_NF4, dtype=torch.float32, device="cpu")
    magnitudes = torch.tensor(_FP4_MAGNITUDES, dtype=torch.float32, device="cpu") / max(_FP4_MAGNITUDES)
    # 0.0 - x keeps the zero of the negative half positive, as upstream's table has it.
    return torch.cat([magnitudes, 0.0 - magnitudes])


def quant_type_of(table: Tensor) -> QuantType | None:
    """Return which of the two types ``table`` (16,) float32 holds, up to 1e-6; None for any other table."""
    for quant_type in QUANT_TYPES:
        if torch.allclose(table.detach().cpu(), value_table(quant_type), rtol=0.0, atol=1e-6):
            return quant_type
    return None


@cache
def dynamic_map() -> Tensor:
    """Return the signed 8-bit dynamic map: (256,) float32 on the CPU, sorted, from -0.993 to 1.

    For each exponent e in 0 .. 6, the middles of 2**e equal parts of [0.1, 1], times 10**(e - 6), with both signs;
    and 0 and 1. All callers share the tensor: copy it before writing. Source: 8-Bit Approximations for Parallelism
    in Deep Learning (Dettmers 2015), section 3; bitsandbytes functional.py, create_dynamic_map.
    """
    magnitudes = []
    for exponent in range(7):
        edges = _equal_parts(2**exponent)
        magnitudes.append(10.0 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2.0))
    positive = torch.cat(magnitudes)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float32, device="cpu")
    return torch.cat([-positive, positive, ends]).sort().values


def _equal_parts(count: int) -> Tensor:
    """Return the ends of ``count`` equal parts of [0.1, 1]: (count + 1,) float32, the same on every CPU.

    Upstream calls ``torch.linspace``, which counts from both ends and rounds once per value where the CPU has fused
    multiply-add, twice where not; here always once, as on any x86 since 2013.
    """
    low = float(torch.tensor(0.1, dtype=torch.float32, device="cpu"))
    step = float(torch.tensor((1.0 - low) / count, dtype=torch.float32, device="cpu"))
    index = torch.arange(count + 1, dtype=torch.float64, device="cpu")
    edges = torch.where(index < (count + 1) // 2, low + step * index, 1.0 - step * (count - index))
    return edges.to(torch.float32)
