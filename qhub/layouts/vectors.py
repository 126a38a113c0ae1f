"""Codebooks: which vector a code picks, and which code's vector is nearest.

:class:`PlainBook` lists every vector. :class:`FoldedBook` lists one vector of those that differ in signs alone, and its
codes carry the signs: QuIP#'s E8P (Tseng et al. 2024, section 4.2) has 65,536 vectors and a table of 256.
"""

from __future__ import annotations

from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Book", "FoldedBook", "PlainBook"]

# How many distances are held at once while searching the nearest vectors: 4 M float32 = 16 MB, near to a cache's size.
_SEARCH_ELEMENTS = 1 << 22


class Book(Protocol):
    """Turns codes into vectors and back; ``width``: of the vectors."""

    def vectors(self, codes: Tensor) -> Tensor:
        """Return the vectors (..., width) float32 of ``codes`` (...) int64."""
        ...

    def nearest(self, points: Tensor) -> Tensor:
        """Return the code (count,) int64 of the vector nearest to each of ``points`` (count, width) float32."""
        ...


class PlainBook:
    """Lists every vector: ``table`` (codes, width) float32."""

    def __init__(self, table: Tensor) -> None:
        self.table = table

    def vectors(self, codes: Tensor) -> Tensor:
        return self.table[codes]

    def nearest(self, points: Tensor) -> Tensor:
        return _best_rows(points, self.table, self.table.square().sum(-1))[0]


class FoldedBook:
    """Has codes whose low ``width`` bits are signs and whose other bits name a row of ``table`` (rows, width) float32.

    Bit j negates entry j of the row. An even number of bits: ``shift`` is added to each entry then. An odd number: the
    first bit counts the other way round, and ``shift`` is subtracted. So each row is negated in an even number of
    places: from rows of whole sums of one parity this gives the vectors of a coset of D8, shifted to either side.
    """

    def __init__(self, table: Tensor, shift: float) -> None:
        self.table = table
        self.shift = shift
        self.width = table.shape[1]

    @cached_property
    def _signs(self) -> tuple[Tensor, Tensor]:
        """Return what each sign code multiplies by, (2**width, width), and what it adds, (2**width, 1)."""
        codes = torch.arange(1 << self.width, device=self.table.device)
        bits = codes.unsqueeze(-1) >> torch.arange(self.width, device=codes.device) & 1
        odd = bits.sum(-1, keepdim=True) % 2
        bits[:, :1] ^= odd
        return 1.0 - 2.0 * bits.float(), self.shift * (1.0 - 2.0 * odd.float())

    def vectors(self, codes: Tensor) -> Tensor:
        signs, shifts = self._signs
        count = self.table.shape[0] << self.width
        if codes.numel() < count:
            low = codes & ((1 << self.width) - 1)
            return self.table[codes >> self.width] * signs[low] + shifts[low]
        # Many codes: all vectors once, then one look-up a code.
        return (self.table.unsqueeze(1) * signs + shifts).reshape(count, self.width)[codes]

    def nearest(self, points: Tensor) -> Tensor:
        plus, minus = (self._nearest_unshifted(points - offset) for offset in (self.shift, -self.shift))
        # An odd number of bits is what says that the shift is subtracted.
        return torch.where(minus[1] < plus[1], minus[0] ^ 1, plus[0])

    def _nearest_unshifted(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Return codes with an even number of negations, of the nearest row so negated, and its squared distances.

        The best signs for a row are those of the point. If they negate the row in an odd number of places, one place
        has to stay wrong: each is tried, and so the result is exact, among as many candidates as there are rows and
        places instead of rows and sign patterns.
        """
        negative = points < 0
        odd = negative.sum(-1) % 2
        magnitudes = points.abs()
        codes = torch.empty(points.shape[0], dtype=torch.int64, device=points.device)
        distances = torch.empty(points.shape[0], dtype=points.dtype, device=points.device)
        places = 1 << torch.arange(self.width, device=points.device)
        for parity, (candidates, rows, flips) in enumerate(self._candidates):
            chosen = (odd == parity).nonzero().squeeze(-1)
            if not chosen.numel():
                continue
            found, score = _best_rows(magnitudes[chosen], candidates, candidates.square().sum(-1))
            row = rows[found]
            wanted = (negative[chosen] * places).sum(-1) ^ flips[found]
            codes[chosen] = row << self.width | (wanted ^ ((self.table[row] < 0) * places).sum(-1))
            distances[chosen] = magnitudes[chosen].square().sum(-1) - 2 * score
        return codes, distances

    @cached_property
    def _candidates(self) -> tuple[tuple[Tensor, Tensor, Tensor], ...]:
        """Return, for points with an even and an odd number of negative entries: magnitudes with at most one of them
        negated (count, width), the row that each is of, and the negated place as a bit."""
        rows = torch.arange(self.table.shape[0], device=self.table.device)
        row_is_odd = (self.table < 0).sum(-1) % 2
        flipped = 1.0 - 2.0 * torch.eye(self.width, device=self.table.device)
        places = 1 << torch.arange(self.width, device=self.table.device)
        found = []
        for parity in (0, 1):
            right, wrong = rows[row_is_odd == parity], rows[row_is_odd != parity]
            tried = (self.table[wrong].abs().unsqueeze(1) * flipped).reshape(-1, self.width)
            candidates = torch.cat([self.table[right].abs(), tried])
            names = torch.cat([right, wrong.repeat_interleave(self.width)])
            found.append((candidates, names, torch.cat([torch.zeros_like(right), places.repeat(wrong.shape[0])])))
        return tuple(found)


def _best_rows(points: Tensor, table: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each of ``points`` (count, width) the row of ``table`` nearest to it, and p.v - |v|^2 / 2 for it.

    ``norms``: the rows' squared norms. |p - v|^2 is least where p.v - |v|^2 / 2 is largest: one product per chunk, with
    the norm as one more coordinate.
    """
    rows = torch.cat([table, norms.unsqueeze(-1) / -2], dim=-1).T
    lifted = torch.nn.functional.pad(points, (0, 1), value=1.0)
    step = max(1, _SEARCH_ELEMENTS // table.shape[0])
    best = [(chunk @ rows).max(-1) for chunk in lifted.split(step)]
    return torch.cat([one.indices for one in best]), torch.cat([one.values for one in best])
