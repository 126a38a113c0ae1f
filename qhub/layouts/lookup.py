"""``w = scale * table[q]``: codes into a small table of values under block scales. NF4, FP4, IQ4_NL, MXFP4, NVFP4."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qhub.errors import LayoutError
from qhub.layouts import rows
from qhub.layouts.base import Layout, Parts, PartSpec
from qhub.layouts.columns import TableColumns
from qhub.layouts.grid import Grid
from qhub.layouts.nested import SCALES, Nested, scale_codes, scale_specs, scale_values
from qhub.layouts.packing import pack, packed_length, unpack

__all__ = ["Lookup"]


@dataclass(frozen=True, kw_only=True)
class Lookup(Layout):
    """Stores codes of ``bits`` bits into a table, with a scale per group.

    Parts: ``qweight`` (N, packed_length(K)) uint8; ``table`` (2**bits,) float32, in any order, shared by a batch;
    ``scales`` of ``grid.scale_shape``, plain (powers of two in E8M0 among them) or nested.
    """

    kind: ClassVar[str] = "lookup"

    bits: int = 4
    grid: Grid
    scales_nested: Nested | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise LayoutError(f"a lookup layout holds 1 to 8 bits, asked for {self.bits}")

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """Return the shape of the scales of one matrix."""
        return self.grid.scale_shape(self.out_features, self.in_features)

    def scale_tensors(self) -> dict[str, Nested | None]:
        return {"scales": self.scales_nested}

    def core_specs(self) -> dict[str, PartSpec]:
        return {
            "qweight": PartSpec((self.out_features, packed_length(self.in_features, self.bits)), (torch.uint8,)),
            "table": PartSpec((2**self.bits,), (torch.float32,), batched=False),
            **scale_specs("scales", self.scale_shape, self.scales_nested, SCALES),
        }

    def codes(self, parts: Parts) -> Tensor:
        """Return the codes (..., N, K) uint8."""
        return unpack(parts["qweight"], self.bits, self.in_features)

    def scales(self, parts: Parts) -> Tensor:
        """Return the scales (..., *scale_shape) in float32."""
        return scale_values("scales", self.scale_shape, self.scales_nested, parts).float()

    def decode(self, parts: Parts) -> Tensor:
        values = parts["table"][self.codes(parts).to(torch.int32)]
        w = self.grid.split(values) * self.grid.spread(self.scales(parts))
        return self.grid.join(w, self.out_features, self.in_features)

    def nearest(self, weight: Tensor, parts: Parts) -> dict[str, Tensor]:
        scale = self.grid.spread(self.scales(parts))
        ratio = self.grid.split(weight.float()) / torch.where(scale == 0, torch.ones_like(scale), scale)
        table, order = torch.sort(parts["table"])
        place = torch.bucketize(ratio.contiguous(), (table[1:] + table[:-1]) / 2, out_int32=True)
        q = self.grid.join(order.to(torch.uint8)[place], self.out_features, self.in_features)
        return {"qweight": pack(q, self.bits)}

    def fit(self, weight: Tensor, parts: Parts) -> dict[str, Tensor]:
        # The largest magnitude of each group goes to the table's.
        absmax = self.grid.split(weight.float()).abs().amax(self.grid.member_dims)
        scale = (absmax / parts["table"].abs().max()).clamp_min(1e-12)
        fitted = scale_codes("scales", scale, self.scales_nested, parts)
        return fitted | self.nearest(weight, {**parts, **fitted})

    def columns(self, parts: Parts) -> TableColumns:
        scale = self.grid.expand(self.scales(parts), self.out_features, self.in_features)
        return TableColumns(scale.t().contiguous(), parts["table"].sort().values)

    def row_parts(self, parts: Parts, start: int, stop: int) -> dict[str, Tensor] | None:
        scales = rows.cut_scales(self, self.grid, self.scale_tensors(), parts, start, stop)
        if scales is None:
            return None
        return {"qweight": parts["qweight"][..., start:stop, :], "table": parts["table"], **scales}

    def take_rows(self, parts: Parts, index: Tensor) -> tuple[Layout, dict[str, Tensor]] | None:
        return rows.taken_rows(self, self.grid, self.scale_tensors(), "qweight", parts, index)

    def stacked_rows(self, parts: Sequence[Parts], layouts: Sequence[Layout]) -> dict[str, Tensor] | None:
        scales = rows.stack_scales(self, self.grid, self.scale_tensors(), parts, layouts)
        if scales is None or not rows.identical([p["table"] for p in parts]):
            return None
        return {"qweight": torch.cat([p["qweight"] for p in parts], dim=-2), "table": parts[0]["table"], **scales}
