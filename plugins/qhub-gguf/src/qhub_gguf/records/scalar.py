"""Records whose weights each have a code of their own: whole numbers in a row, or entries of a small table."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from qhub.errors import UnsupportedError
from qhub.layouts import Layout, Parts
from qhub.layouts.nested import Nested
from qhub_gguf.records.base import GgmlRecord
from qhub_gguf.records.fields import join, spread
from qhub_gguf.records.plain import from_plain, to_plain

__all__ = ["Plane", "ScalarRecord", "TableRecord", "halfway", "table_values"]


class Plane(NamedTuple):
    """Says that bytes [start, stop) hold ``bits`` bits of every code, from bit ``shift`` on, in runs of ``run``."""

    start: int
    stop: int
    bits: int
    run: int
    shift: int = 0


class ScalarRecord(GgmlRecord):
    """Stores whole numbers ``low`` to ``high`` as codes of ``bits`` bits from 0 on; two's complement where these are 8.

    ``planes``: where the bits of the codes are. ``nested``: how the core says the steps, ``scales``, and the offsets,
    ``zeros``; empty where they are plain tensors. ``table``: what the codes stand for, if not whole numbers in a row;
    ``table_unit``: what the core's table of them is divided by. ``free_steps``: whether :meth:`put_steps` can be asked.
    """

    low: int
    high: int
    bits: int
    planes: tuple[Plane, ...]
    nested: Mapping[str, Nested] = MappingProxyType({})
    table: tuple[int, ...] = ()
    table_unit = 1
    free_steps = True

    @abstractmethod
    def plain_scales(self, data: Tensor) -> dict[str, Tensor]:
        """Return the core's parts of the scales for ``data`` (..., N, K/count, size), in the order of the records."""

    @abstractmethod
    def put_plain_scales(self, data: Tensor, parts: Mapping[str, Tensor]) -> None:
        """Write parts (..., N, K/count, any) as :meth:`plain_scales` gives them into ``data``."""

    def put_steps(self, data: Tensor, steps: Tensor, offsets: Tensor | None) -> None:
        """Write steps and offsets (..., count/group), rounded to what can be stored, into ``data`` (..., size).

        Raises :class:`UnsupportedError` where whole numbers of steps have to be searched first.
        """
        raise UnsupportedError(f"{self.name} stores no free steps: use fit")

    def plain(self, out_features: int, in_features: int, blocks: Tensor) -> tuple[Layout, dict[str, Tensor]]:
        return to_plain(self, out_features, in_features, blocks)

    def from_plain(self, layout: Layout, parts: Parts) -> Tensor | None:
        return from_plain(self, layout, parts)

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
        return codes if self.low == 0 or self.bits == 8 else codes + self.low

    def rounded(self, ratio: Tensor) -> Tensor:
        """Return the values int8 nearest to ``ratio`` float32, in any order."""
        return ratio.round().clamp_(self.low, self.high).to(torch.int8)

    def find(self, ratio: Tensor) -> Tensor:
        return self.rounded(ratio)

    def worth(self, found: Tensor) -> Tensor:
        return found

    def put(self, data: Tensor, found: Tensor) -> None:
        values = found.to(torch.int8)
        self.put_codes(data, (values if self.bits == 8 else values - self.low).view(torch.uint8))


class TableRecord(ScalarRecord):
    """Stores codes into ``table``, whole numbers from -127 to 127 in any order."""

    def values(self, data: Tensor) -> Tensor:
        codes = self.codes(data)
        table = table_values(self.table, data.device)
        return table.index_select(0, codes.flatten().int()).reshape(codes.shape)

    def rounded(self, ratio: Tensor) -> Tensor:
        nearest, _ = halfway(self.table, ratio.device)
        place = (ratio * 2).floor_().clamp_(-256, 255).add_(256).to(torch.int32)
        return nearest.index_select(0, place.flatten()).reshape(ratio.shape)

    def put(self, data: Tensor, found: Tensor) -> None:
        _, codes = halfway(self.table, data.device)
        values, place = found, found.to(torch.int32).flatten() * 2 + 256
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
