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
    tall, short = -(-n // 128), -(-n // 64)
    # Small weights: smaller programs, and fewer parts of their short rows.
    small = blocks <= 32 and short <= processors // 2
    if m <= 4 and small:
        return Few(8, 2, 2, 8)
    if m <= 16:
        # Four programs of 64 rows for each processor.
        split = _doubled(short, 4 * processors, 4 if small else 8)
        return within(Many(4, 64, 8 if m <= 8 else 16, split, 4, overlap=False), blocks)
    if small and m <= 32:
        return within(Many(4, 64, 32, 4, 3, overlap=False), blocks)
    if small and m <= 64:
        return within(Many(4, 64, 64, 4, 4), blocks)
    if m <= 64:
        return within(Many(8, 128, 32 if m <= 32 else 64, _doubled(tall, 2 * processors, 8), 4), blocks)
    if m <= 128:
        if tall > processors:
            return Many(16, 256, 128, 1, 4, registers=128)
        return within(Many(8, 128, 64, _doubled(2 * tall, 2 * processors, 4), 3, registers=128), blocks)
    if tall * -(-m // 128) <= processors:
        if blocks < 64:
            return Many(8, 128, 128, 1, 3)
        return within(Many(8, 128, 128, 2, 3, registers=128), blocks)
    return Many(8, 128, 256, 1, 3)


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
    chosen = plan(n, blocks, m, processors)
    found: list[Few | Many] = [chosen]
    splits = (1, 2, 4, 8)
    if isinstance(chosen, Many):
        splits = tuple(s for s in (chosen.split // 2, chosen.split, chosen.split * 2) if 1 <= s <= 8)
    if m <= 8:
        found += [Few(8, 2, 2, 8), Few(4, 2, 2, 8), Few(16, 1, 1, 8)]
        found += [Many(4, 64, 8, split, 6, overlap=False) for split in splits]
    if m <= 16:
        rows = 8 if m <= 8 else 16
        found += [Many(4, 64, rows, split, 4, overlap=False) for split in splits]
        found += [Many(8, 128, 16, split, 4) for split in splits]
    elif m <= 32:
        found += [Many(8, 128, 32, split, 4) for split in splits]
        found += [Many(4, 64, 32, split, 3, overlap=False) for split in splits]
    elif m <= 64:
        found += [Many(8, 128, 64, split, 4) for split in splits] + [Many(4, 64, 64, split, 4) for split in splits]
    elif m <= 128:
        found += [Many(8, 128, 64, split, 3, registers=128) for split in splits]
        found += [Many(16, 256, 64, 1, 3), Many(16, 256, 128, 1, 4, registers=128)]
        found += [Many(8, 128, 128, split, 3, registers=128) for split in splits]
    else:
        found += [Many(8, 128, 256, 1, 3), Many(8, 128, 128, 1, 3, registers=128), Many(8, 128, 128, 1, 3)]
    return list(dict.fromkeys(within(one, blocks) for one in found))
