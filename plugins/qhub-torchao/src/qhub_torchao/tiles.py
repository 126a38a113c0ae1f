"""The order of 4-bit codes in tinygemm's tiles of 8 rows and 128 columns (``tile_packed_to_4d``).

A matrix (N, K), N a multiple of 8 and K of 128, is (N/8, K/128, 32, 4) int32. Lane ``4 * r + c`` of the 32 holds codes
of row r; its word i of 4 holds columns ``32 * i + 16 * t + 8 * h + 2 * c + j`` for t, h, j in {0, 1}, at the nibble
``4 * j + 2 * t + h``, least significant first. Source: ``matrix_to_m16n8k16_Bint4_layout`` with 8 inner k-tiles,
pytorch 2.13, ``aten/src/ATen/native/cuda/int4mm.cu``.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["from_tiles", "to_tiles"]


def to_tiles(codes: Tensor) -> Tensor:
    """Return ``codes`` (N, K) uint8 below 16 as (N/8, K/128, 32, 4) int32."""
    n, k = codes.shape
    split = codes.reshape(n // 8, 8, k // 128, 4, 2, 2, 4, 2)
    # rows, r, columns, i, t, h, c, j  ->  rows, columns, r, c, i, j, t, h
    nibbles = split.permute(0, 2, 1, 6, 3, 7, 4, 5).reshape(n // 8, k // 128, 32, 4, 4, 2)
    return (nibbles[..., 0] | nibbles[..., 1] << 4).contiguous().view(torch.int32).squeeze(-1)


def from_tiles(tiles: Tensor) -> Tensor:
    """Return the codes (N, K) uint8 that ``tiles`` (N/8, K/128, 32, 4) int32 hold."""
    rows, columns = tiles.shape[:2]
    packed = tiles.contiguous().unsqueeze(-1).view(torch.uint8)
    nibbles = torch.stack([packed & 15, packed >> 4], dim=-1).reshape(rows, columns, 8, 4, 4, 2, 2, 2)
    # rows, columns, r, c, i, j, t, h  ->  rows, r, columns, i, t, h, c, j
    return nibbles.permute(0, 2, 1, 4, 6, 7, 3, 5).reshape(8 * rows, 128 * columns)
