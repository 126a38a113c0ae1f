"""Finds the nearest vectors of a grid, and the steps under which they come nearest."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from qhub_gguf.records import grids
from qhub_gguf.records.base import divided
from qhub_gguf.records.fields import join

if TYPE_CHECKING:
    from qhub_gguf.records.lattice import LatticeRecord

__all__ = ["Vectors", "fit_lattice", "nearest_vectors"]

# How many distances are held at once: 16 MB.
_ELEMENTS = 1 << 22
# To which part of the largest value the largest weight of a run may go at first.
_GUESSES = (0.7, 0.85, 1.0, 1.15, 1.35, 1.6)
_ROUNDS = 2
_TINY = 1e-30


class Vectors(NamedTuple):
    """Holds entry numbers (..., vectors) int32, and a byte of signs for each eight weights; None: no signs."""

    entries: Tensor
    signs: Tensor | None


def nearest_vectors(record: LatticeRecord, ratio: Tensor, w: Tensor | None = None, exact: bool = True) -> Vectors:
    """Return the vectors of ``record`` near to ``ratio`` (..., weights); ``w``: what each squared error counts.

    ``exact``: compare with all entries, not only with those known to lie near.
    """
    signs = None
    if record.signs is not None:
        signs, ratio = _with_signs(record, ratio, w)
    x = ratio.unflatten(-1, (-1, record.dim))
    w = None if w is None else w.unflatten(-1, (-1, record.dim))
    if record.signs is None and record.width > record.dim:
        return Vectors(_moved_together(record, x, w, exact), None)
    return Vectors(_nearest(record.grid, x, w, exact)[0], signs)


def _with_signs(record: LatticeRecord, ratio: Tensor, w: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return a byte of signs for each eight of ``ratio``, and ``ratio`` as the values without signs should be."""
    eights = ratio.unflatten(-1, (-1, 8))
    negative = eights < 0
    x = eights.abs()
    if record.signs == "even":
        # An odd one out: where a change of sign costs least, next to nothing for a weight near 0.
        cost = x if w is None else x * w.unflatten(-1, (-1, 8))
        odd = negative.sum(-1, keepdim=True) % 2 == 1
        least = cost.argmin(-1, keepdim=True)
        flipped = torch.zeros_like(negative).scatter_(-1, least, True) & odd
        negative ^= flipped
        x = torch.where(flipped, -x, x)
    return join(negative.to(torch.uint8), 1, 1).squeeze(-1), x.flatten(-2)


def _nearest(grid: str, x: Tensor, w: Tensor | None, exact: bool, half: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the number (...) int32 of the entry nearest to ``x`` (..., dim), and how much it takes off the error.

    ``half``: look only at the first or at the second half of the table.
    """
    table = grids.vectors(grid, x.device).float()
    if half is not None:
        table = table.chunk(2)[half]
    # |x - v|^2 is least where x.v - |v|^2 / 2 is largest.
    if w is None:
        points = torch.nn.functional.pad(x.reshape(-1, x.shape[-1]), (0, 1), value=-0.5)
        book = torch.cat([table, table.square().sum(-1, keepdim=True)], dim=-1)
    else:
        points = torch.cat([w * x, w.expand(x.shape) * -0.5], dim=-1).reshape(-1, 2 * x.shape[-1])
        book = torch.cat([table, table.square()], dim=-1)
    if exact:
        found = [(chunk @ book.t()).max(-1) for chunk in points.split(max(1, _ELEMENTS // book.shape[0]))]
        entries = torch.cat([one.indices for one in found])
        gains = torch.cat([one.values for one in found])
    else:
        near = grids.neighbours(grid, half, x.device)
        candidates = near.index_select(0, grids.cells(grid, x).flatten())
        rows = book.index_select(0, candidates.flatten()).unflatten(0, candidates.shape)
        gains, place = torch.bmm(rows, points.unsqueeze(-1)).squeeze(-1).max(-1)
        entries = candidates.gather(1, place.unsqueeze(-1)).squeeze(-1)
    return entries.to(torch.int32).reshape(x.shape[:-1]), gains.reshape(x.shape[:-1])


def _moved_together(record: LatticeRecord, x: Tensor, w: Tensor | None, exact: bool) -> Tensor:
    """Return entries for ``x`` (..., vectors, dim), those of a run all from one half of the table."""
    (up, up_gain), (down, down_gain) = (_nearest(record.grid, x, w, exact, half) for half in (0, 1))
    per_run = record.group // record.dim
    ups, downs = (gain.unflatten(-1, (-1, per_run)).sum(-1) for gain in (up_gain, down_gain))
    lower = (downs > ups).repeat_interleave(per_run, dim=-1)
    return torch.where(lower, down + grids.entries(record.grid) // 2, up)


def fit_lattice(record: LatticeRecord, weights: Tensor, importance: Tensor | None) -> Tensor:
    """Return records (..., size) near to ``weights`` (..., 256)."""
    x = weights.float().unflatten(-1, (-1, record.group))
    w = torch.ones_like(x) if importance is None else importance.expand(weights.shape).unflatten(-1, (-1, record.group))
    search = _LatticeSearch(record, x, w)
    data = torch.zeros(*weights.shape[:-1], record.size, dtype=torch.uint8, device=weights.device)
    factor, levels = search.levels(search.free())
    record.put_factor(data, factor)
    record.put_levels(data, levels.to(torch.uint8))
    steps, _ = record.steps(data)
    record.put(data, search.vectors(steps, True))
    return data


class _LatticeSearch:
    """Searches steps for runs ``x`` (..., runs, group)."""

    def __init__(self, record: LatticeRecord, x: Tensor, w: Tensor) -> None:
        self.record, self.x, self.w = record, x, w

    def vectors(self, steps: Tensor, exact: bool) -> Vectors:
        """Return the nearest vectors under ``steps`` (..., runs)."""
        ratio = divided(self.x, steps.unsqueeze(-1)).flatten(-2)
        return nearest_vectors(self.record, ratio, self.w.flatten(-2), exact)

    def _sums(self, steps: Tensor) -> tuple[Tensor, Tensor]:
        """Return a and b (..., runs): a step s takes s (2 a - s b) off the error with the vectors found there."""
        v = self.record.worth(self.vectors(steps, False)).unflatten(-1, (-1, self.record.group)).float()
        weighted = self.w * v
        return (weighted * self.x).sum(-1), (weighted * v).sum(-1).clamp_min(_TINY)

    def free(self) -> Tensor:
        """Return the best steps (..., runs) there would be were they free."""
        largest = int(grids.vectors(self.record.grid, self.x.device).abs().max())
        reach = self.x.abs().amax(-1) / largest
        best, gain = torch.zeros_like(reach), torch.zeros_like(reach)
        for part in _GUESSES:
            a, b = self._sums(reach / part)
            better = (a * a / b > gain) & (a > 0)
            best, gain = torch.where(better, a / b, best), torch.where(better, a * a / b, gain)
        return best

    def levels(self, free: Tensor) -> tuple[Tensor, Tensor]:
        """Return float16 factors (...) and levels (..., runs) for steps near to ``free`` (..., runs)."""
        record = self.record
        factor = (free.amax(-1) / ((2 * record.top + 1) * record.unit)).half().float()
        levels = self._rounded(free, factor)
        for _ in range(_ROUNDS):
            best = None
            for move in (0, -1, 1):
                tried = (levels + move).clamp(0, record.top)
                odd = (2 * tried + 1) * record.unit
                step = factor.unsqueeze(-1) * odd
                a, b = self._sums(step)
                new = [step * (2 * a - step * b), tried, a * odd, b * odd * odd]
                if best is None:
                    best = new
                else:
                    better = new[0] > best[0]
                    best = [torch.where(better, one, other) for one, other in zip(new, best, strict=True)]
            assert best is not None
            _, levels, a, b = best
            factor = (a.sum(-1) / b.sum(-1).clamp_min(_TINY)).clamp_min(0).half().float()
        return factor, levels

    def _rounded(self, free: Tensor, factor: Tensor) -> Tensor:
        whole = divided(free, (factor * self.record.unit).unsqueeze(-1))
        return ((whole - 1) / 2).round().clamp(0, self.record.top)
