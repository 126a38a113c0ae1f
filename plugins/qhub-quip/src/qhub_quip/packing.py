"""The order of bits in ``Qidxs``: what QuIP#'s CUDA code wants to load.

Source: QuIP#, lib/codebook (``maybe_pack_idxs``) and quiptools. An E8P code is a row of the table (high byte) and signs
(low byte), sign bits in the order 0 2 4 6 1 3 5 7 of the weights. Four codes, of two rows and two neighbouring runs of
eight weights, make a word of 64 bits: the rows of the table in the low half, sign bits dealt out in turn in the high
half. Blocks of 16 rows are stored together. A code of 8 bits is a byte: eight neighbouring runs make a word.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["pack_bytes", "pack_e8p", "unpack_bytes", "unpack_e8p"]

# Bit j of a file's sign byte belongs to weight _ORDER[j].
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_TILE = 16


def pack_e8p(codes: Tensor) -> Tensor:
    """Return the words (N, K/32) int64 for E8P ``codes`` (N, K/8) int64, signs in the order of the weights.

    N is a multiple of 16, K of 64.
    """
    n, runs = codes.shape
    # (row pairs, words, runs in a word, rows in a word): code i of a word is of row i % 2 and run i // 2.
    quads = codes.reshape(n // 2, 2, runs // 2, 2).permute(0, 2, 3, 1).reshape(n // 2, runs // 2, 4)
    words = torch.zeros(n // 2, runs // 2, dtype=torch.int64, device=codes.device)
    for index in range(4):
        code = quads[..., index]
        words |= (code >> 8 & 255) << 8 * index
        for bit, weight in enumerate(_ORDER):
            words |= (code >> weight & 1) << (32 + 4 * bit + index)
    tiled = words.reshape(n // _TILE, _TILE // 2, runs // 8, 4).transpose(1, 2)
    return tiled.reshape(n, runs // 4)


def unpack_e8p(words: Tensor) -> Tensor:
    """Return the codes (N, K/8) int64 of ``words`` (N, K/32) int64; undoes :func:`pack_e8p`."""
    n, width = words.shape
    pairs = words.reshape(n // _TILE, width // 2, _TILE // 2, 4).transpose(1, 2).reshape(n // 2, 2 * width)
    quads = []
    for index in range(4):
        code = (pairs >> 8 * index & 255) << 8
        for bit, weight in enumerate(_ORDER):
            code |= (pairs >> (32 + 4 * bit + index) & 1) << weight
        quads.append(code)
    blocks = torch.stack(quads, dim=-1).reshape(n // 2, 2 * width, 2, 2)
    return blocks.permute(0, 3, 1, 2).reshape(n, 4 * width)


def pack_bytes(codes: Tensor) -> Tensor:
    """Return the words (N, K/64) int64 for ``codes`` (N, K/8) int64 of 8 bits, the first in the lowest byte."""
    n, runs = codes.shape
    shifts = 8 * torch.arange(8, device=codes.device)
    # The bytes do not overlap: their sum is their union, also where the last one reaches into the sign.
    return (codes.reshape(n, runs // 8, 8) << shifts).sum(-1)


def unpack_bytes(words: Tensor) -> Tensor:
    """Return the codes (N, K/8) int64 of ``words`` (N, K/64) int64; undoes :func:`pack_bytes`."""
    shifts = 8 * torch.arange(8, device=words.device)
    return (words.unsqueeze(-1) >> shifts & 255).reshape(words.shape[0], -1)
