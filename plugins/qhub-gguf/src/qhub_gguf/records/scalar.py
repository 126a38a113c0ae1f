"""Records whose weights each have a code of their own: whole numbers in a row, or entries of a small table."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from qhub_gguf.records.base import GgmlRecord
from qhub_gguf.records.fields import join, spread

__all__ = ["Plane", "ScalarRecord", "TableRecord", "halfway", "table_values"]


class Plane(NamedTuple):
    """Says that bytes [start, stop) hold ``bits`` bits of every code, from bit ``shift`` on, in runs of ``run``."""

    start: int
    stop: int
    bits: int
    run: int
    shift: int = 0


class ScalarRecord(GgmlRecord):
    """Stores whole numbers ``low`` to ``high`` as codes from 0 on.

    ``planes``: where the bits of the codes are.
    """

    low: int
    high: int
    planes: tuple[Plane, ...]

    def codes(self, data: Tensor) -> Tensor:
        """Return the codes (..., count) uint8 of ``data`` (..., size)."""
        first, *others = self.planes
        codes = spread(data[..., first.start : first.stop], first.bits, first.run)
        for plane in others:
            codes = codes | spread(data[..., plane.start : plane.stop], plane.bits, plane.run) << plane.shift
        return codes

    def put_codes(self, data: Tensor, codes: Tensor) -> None:
        """Write ``codes`` (..., count) uint8 into ``data`` (..., size)."""
        for plane in self.planes:
            part = codes >> plane.shift & 2**plane.bits - 1
            data[..., plane.start : plane.stop] = join(part, plane.bits, plane.run)

    def values(self, data: Tensor) -> Tensor:
        codes = self.codes(data).view(torch.int8)
        return codes + self.low if self.low else codes

    def rounded(self, ratio: Tensor) -> Tensor:
        return ratio.round().clamp_(self.low, self.high).to(torch.int8)

    def put(self, data: Tensor, values: Tensor) -> None:
        self.put_codes(data, (values - self.low).view(torch.uint8))


class TableRecord(ScalarRecord):
    """Stores codes into ``table``, whole numbers from -127 to 127 in any order."""

    table: tuple[int, ...]

    def values(self, data: Tensor) -> Tensor:
        codes = self.codes(data)
        table = table_values(self.table, data.device)
        return table.index_select(0, codes.flatten().int()).reshape(codes.shape)

    def rounded(self, ratio: Tensor) -> Tensor:
        nearest, _ = halfway(self.table, ratio.device)
        place = (ratio * 2).floor_().clamp_(-256, 255).add_(256).to(torch.int32)
        return nearest.index_select(0, place.flatten()).reshape(ratio.shape)

    def put(self, data: Tensor, values: Tensor) -> None:
        _, codes = halfway(self.table, data.device)
        place = values.to(torch.int32).flatten() * 2 + 256
        self.put_codes(data, codes.index_select(0, place).reshape(values.shape))


@functools.lru_cache(maxsize=64)
def table_values(table: tuple[int, ...], device: torch.device) -> Tensor:
    """Return ``table`` as int8."""
    return torch.tensor(table, dtype=torch.int8, device=device)


@functools.lru_cache(maxsize=64)
def halfway(table: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return for each step of a half from -128 on the nearest entry of ``table``, as value int8 and as code uint8.

    Entry i is for ratios from (i - 256) / 2 to (i - 255) / 2. The middle between two whole numbers is a multiple of a
    half, so no such stretch has entries of two kinds.
    """
    values = torch.tensor(table, dtype=torch.float64)
    middles = (torch.arange(512, dtype=torch.float64) - 256) / 2 + 0.25
    # Of equal values (0 and -0 in E2M1) the first code.
    codes = (middles[:, None] - values).abs().argmin(1)
    return values[codes].to(torch.int8).to(device), codes.to(torch.uint8).to(device)
