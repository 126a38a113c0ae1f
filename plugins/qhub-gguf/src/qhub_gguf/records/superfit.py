"""Fits records whose steps are whole numbers under a float16: first the steps as if they were free, then both levels.

The two levels take turns: given the float16 factors, each run of weights takes the whole numbers, of those around
where it stands, that bring it nearest with codes rounded anew; given all whole numbers, the factors follow from least
squares over the record. (ggml-quants.c stops after rounding the free steps once, ``make_qp_quants``.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from qhub_gguf.records.fitting import affine_search, columns_of, uniform_search

if TYPE_CHECKING:
    from qhub_gguf.records.kquants import SuperRecord

__all__ = ["Levels", "fit_levels"]

_ROUNDS = 3
_TINY = 1e-30
_HALF_MAX = 65504.0


class Levels(NamedTuple):
    """Holds the whole numbers of steps and offsets, (..., runs of a record), int8 or uint8."""

    steps: Tensor
    offsets: Tensor | None


def fit_levels(record: SuperRecord, weights: Tensor, importance: Tensor | None) -> tuple[tuple[Tensor, ...], Levels]:
    """Return the float16 factors (...) and the whole numbers (..., count/group) for ``weights`` (..., count)."""
    x, w = columns_of(weights, importance, record.group)
    batch = weights.shape[:-1]
    low, high = record.levels_low, record.levels_high
    dtype = torch.int8 if low < 0 else torch.uint8

    def stored(level: Tensor) -> Tensor:
        return level.t().to(dtype).reshape(*batch, -1)

    if len(record.halves) == 1:
        free = uniform_search(x, w, record.rounded, record.low, record.high)
        factor, steps = _Steps(record, x, w).search(free)
        return (factor.reshape(batch),), Levels(stored(steps), None)
    free, offset = affine_search(x, w, record.high, below=True)
    factors, steps, offsets = _StepsAndOffsets(x, w, record.high, high).search(free, -offset)
    return tuple(factor.reshape(batch) for factor in factors), Levels(stored(steps), stored(offsets))


def _half(factor: Tensor) -> Tensor:
    return factor.clamp(-_HALF_MAX, _HALF_MAX).half().float()


def _over(values: Tensor, factor: Tensor) -> Tensor:
    """Return ``values / factor``, 0 where the factor is 0."""
    return torch.where(factor == 0, 0.0, values / torch.where(factor == 0, 1.0, factor))


class _Steps:
    """Searches ``step = factor * level`` for runs ``x`` (members, runs, records) without offsets."""

    def __init__(self, record: SuperRecord, x: Tensor, w: Tensor) -> None:
        self.record, self.x, self.w = record, x, w
        self.wx = w * x

    def search(self, free: Tensor) -> tuple[Tensor, Tensor]:
        """Return factors (records) and levels (runs, records) near to the ``free`` steps."""
        low, high = self.record.levels_low, self.record.levels_high
        extreme = free.gather(0, free.abs().argmax(0, keepdim=True)).squeeze(0)
        found: tuple[Tensor, ...] | None = None
        least = torch.zeros(())
        # The lower end reaches further by one; its sign may be the better one all the same.
        for end in (low, high):
            factor = _half(extreme / end)
            levels = _over(free, factor).round().clamp(low, high)
            for _ in range(_ROUNDS):
                levels, error, a, b = self._levels(factor, levels)
                found, least = _kept(found, least, (factor, levels), error)
                factor = _half(_over(a, b))
            levels, error, *_ = self._levels(factor, levels)
            found, least = _kept(found, least, (factor, levels), error)
        assert found is not None
        return found[0], found[1]

    def _levels(self, factor: Tensor, levels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return better levels, the records' errors, and what least squares for the factor needs."""
        record = self.record
        best = None
        for move in (0, -1, 1):
            tried = (levels + move).clamp(record.levels_low, record.levels_high)
            step = factor * tried
            v = record.rounded(_over(self.x, step)).float()
            a, b = (self.wx * v).sum(0), (self.w * v).mul_(v).sum(0)
            # The error of the run but for what does not depend on the step.
            error = step * (step * b - 2 * a)
            if best is None:
                best = [error, tried, a, b]
            else:
                better = error < best[0]
                best = [torch.where(better, new, old) for new, old in zip((error, tried, a, b), best, strict=True)]
        assert best is not None
        error, levels, a, b = best
        return levels, error.sum(0), (a * levels).sum(0), (b * levels * levels).sum(0)


class _StepsAndOffsets:
    """Searches ``step = factor * level``, ``offset = -factor' * level'`` for runs ``x`` (members, runs, records)."""

    def __init__(self, x: Tensor, w: Tensor, high: int, levels_high: int) -> None:
        self.x, self.w, self.high, self.levels_high = x, w, high, levels_high
        self.wx = w * x
        self.sw, self.sx = w.sum(0), self.wx.sum(0)

    def search(self, step: Tensor, offset: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
        """Return both factors (records) and both levels (runs, records) near to free ``step`` and ``offset``."""
        top = self.levels_high
        found: tuple[Tensor, ...] | None = None
        least = torch.zeros(())
        d, m = _half(step.amax(0) / top), _half(offset.amax(0) / top)
        steps, offsets = (_over(free, factor).round().clamp(0, top) for free, factor in ((step, d), (offset, m)))
        # Steps may be too small for a float16; the offsets then stand for the weights alone.
        offsets = torch.where(d == 0, _over(-self.sx / self.sw.clamp_min(_TINY), m).round().clamp(0, top), offsets)
        for turn in range(_ROUNDS + 1):
            steps, offsets, error, sums = self._levels(d, m, steps, offsets)
            found, least = _kept(found, least, (d, m, steps, offsets), error)
            if turn < _ROUNDS:
                d, m = self._factors(d, m, steps, offsets, sums)
        assert found is not None
        d, m, steps, offsets = found
        return (d, m), steps, offsets

    def _levels(
        self, d: Tensor, m: Tensor, steps: Tensor, offsets: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
        """Return better levels, the records' errors, and per run the sums over w v, w x v and w v^2."""
        best: list[Tensor] | None = None
        for move in (0, -1, 1):
            for shift in (0, -1, 1):
                tried = (steps + move).clamp(0, self.levels_high)
                moved = (offsets + shift).clamp(0, self.levels_high)
                step, offset = d * tried, -(m * moved)
                inverse = _over(torch.ones_like(step), step)
                v = torch.addcmul(-offset * inverse, self.x, inverse).round_().clamp_(0, self.high)
                sxv = (self.wx * v).sum(0)
                wv = self.w * v
                sv, svv = wv.sum(0), wv.mul_(v).sum(0)
                error = step * (step * svv - 2 * sxv + 2 * offset * sv) + offset * (offset * self.sw - 2 * self.sx)
                new = [error, tried, moved, sv, sxv, svv]
                if best is None:
                    best = new
                else:
                    better = error < best[0]
                    best = [torch.where(better, one, other) for one, other in zip(new, best, strict=True)]
        assert best is not None
        error, steps, offsets, *sums = best
        return steps, offsets, error.sum(0), tuple(sums)

    def _factors(
        self, d: Tensor, m: Tensor, steps: Tensor, offsets: Tensor, sums: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        """Return the factors of least squares for given levels and codes; the old ones where there are none."""
        sv, sxv, svv = sums
        aa, ab = (svv * steps * steps).sum(0), (sv * steps * offsets).sum(0)
        bb = (self.sw * offsets * offsets).sum(0)
        xa, xb = (sxv * steps).sum(0), (self.sx * offsets).sum(0)
        det = aa * bb - ab * ab
        usable = det > 1e-6 * aa * bb
        safe = torch.where(usable, det, 1.0)
        new_d, new_m = (xa * bb - xb * ab) / safe, (xa * ab - xb * aa) / safe
        usable &= (new_d > 0) & (new_m >= 0)
        alone = torch.where(aa > 0, (xa + m * ab) / torch.where(aa > 0, aa, 1.0), d)
        return _half(torch.where(usable, new_d, alone)), _half(torch.where(usable, new_m, m))


def _kept(
    found: tuple[Tensor, ...] | None, least: Tensor, new: tuple[Tensor, ...], error: Tensor
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return per record whichever of ``found`` and ``new`` has the smaller error, and that error."""
    if found is None:
        return new, error
    better = error < least
    return tuple(torch.where(better, one, other) for one, other in zip(new, found, strict=True)), torch.minimum(
        error, least
    )
