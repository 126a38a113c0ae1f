"""``w = scale * (q - zero)``: integers of 1 to 8 bits under scales. GPTQ, AWQ, HQQ, EETQ, LLM.int8(), Q4_K and kin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from qhub.errors import LayoutError
from qhub.layouts import rows
from qhub.layouts.base import Layout, Parts, PartSpec
from qhub.layouts.chunks import row_chunks
from qhub.layouts.columns import UniformColumns
from qhub.layouts.fitting import UniformFit
from qhub.layouts.grid import Grid
from qhub.layouts.nested import FLOATS, Nested, scale_codes, scale_specs, scale_values
from qhub.layouts.packing import pack, packed_length, unpack

__all__ = ["Affine"]


@dataclass(frozen=True, kw_only=True)
class Affine(Layout):
    """Stores integers q of ``bits`` bits with a scale, and maybe a zero, per group.

    Parts: ``qweight`` (N, packed_length(K)) uint8, see :mod:`qhub.layouts.packing` (int8 (N, K) when ``signed``);
    ``scales`` of ``grid.scale_shape``; ``zeros`` of the same shape unless ``zero="constant"``.

    ``zero``: ``"constant"``: w = scale * (q - zero_point); ``"value"``: w = scale * (q - zeros), zeros integer or
    float; ``"offset"``: w = scale * (q - zero_point) + zeros. ``unit``: a constant factor of the scales (1/127 where a
    row's absmax is stored). ``math``: the dtype of the formula: ``"float32"``, or ``"scales"`` for methods that define
    it in the scales' own. ``scales_nested``, ``zeros_nested``: second-level quantization, None for plain tensors.
    """

    kind: ClassVar[str] = "affine"

    bits: int
    grid: Grid
    zero: Literal["constant", "value", "offset"] = "constant"
    zero_point: float = 0.0
    signed: bool = False
    unit: float = 1.0
    math: Literal["float32", "scales"] = "float32"
    scales_nested: Nested | None = None
    zeros_nested: Nested | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise LayoutError(f"an affine layout holds 1 to 8 bits, asked for {self.bits}")
        if self.signed and self.bits != 8:
            raise LayoutError(f"signed codes are stored in 8 bits, asked for {self.bits}: use zero_point instead")

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """Return the shape of the scales of one matrix."""
        return self.grid.scale_shape(self.out_features, self.in_features)

    def scale_tensors(self) -> dict[str, Nested | None]:
        names: dict[str, Nested | None] = {"scales": self.scales_nested}
        return names if self.zero == "constant" else {**names, "zeros": self.zeros_nested}

    def core_specs(self) -> dict[str, PartSpec]:
        if self.signed:
            codes = PartSpec((self.out_features, self.in_features), (torch.int8,))
        else:
            codes = PartSpec((self.out_features, packed_length(self.in_features, self.bits)), (torch.uint8,))
        specs = {"qweight": codes, **scale_specs("scales", self.scale_shape, self.scales_nested)}
        if self.zero != "constant":
            specs.update(scale_specs("zeros", self.scale_shape, self.zeros_nested))
            if self.zeros_nested is None:
                # Integer zeros (GPTQ, AWQ) need a byte, no float.
                specs["zeros"] = PartSpec(self.scale_shape, (*FLOATS, torch.uint8, torch.int8))
        return specs

    def codes(self, parts: Parts) -> Tensor:
        """Return q (..., N, K): int8 when signed, else uint8."""
        packed = parts["qweight"]
        return packed if self.signed else unpack(packed, self.bits, self.in_features)

    def scales_and_zeros(self, parts: Parts) -> tuple[Tensor, Tensor | None]:
        """Return scales and zeros (..., *scale_shape), each in its stored dtype (float32 when nested).

        ``unit`` is not in the scales yet; zeros are None when constant.
        """
        scales = scale_values("scales", self.scale_shape, self.scales_nested, parts)
        if self.zero == "constant":
            return scales, None
        return scales, scale_values("zeros", self.scale_shape, self.zeros_nested, parts)

    def decode(self, parts: Parts) -> Tensor:
        w = self._weights(self.grid.split(self.codes(parts)), parts)
        return self.grid.join(w, self.out_features, self.in_features)

    def _weights(self, q: Tensor, parts: Parts) -> Tensor:
        """Return the float32 weights of the codes ``q``; both are split into groups, ``q`` is of any dtype."""
        scales, zeros = self.scales_and_zeros(parts)
        dtype = torch.float32 if self.math == "float32" else scales.dtype
        q, scale = q.to(dtype), self.grid.spread(scales.to(dtype))
        if zeros is None:
            w = (q - self.zero_point if self.zero_point else q) * scale
        elif self.zero == "value":
            w = (q - self.grid.spread(zeros.to(dtype))) * scale
        else:
            w = (q - self.zero_point if self.zero_point else q) * scale + self.grid.spread(zeros.to(dtype))
        if self.unit != 1.0:
            w = w * self.unit
        return w.float()

    # -- writing -----------------------------------------------------------------------------------------------------

    @property
    def code_range(self) -> tuple[int, int]:
        """Return the smallest and largest code."""
        return (-128, 127) if self.signed else (0, 2**self.bits - 1)

    def pack_codes(self, q: Tensor) -> Tensor:
        """Return the part ``qweight`` for codes ``q`` (..., N, K) of any dtype, whole numbers within the range."""
        if self.signed:
            return q.to(torch.int8).contiguous()
        flat = q.reshape(-1, self.in_features)
        packed = torch.empty(
            flat.shape[0], packed_length(self.in_features, self.bits), dtype=torch.uint8, device=q.device
        )
        # Widths that divide no byte are put together in 64-bit words: eight bytes per code.
        for piece in row_chunks(flat.shape[0], self.in_features, q.device):
            packed[piece] = pack(flat[piece], self.bits)
        return packed.reshape(*q.shape[:-1], -1)

    def nearest(self, weight: Tensor, parts: Parts) -> dict[str, Tensor]:
        scales, zeros = self.scales_and_zeros(parts)
        grid = self.grid
        scale = grid.spread(scales.float() * self.unit)
        w = grid.split(weight.float())
        if zeros is not None and self.zero == "offset":
            w = w - grid.spread(zeros.float()) * self.unit
        q = w / torch.where(scale == 0, torch.ones_like(scale), scale)
        if zeros is not None and self.zero == "value":
            q = q + grid.spread(zeros.float())
        else:
            q = q + self.zero_point
        low, high = self.code_range
        q = q.round().clamp(low, high)
        if self.math == "scales" and scales.dtype != torch.float32:
            # A formula rounded to 8 or 11 bits may bring the code beside the exact quotient nearer; both lie within one
            # step.
            wanted = grid.split(weight.float())
            best = (self._weights(q, parts) - wanted).abs()
            for other in ((q - 1).clamp_min(low), (q + 1).clamp_max(high)):
                error = (self._weights(other, parts) - wanted).abs()
                q, best = torch.where(error < best, other, q), torch.minimum(best, error)
        return {"qweight": self.pack_codes(grid.join(q, self.out_features, self.in_features))}

    def fit(self, weight: Tensor, parts: Parts) -> dict[str, Tensor]:
        grid = self.grid
        members = None
        if not grid.fits(self.out_features, self.in_features):
            members = grid.split(torch.ones(self.out_features, self.in_features, device=weight.device))
        low, high = self.code_range
        if self.zero == "constant":
            allowed = UniformFit(low, high, zero=self.zero_point)
        else:
            whole = self.zero == "value" and self.zeros_nested is None and not parts["zeros"].is_floating_point()
            allowed = UniformFit(low, high, whole=whole, bounded=self.zeros_nested is not None)
        scale, zero = allowed.fit(grid.split(weight.float()), members, grid.member_dims)
        fitted = scale_codes("scales", scale / self.unit, self.scales_nested, parts)
        if self.zero == "value":
            fitted |= scale_codes("zeros", zero, self.zeros_nested, parts)
        elif self.zero == "offset":
            fitted |= scale_codes("zeros", (self.zero_point - zero) * scale / self.unit, self.zeros_nested, parts)
        return fitted | self.nearest(weight, {**parts, **fitted})

    def columns(self, parts: Parts) -> UniformColumns:
        scales, zeros = self.scales_and_zeros(parts)
        size = self.out_features, self.in_features
        scales = scales.float() * self.unit
        zero: Tensor | float = self.zero_point
        if zeros is not None:
            zeros = zeros.float()
            if self.zero == "offset":
                zeros = self.zero_point - zeros * self.unit / torch.where(scales == 0, torch.ones_like(scales), scales)
            zero = self.grid.expand(zeros, *size).t().contiguous()
        low, high = self.code_range
        return UniformColumns(self.grid.expand(scales, *size).t().contiguous(), zero, low, high)

    def moved(self, update: Tensor, parts: Parts) -> dict[str, Tensor] | None:
        if self.zero == "constant" or self.zeros_nested is not None or not parts["zeros"].is_floating_point():
            return None
        grid, dims = self.grid, self.grid.member_dims
        members = grid.split(torch.ones_like(update))
        mean = (grid.split(update) * members).sum(dims) / members.sum(dims).clamp_min(1)
        scales, zeros = self.scales_and_zeros(parts)
        assert zeros is not None
        if self.zero == "offset":
            step = mean / self.unit
        else:
            scale = scales.float() * self.unit
            step = torch.where(scale == 0, torch.zeros_like(mean), -mean / scale)
        return {**parts, "zeros": (zeros.float() + step).to(parts["zeros"].dtype)}

    # -- rows --------------------------------------------------------------------------------------------------------

    def row_parts(self, parts: Parts, start: int, stop: int) -> dict[str, Tensor] | None:
        scales = rows.cut_scales(self, self.grid, self.scale_tensors(), parts, start, stop)
        return None if scales is None else {"qweight": parts["qweight"][..., start:stop, :], **scales}

    def take_rows(self, parts: Parts, index: Tensor) -> tuple[Layout, dict[str, Tensor]] | None:
        return rows.taken_rows(self, self.grid, self.scale_tensors(), "qweight", parts, index)

    def stacked_rows(self, parts: Sequence[Parts], layouts: Sequence[Layout]) -> dict[str, Tensor] | None:
        scales = rows.stack_scales(self, self.grid, self.scale_tensors(), parts, layouts)
        if scales is None:
            return None
        return {"qweight": torch.cat([p["qweight"] for p in parts], dim=-2), **scales}
