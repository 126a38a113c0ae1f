"""Matrices on top of each other, each on a layout of its own: fused projections that share neither tables nor groups.

Two AQLM matrices have their own codebooks, and a group of HQQ's axis 0 has members in every row: gate and up
projections of that kind cannot become one matrix of their layout, but they can stay what they are inside one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qhub.errors import LayoutError
from qhub.layouts.base import GridPolicy, Layout, Parts, PartSpec

__all__ = ["Stacked"]


@dataclass(frozen=True, kw_only=True)
class Stacked(Layout):
    """Stores ``bands``, matrices of equal ``in_features`` and activation scheme, from the top down.

    Parts: those of band i, transforms included, under ``{i}_{name}``.
    """

    kind: ClassVar[str] = "stacked"

    bands: tuple[Layout, ...]

    def __post_init__(self) -> None:
        rows = sum(band.out_features for band in self.bands)
        if rows != self.out_features or any(band.in_features != self.in_features for band in self.bands):
            sizes = ", ".join(f"{band.out_features}x{band.in_features}" for band in self.bands)
            raise LayoutError(f"matrices of {sizes} do not make up one of {self.out_features}x{self.in_features}")
        if self.transforms or any(band.activation != self.activation for band in self.bands):
            raise LayoutError("stacked matrices have transforms of their own and share one activation scheme")

    @staticmethod
    def of(layouts: Sequence[Layout], parts: Sequence[Parts]) -> tuple[Stacked, dict[str, Tensor]] | None:
        """Return layout and parts of the matrices on top of each other; None when they do not fit together."""
        bands: list[Layout] = []
        owned: list[Parts] = []
        if len({layout.batch_shape(own) for layout, own in zip(layouts, parts, strict=True)}) != 1:
            return None
        for layout, own in zip(layouts, parts, strict=True):
            inner = list(layout.each(own)) if isinstance(layout, Stacked) else [(layout, own)]
            bands += [band for band, _ in inner]
            owned += [part for _, part in inner]
        first = bands[0]
        if any((band.in_features, band.activation) != (first.in_features, first.activation) for band in bands):
            return None
        stacked = Stacked(
            out_features=sum(band.out_features for band in bands),
            in_features=first.in_features,
            activation=first.activation,
            bands=tuple(bands),
        )
        return stacked, _prefixed(owned)

    def each(self, parts: Parts) -> Iterator[tuple[Layout, dict[str, Tensor]]]:
        """Yield each band with the parts that are its own."""
        for index, band in enumerate(self.bands):
            yield band, {name: parts[f"{index}_{name}"] for name in band.part_specs()}

    def _placed(self, parts: Parts) -> Iterator[tuple[int, Layout, dict[str, Tensor]]]:
        top = 0
        for band, own in self.each(parts):
            yield top, band, own
            top += band.out_features

    def core_specs(self) -> dict[str, PartSpec]:
        return {f"{i}_{name}": spec for i, band in enumerate(self.bands) for name, spec in band.part_specs().items()}

    def part_specs(self) -> dict[str, PartSpec]:
        # What an activation scheme stores is stored with each band.
        return self.core_specs()

    def decode(self, parts: Parts) -> Tensor:
        return torch.cat([band.dequantize(own) for band, own in self.each(parts)], dim=-2)

    def check_values(self, parts: Parts) -> None:
        for band, own in self.each(parts):
            band.check_values(own)

    # -- writing -----------------------------------------------------------------------------------------------------

    def encode(self, weight: Tensor, parts: Parts, grid: GridPolicy = "best") -> dict[str, Tensor]:
        written = [
            band.requantize(weight[..., top : top + band.out_features, :], own, grid)
            for top, band, own in self._placed(parts)
        ]
        return _prefixed(written)

    def nearest(self, weight: Tensor, parts: Parts) -> dict[str, Tensor]:
        return self.encode(weight, parts, "keep")

    def fit(self, weight: Tensor, parts: Parts) -> dict[str, Tensor]:
        return self.encode(weight, parts, "refit")

    # -- rows --------------------------------------------------------------------------------------------------------

    def select_rows(self, parts: Parts, start: int, stop: int) -> tuple[Layout, dict[str, Tensor]] | None:
        layouts: list[Layout] = []
        found: list[Parts] = []
        for top, band, own in self._placed(parts):
            first, last = max(start - top, 0), min(stop - top, band.out_features)
            if first >= last:
                continue
            whole = (first, last) == (0, band.out_features)
            cut = (band, own) if whole else band.select_rows(own, first, last)
            if cut is None:
                return None
            layouts.append(cut[0])
            found.append(cut[1])
        return (layouts[0], dict(found[0])) if len(layouts) == 1 else Stacked.of(layouts, found)

    def row_parts(self, parts: Parts, start: int, stop: int) -> dict[str, Tensor] | None:
        # select_rows and concat_rows are written anew above and below: rows of bands are not parts of one layout.
        return None

    def stacked_rows(self, parts: Sequence[Parts], layouts: Sequence[Layout]) -> dict[str, Tensor] | None:
        return None

    def concat_rows(self, parts: Sequence[Parts], layouts: Sequence[Layout]) -> tuple[Layout, dict[str, Tensor]] | None:
        return Stacked.of(layouts, parts)

    def with_rows(self, out_features: int) -> Layout:
        last = self.bands[-1]
        last = last.with_rows(last.out_features + out_features - self.out_features)
        return dataclasses.replace(self, out_features=out_features, bands=(*self.bands[:-1], last))


def _prefixed(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{index}_{name}": part for index, own in enumerate(parts) for name, part in own.items()}
