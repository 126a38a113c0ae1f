"""Rounds a matrix to a given grid column by column, or as many columns at a time as share codes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["BlockColumns", "CastColumns", "Columns", "TableColumns", "UniformColumns"]


class Columns(Protocol):
    """Rounds columns of the stored matrix (transforms taken off) under the scales that it has.

    ``width``: how many columns are rounded together; it divides K.
    """

    @property
    def width(self) -> int: ...

    def nearest(self, column: int, values: Tensor) -> Tensor:
        """Return what the codes nearest to ``values`` stand for in columns from ``column`` on, each visited once.

        ``values``: float32, (N,) where the width is 1, else (width, N); so is what is returned.
        """
        ...


@dataclass(frozen=True)
class UniformColumns:
    """Rounds to ``scale * (q - zero)`` with whole ``low`` <= q <= ``high``; ``scale``, ``zero``: (K, N) float32."""

    scale: Tensor
    zero: Tensor | float
    low: float
    high: float
    width: int = 1

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
    width: int = 1

    def nearest(self, column: int, values: Tensor) -> Tensor:
        scale, table = self.scale[column], self.table
        ratio = values / torch.where(scale == 0, torch.ones_like(scale), scale)
        return table[torch.bucketize(ratio, (table[1:] + table[:-1]) / 2, out_int32=True)] * scale


@dataclass(frozen=True)
class CastColumns:
    """Rounds to ``scale * x`` with x of the float ``dtype``; ``scale``: (K, N) float32."""

    scale: Tensor
    dtype: torch.dtype
    width: int = 1

    def nearest(self, column: int, values: Tensor) -> Tensor:
        scale, limit = self.scale[column], torch.finfo(self.dtype).max
        ratio = (values / torch.where(scale == 0, torch.ones_like(scale), scale)).clamp_(-limit, limit)
        return ratio.to(self.dtype).float() * scale


class BlockColumns:
    """Rounds columns that share codes, and remembers the codes, which the values alone would not tell again.

    ``search``: takes the first column and values (N, width), and gives the parts that these columns have then, codes
    on their block axis, and what they stand for, (N, width).
    """

    def __init__(self, width: int, search: Callable[[int, Tensor], tuple[dict[str, Tensor], Tensor]]) -> None:
        self.width = width
        self.found: dict[int, dict[str, Tensor]] = {}
        self._search = search

    def nearest(self, column: int, values: Tensor) -> Tensor:
        self.found[column], stand_for = self._search(column, values.t().contiguous())
        return stand_for.t()
