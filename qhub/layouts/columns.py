"""Rounds single columns of a matrix to a given grid: for layouts in which every weight has a code of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["CastColumns", "Columns", "TableColumns", "UniformColumns"]


class Columns(Protocol):
    """Rounds columns of the stored matrix (transforms taken off) under the scales that it has."""

    def nearest(self, column: int, values: Tensor) -> Tensor:
        """Return what the codes nearest to ``values`` (N,) float32 stand for in column ``column``."""
        ...


@dataclass(frozen=True)
class UniformColumns:
    """Rounds to ``scale * (q - zero)`` with whole ``low`` <= q <= ``high``; ``scale``, ``zero``: (K, N) float32."""

    scale: Tensor
    zero: Tensor | float
    low: float
    high: float

    def nearest(self, column: int, values: Tensor) -> Tensor:
        scale = self.scale[column]
        zero = self.zero[column] if isinstance(self.zero, Tensor) else self.zero
        q = (values / scale + zero).round_().clamp_(self.low, self.high)
        # A scale of 0 leaves one value, and the quotient is NaN or infinite.
        return torch.where(scale == 0, torch.zeros_like(q), (q - zero) * scale)


@dataclass(frozen=True)
class TableColumns:
    """Rounds to ``scale * table[q]``; ``scale``: (K, N) float32, ``table``: (codes,) float32, sorted."""

    scale: Tensor
    table: Tensor

    def nearest(self, column: int, values: Tensor) -> Tensor:
        scale, table = self.scale[column], self.table
        ratio = values / torch.where(scale == 0, torch.ones_like(scale), scale)
        return table[torch.bucketize(ratio, (table[1:] + table[:-1]) / 2, out_int32=True)] * scale


@dataclass(frozen=True)
class CastColumns:
    """Rounds to ``scale * x`` with x of the float ``dtype``; ``scale``: (K, N) float32."""

    scale: Tensor
    dtype: torch.dtype

    def nearest(self, column: int, values: Tensor) -> Tensor:
        scale, limit = self.scale[column], torch.finfo(self.dtype).max
        ratio = (values / torch.where(scale == 0, torch.ones_like(scale), scale)).clamp_(-limit, limit)
        return ratio.to(self.dtype).float() * scale
