"""``w = scale * float8``: E4M3 and E5M2 weights under one scale per tensor, per row or per block. FP8, INC, fbgemm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from qhub.errors import LayoutError
from qhub.layouts import rows
from qhub.layouts.base import Layout, Parts, PartSpec
from qhub.layouts.columns import CastColumns
from qhub.layouts.grid import Grid
from qhub.layouts.nested import SCALES, Nested, scale_codes

__all__ = ["Float8"]


@dataclass(frozen=True, kw_only=True)
class Float8(Layout):
    """Stores 8-bit floats with a scale per group that multiplies them.

    Parts: ``qweight`` (N, K) of ``torch.float8_{format}``; ``scales`` of ``grid.scale_shape``, above zero, floats or
    powers of two in E8M0.
    """

    kind: ClassVar[str] = "float8"

    format: Literal["e4m3fn", "e5m2", "e4m3fnuz", "e5m2fnuz"] = "e4m3fn"
    grid: Grid

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the codes."""
        return getattr(torch, f"float8_{self.format}")

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """Return the shape of the scales of one matrix."""
        return self.grid.scale_shape(self.out_features, self.in_features)

    def scale_tensors(self) -> dict[str, Nested | None]:
        return {"scales": None}

    def core_specs(self) -> dict[str, PartSpec]:
        return {
            "qweight": PartSpec((self.out_features, self.in_features), (self.dtype,)),
            "scales": PartSpec(self.scale_shape, SCALES),
        }

    def check_values(self, parts: Parts) -> None:
        super().check_values(parts)
        scales = parts["scales"]
        if scales.device.type != "meta" and bool((scales.float() <= 0).any()):
            raise LayoutError(f"tensor 'scales' holds {float(scales.float().min())}: a scale is above zero")

    def decode(self, parts: Parts) -> Tensor:
        w = self.grid.split(parts["qweight"].float()) * self.grid.spread(parts["scales"].float())
        return self.grid.join(w, self.out_features, self.in_features)

    def nearest(self, weight: Tensor, parts: Parts) -> dict[str, Tensor]:
        scale = self.grid.spread(parts["scales"].float())
        ratio = self.grid.split(weight.float()) / torch.where(scale == 0, torch.ones_like(scale), scale)
        limit = torch.finfo(self.dtype).max
        ratio = self.grid.join(ratio.clamp(-limit, limit), self.out_features, self.in_features)
        return {"qweight": ratio.contiguous().to(self.dtype)}

    def fit(self, weight: Tensor, parts: Parts) -> dict[str, Tensor]:
        # The largest magnitude of each group goes to the format's.
        absmax = self.grid.split(weight.float()).abs().amax(self.grid.member_dims)
        scale = (absmax / torch.finfo(self.dtype).max).clamp_min(1e-12)
        fitted = scale_codes("scales", scale, None, parts)
        return fitted | self.nearest(weight, {**parts, **fitted})

    def columns(self, parts: Parts) -> CastColumns:
        scale = self.grid.expand(parts["scales"].float(), self.out_features, self.in_features)
        return CastColumns(scale.t().contiguous(), self.dtype)

    def row_parts(self, parts: Parts, start: int, stop: int) -> dict[str, Tensor] | None:
        scales = rows.cut_scales(self, self.grid, self.scale_tensors(), parts, start, stop)
        return None if scales is None else {"qweight": parts["qweight"][..., start:stop, :], **scales}

    def stacked_rows(self, parts: Sequence[Parts], layouts: Sequence[Layout]) -> dict[str, Tensor] | None:
        scales = rows.stack_scales(self, self.grid, self.scale_tensors(), parts, layouts)
        if scales is None:
            return None
        return {"qweight": torch.cat([p["qweight"] for p in parts], dim=-2), **scales}
