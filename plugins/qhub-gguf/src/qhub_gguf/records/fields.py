"""Takes fields of records apart and puts them together: half floats, and codes of 1, 2 and 4 bits in ggml's orders."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

__all__ = ["half", "join", "put_half", "spread"]

_HALF_MAX = 65504.0


def half(data: Tensor, start: int) -> Tensor:
    """Return the float16 at byte ``start`` of ``data`` (..., size) as (..., 1) float32."""
    # A copy of its own: the view of another dtype needs its bytes together.
    field = data[..., start : start + 2].clone(memory_format=torch.contiguous_format)
    return field.view(torch.float16).float()


def put_half(data: Tensor, start: int, values: Tensor) -> None:
    """Write ``values`` (...) as float16, clamped to its finite numbers, at byte ``start`` of ``data`` (..., size)."""
    stored = values.clamp(-_HALF_MAX, _HALF_MAX).to(torch.float16)
    data[..., start : start + 2] = stored.unsqueeze(-1).contiguous().view(torch.uint8)


def spread(field: Tensor, bits: int, run: int) -> Tensor:
    """Return the codes (..., count) uint8 of ``field`` (..., bytes): of each ``run`` bytes the lowest bits first.

    That is, codes i, i + run, i + 2 run ... lie in one byte. With a run of 1 neighbours do.
    """
    if bits == 8:
        return field
    if run == 1:
        rows = _neighbours(bits, field.device).index_select(0, field.flatten().int())
        return rows.view(torch.uint8).reshape(*field.shape[:-1], -1)
    mask = 2**bits - 1
    field = field.contiguous()
    # The uppermost bits need no mask and the lowest no shift.
    planes = [field & mask, *(field >> shift & mask for shift in range(bits, 8 - bits, bits)), field >> 8 - bits]
    return torch.stack([plane.unflatten(-1, (-1, run)) for plane in planes], dim=-2).flatten(-3)


def join(codes: Tensor, bits: int, run: int) -> Tensor:
    """Undo :func:`spread`: return the bytes of ``codes`` (..., count) uint8, each below 2**bits."""
    if bits == 8:
        return codes
    planes = codes.unflatten(-1, (-1, 8 // bits, run))
    field = planes[..., 0, :].clone()
    for index in range(1, 8 // bits):
        field |= planes[..., index, :] << (bits * index)
    return field.flatten(-2)


@functools.lru_cache(maxsize=32)
def _neighbours(bits: int, device: torch.device) -> Tensor:
    """Return for each byte its codes of ``bits`` bits, lowest first, put together to one number: fetched at once."""
    byte = torch.arange(256, dtype=torch.uint8)
    codes = torch.stack([byte >> shift & 2**bits - 1 for shift in range(0, 8, bits)], dim=-1)
    return codes.view({1: torch.int64, 2: torch.int32, 4: torch.int16}[bits]).flatten().to(device)
