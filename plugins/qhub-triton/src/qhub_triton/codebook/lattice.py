"""Books whose vectors of eight weights fit in a 32-bit word: QuIP#'s lattices, as tables of words.

A book with entries ``step * (v - zero)``, v whole and below 16, is a table of words of eight nibbles. A folded book is
two such tables, one of rows and one of signs, xor-ed: with a row's entry 2u + 1 (in halves) and the shift as the lowest
bit of its nibble, to negate the entry is to complement the bits of u, since -(2u + 1) = 2(-u - 1) + 1.

The nibble of weight 2i lies in place i of the word's low half, that of weight 2i + 1 in its high half, and the word is
rotated by two bits: so one mask, at two rotations, cuts out pairs of neighbours that are float16 numbers as they lie.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from qhub.layouts import Codebook

__all__ = ["Words", "words_of"]

_WIDTH = 8
# Where the nibble of each weight lies.
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclass(frozen=True)
class Words:
    """Is a layout's books as words.

    ``kind``: 1: a folded book; 2: two of them; 3: a folded book and one of at most 256 vectors. ``rows``, ``second``:
    (256,) int32, words of the first and of the second book; ``signs``: (256,) int32, of sign codes. ``steps``,
    ``zeros``: of both books.
    """

    kind: int
    rows: Tensor
    signs: Tensor
    second: Tensor
    steps: tuple[float, float]
    zeros: tuple[float, float]


def words_of(layout: Codebook, codebooks: Tensor) -> Words | None:
    """Return the words of ``layout``'s books, ``codebooks`` (C, rows, 1, 8); None where they do not fit.

    Reads values, so the host waits for the device.
    """
    folded = layout.folded or (None,) * len(layout.nbits)
    divisors = layout.divisors or (1.0,) * len(layout.nbits)
    if layout.in_group != _WIDTH or folded[0] != 0.25 or layout.nbits[0] != 16 or len(layout.nbits) > 2:
        return None
    tables = codebooks.detach().cpu().double().flatten(-2)
    first = _folded_rows(tables[0])
    if first is None:
        return None
    kind, second, zero = 1, first, 7.5
    if len(layout.nbits) == 2:
        if folded[1] == 0.25 and layout.nbits[1] == 16:
            kind, found = 2, _folded_rows(tables[1])
        elif folded[1] is None and layout.nbits[1] == 8:
            kind, found, zero = 3, _plain_rows(tables[1]), 8.0
        else:
            return None
        if found is None:
            return None
        second = found
    device = codebooks.device
    last = divisors[-1]
    return Words(
        kind,
        first.to(device),
        _sign_words().to(device),
        second.to(device),
        (0.5 / divisors[0], 0.5 / last),
        (7.5, zero),
    )


def _folded_rows(table: Tensor) -> Tensor | None:
    """Return the words of a folded book's rows (256, 8); None unless entries are odd halves up to 5/2."""
    doubled = table * 2
    whole = doubled.round().long()
    odd = bool((doubled == whole).all() and (whole % 2 == 1).all() and (whole.abs() < 6).all())
    if table.shape[0] != 256 or not odd:
        return None
    return _packed((whole - 1) & 15 ^ 8)


def _plain_rows(table: Tensor) -> Tensor | None:
    """Return the words of a book's vectors (256, 8); None unless entries are halves from -4 to 7/2."""
    doubled = table * 2
    whole = doubled.round().long()
    if table.shape[0] != 256 or not bool((doubled == whole).all() and (whole >= -8).all() and (whole < 8).all()):
        return None
    return _packed(whole + 8)


def _sign_words() -> Tensor:
    """Return what the 256 sign codes do to a row's word; the first bit of odd codes counts the other way round."""
    bits = torch.arange(256, device="cpu").unsqueeze(-1) >> torch.arange(_WIDTH, device="cpu") & 1
    odd = bits.sum(-1, keepdim=True) % 2
    bits[:, :1] ^= odd
    return _packed(bits * 14 | (1 - odd))


def _packed(nibbles: Tensor) -> Tensor:
    """Return words (rows,) int32 of ``nibbles`` (rows, 8) int64, in their places."""
    words = (nibbles << (4 * torch.tensor(_PLACES, device="cpu"))).sum(-1)
    words = (words << 2 | words >> 30) & 0xFFFFFFFF
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
