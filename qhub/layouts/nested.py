"""Scales that are themselves quantized: 8-bit or float8 codes under a second level of scales.

``value = lookup(code) * super[i // group] + offset``, i counting the flattened scales of one matrix. Sources: double
quantization, QLoRA (Dettmers et al. 2023, section 3); 6-bit scales of the K-quants, llama.cpp ``ggml-quants.c``;
NVFP4's E4M3 block scales under one float32 scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qhub.errors import LayoutError
from qhub.layouts.base import PartSpec
from qhub.layouts.powers import powers_above

__all__ = [
    "FLOATS",
    "SCALES",
    "Nested",
    "scale_codes",
    "scale_specs",
    "scale_values",
]

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# What multiplies float codes may be a power of two by its format, E8M0 (OCP Microscaling Formats 1.0, section 5.4.1).
SCALES = (*FLOATS, torch.float8_e8m0fnu)


@dataclass(frozen=True)
class Nested:
    """Describes how the tensor NAME is stored as codes, with companions NAME_super, NAME_table and NAME_offset.

    ``dtype``: of the codes, by its torch name. ``group``: consecutive scales that share a second-level scale; 0: all of
    a matrix. ``table``: codes index NAME_table (256 float32 entries, sorted). ``offset``: NAME_offset, one float32, is
    added. ``divide``: the second-level scale divides. ``bits``: written integer codes stay within so many (6 in the
    K-quants), whatever ``dtype`` could hold.
    """

    dtype: str = "uint8"
    group: int = 256
    table: bool = False
    offset: bool = False
    divide: bool = False
    bits: int = 8

    def specs(self, name: str, shape: tuple[int, ...]) -> dict[str, PartSpec]:
        """Return the tensors that stand for scales ``name`` of ``shape``."""
        count = math.prod(shape)
        supers = -(-count // self.group) if self.group else 1
        specs = {
            name: PartSpec(shape, (getattr(torch, self.dtype),)),
            f"{name}_super": PartSpec((supers,), FLOATS),
        }
        if self.table:
            specs[f"{name}_table"] = PartSpec((256,), (torch.float32,), batched=False)
        if self.offset:
            specs[f"{name}_offset"] = PartSpec((), (torch.float32,))
        return specs

    def values(self, name: str, shape: tuple[int, ...], parts: Mapping[str, Tensor]) -> Tensor:
        """Return the scales (..., *shape) in float32."""
        code = parts[name]
        first = parts[f"{name}_table"][code.to(torch.int32)] if self.table else code.float()
        batch = code.shape[: code.ndim - len(shape)]
        flat = first.reshape(*batch, -1)
        second = self._spread(parts[f"{name}_super"].float(), flat.shape[-1])
        flat = flat / second if self.divide else flat * second
        if self.offset:
            flat = flat + parts[f"{name}_offset"].unsqueeze(-1)
        return flat.reshape(*batch, *shape)

    def codes(self, name: str, values: Tensor, parts: Mapping[str, Tensor], refit: bool) -> dict[str, Tensor]:
        """Return codes (and with ``refit`` second-level scales) for ``values`` (..., *shape); the offset is kept."""
        shape = parts[name].shape
        batch = parts[f"{name}_super"].shape[:-1]
        flat = values.reshape(*batch, -1).float()
        if self.offset:
            flat = flat - parts[f"{name}_offset"].unsqueeze(-1)
        supers = self._fit(flat) if refit else parts[f"{name}_super"].float()
        stored = saturated(supers, parts[f"{name}_super"].dtype)
        second = self._spread(stored.float(), flat.shape[-1])
        ratio = flat * second if self.divide else flat / torch.where(second == 0, torch.ones_like(second), second)
        dtype = getattr(torch, self.dtype)
        if self.table:
            table = parts[f"{name}_table"]
            code = torch.bucketize(ratio, (table[1:] + table[:-1]) / 2, out_int32=True)
        elif dtype.is_floating_point:
            code = saturated(ratio, dtype)
        else:
            code = ratio.round().clamp(*self.code_range)
        return {name: code.to(dtype).reshape(shape), f"{name}_super": stored}

    @property
    def code_range(self) -> tuple[int, int]:
        """Return the smallest and largest integer code."""
        if getattr(torch, self.dtype).is_signed:
            return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        return 0, 2**self.bits - 1

    def check_values(self, name: str, parts: Mapping[str, Tensor]) -> None:
        """Raise :class:`LayoutError` if the second-level scales cannot be used."""
        if self.divide and bool((parts[f"{name}_super"] == 0).any()):
            raise LayoutError(f"tensor '{name}_super' divides the scales and holds 0: the file is damaged")

    def _fit(self, flat: Tensor) -> Tensor:
        """Return second-level scales (..., supers): the largest magnitude of each group gets the largest code."""
        group = self.group or flat.shape[-1]
        padded = torch.nn.functional.pad(flat, (0, -flat.shape[-1] % group))
        groups = padded.reshape(*flat.shape[:-1], -1, group)
        dtype = getattr(torch, self.dtype)
        if self.table:
            top = 1.0
        else:
            top = torch.finfo(dtype).max if dtype.is_floating_point else self.code_range[1]
        extreme = groups.abs().amax(-1).clamp_min(1e-30)
        if not self.table and not dtype.is_signed:
            # Codes without a sign leave it to the second level: the minima of Q4_K are stored under -dmin.
            extreme = torch.where(-groups.amin(-1) > groups.amax(-1), -extreme, extreme)
        return top / extreme if self.divide else extreme / top

    def _spread(self, supers: Tensor, count: int) -> Tensor:
        if not self.group:
            return supers
        return supers.repeat_interleave(self.group, dim=-1)[..., :count]


def scale_specs(
    name: str, shape: tuple[int, ...], nested: Nested | None, dtypes: tuple[torch.dtype, ...] = FLOATS
) -> dict[str, PartSpec]:
    """Return the tensors that hold the scales ``name``, nested or plain and of one of ``dtypes``."""
    return nested.specs(name, shape) if nested else {name: PartSpec(shape, dtypes)}


def scale_values(name: str, shape: tuple[int, ...], nested: Nested | None, parts: Mapping[str, Tensor]) -> Tensor:
    """Return the scales ``name`` (..., *shape): float32 when nested, in their own dtype when plain."""
    return nested.values(name, shape, parts) if nested else parts[name]


def scale_codes(name: str, values: Tensor, nested: Nested | None, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors that hold the refitted scales ``values``."""
    if nested:
        return nested.codes(name, values, parts, refit=True)
    return {name: saturated(values, parts[name].dtype).reshape(parts[name].shape)}


def saturated(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``values`` in ``dtype``, clamped to its finite numbers: infinity would spoil a whole group."""
    if dtype == torch.float8_e8m0fnu:
        return powers_above(values)
    if dtype.is_floating_point:
        limit = torch.finfo(dtype).max
        values = values.clamp(-limit, limit)
    return values.to(dtype)
