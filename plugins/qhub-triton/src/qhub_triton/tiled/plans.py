"""How the work is cut: block sizes of the two kernels for a shape and a number of rows."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

__all__ = ["Few", "Many", "candidates", "config_of", "plan", "plan_of", "within"]


@dataclass(frozen=True)
class Few:
    """Cuts the work of :mod:`qhub_triton.tiled.few`: see there."""

    warps: int
    tall: int
    ahead: int
    block_m: int
    overlap: bool = True

    def turns(self, blocks: int) -> int:
        """Return how many turns to unroll for a row of ``blocks``; 0 for a loop."""
        turns = -(-blocks // (self.warps * self.ahead))
        return turns if turns <= 2 else 0


@dataclass(frozen=True)
class Many:
    """Cuts the work of :mod:`qhub_triton.tiled.many`: see there.

    ``registers``: the most that a thread may have, so that more programs fit on a processor; 0 for no limit.
    """

    warps: int
    block_n: int
    block_m: int
    split: int
    stages: int
    early: bool = False
    overlap: bool = True
    registers: int = 0


def plan_of(config: dict[str, Any]) -> Few | Many:
    """Return the plan that ``config``, plain data, describes."""
    own = dict(config)
    return {"few": Few, "many": Many}[own.pop("kernel")](**own)


def config_of(plan: Few | Many) -> dict[str, Any]:
    """Return ``plan`` as plain data."""
    return {"kernel": type(plan).__name__.lower(), **asdict(plan)}


def plan(n: int, blocks: int, m: int, processors: int) -> Few | Many:
    """Return a plan for an output of ``n`` columns and ``m`` rows on a GPU of ``processors``.

    ``blocks``: of a row. A rule drawn from measurements on an H100; a table of measurements goes before it.
    """
    if m <= 8:
        pairs = -(-n // 32)
        if pairs >= 3 * processors:
            return Few(4, 2, 2, 8)
        if pairs >= 1.5 * processors or blocks <= 32:
            return Few(8, 2, 2, 8)
        return Few(16, 1, 1, 8)
    if m <= 32:
        if m > 16 and n >= 90 * processors:
            return within(Many(8, 128, 32, 2, 3), blocks)
        # Four to seven small programs for each processor.
        split = _doubled(-(-n // 64), 7 * processors, 8)
        wide = -(-n // 64) * split > 6 * processors
        return within(Many(4, 64, 16 if m <= 16 else 32, split, 4 if m <= 16 else 3, overlap=wide), blocks)
    tiles = -(-n // 128)
    if m <= 64:
        return within(Many(8, 128, 64, _doubled(tiles, 2 * processors, 4), 3), blocks)
    if m <= 128:
        return within(Many(8, 128, 128, _doubled(tiles, processors, 4), 3, early=tiles > 1.5 * processors), blocks)
    return within(Many(8, 128, 128, 1, 3, early=True), blocks)


def _doubled(tiles: int, most: int, limit: int) -> int:
    """Return the largest power of two up to ``limit`` by which ``tiles`` can be multiplied and not pass ``most``."""
    split = 1
    while split < limit and tiles * split * 2 <= most:
        split *= 2
    return split


def within(chosen: Few | Many, blocks: int) -> Few | Many:
    """Return ``chosen`` with no more parts than get a block each."""
    if isinstance(chosen, Many):
        each = -(-blocks // max(1, min(chosen.split, blocks)))
        return replace(chosen, split=-(-blocks // each))
    return chosen


def candidates(n: int, blocks: int, m: int, processors: int) -> list[Few | Many]:
    """Return the plans that are worth measuring, those near the rule's."""
    found: list[Few | Many] = [plan(n, blocks, m, processors)]
    if m <= 8:
        found += [Few(w, t, a, 8) for w, t, a in ((4, 2, 2), (8, 2, 2), (8, 1, 2), (16, 1, 1), (4, 1, 2))]
    elif m <= 32:
        rows, stages = (16, 4) if m <= 16 else (32, 3)
        found += [
            Many(4, 64, rows, split, stages, False, overlap) for split in (1, 2, 4, 8) for overlap in (False, True)
        ]
        found += [Many(8, 128, rows, split, 3) for split in (1, 2, 4)]
    elif m <= 128:
        rows = 64 if m <= 64 else 128
        found += [Many(8, 128, rows, split, 3, early) for split in (1, 2, 4) for early in (False, True)]
        found += [Many(4, 64, rows, split, 3) for split in (2, 4)]
    else:
        found += [Many(8, 128, 128, 1, 3, early) for early in (False, True)]
    return list(dict.fromkeys(within(one, blocks) for one in found))
