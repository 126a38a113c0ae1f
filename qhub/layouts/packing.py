"""Packs codes of 1 to 8 bits into bytes and back: the one in-memory packing of every affine and lookup layout.

The packing is a little-endian bit string along the last dimension; code ``i`` occupies bits ``[b*i, b*i + b)``::

    4 bits   byte 0: [c1 c1 c1 c1 c0 c0 c0 c0]
    3 bits   byte 0: [c2 c2 c1 c1 c1 c0 c0 c0]   byte 1: [c5 c4 c4 c4 c3 c3 c3 c2]   byte 2: ...

A row of 1-, 2-, 4- or 8-bit codes is padded to a whole byte, any other to a multiple of eight codes (exactly ``bits``
bytes), with zeros. On-disk packings (32-bit words, nibble orders, slabs) belong to the methods that invented them.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["pack", "packed_length", "unpack"]


def packed_length(count: int, bits: int) -> int:
    """Return how many bytes hold ``count`` codes of ``bits`` bits (1 to 8)."""
    if bits in (1, 2, 4, 8):
        return -(-count * bits // 8)
    return -(-count // 8) * bits


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack ``codes`` (..., count) of any integer dtype, each in ``[0, 2**bits)``, to (..., packed_length) uint8."""
    codes = codes.to(torch.uint8)
    if bits == 8:
        return codes.contiguous()
    count = codes.shape[-1]
    if bits in (1, 2, 4):
        per_byte = 8 // bits
        codes = _pad(codes, per_byte).unflatten(-1, (packed_length(count, bits), per_byte))
        packed = codes[..., 0].clone()
        for index in range(1, per_byte):
            packed |= codes[..., index] << (bits * index)
        return packed
    groups = _pad(codes, 8).unflatten(-1, (-(-count // 8), 8)).to(torch.int64)
    words = torch.zeros(groups.shape[:-1], dtype=torch.int64, device=codes.device)
    for index in range(8):
        # 7 bits x 8 codes = 56 bits: the widest string still fits a signed 64-bit word.
        words |= groups[..., index] << (bits * index)
    packed_bytes = [(words >> (8 * index)) & 0xFF for index in range(bits)]
    return torch.stack(packed_bytes, dim=-1).to(torch.uint8).flatten(-2)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Return the first ``count`` codes of ``packed`` (..., bytes) uint8 as (..., count) uint8."""
    if bits == 8:
        return packed[..., :count]
    if bits in (1, 2, 4):
        mask = (1 << bits) - 1
        fields = [(packed >> shift) & mask for shift in range(0, 8, bits)]
        return torch.stack(fields, dim=-1).flatten(-2)[..., :count]
    groups = packed.unflatten(-1, (packed.shape[-1] // bits, bits)).to(torch.int64)
    words = groups[..., 0].clone()
    for index in range(1, bits):
        words |= groups[..., index] << (8 * index)
    mask = (1 << bits) - 1
    fields = [((words >> (bits * index)) & mask).to(torch.uint8) for index in range(8)]
    return torch.stack(fields, dim=-1).flatten(-2)[..., :count]


def _pad(codes: Tensor, multiple: int) -> Tensor:
    missing = -codes.shape[-1] % multiple
    return torch.nn.functional.pad(codes, (0, missing)) if missing else codes
