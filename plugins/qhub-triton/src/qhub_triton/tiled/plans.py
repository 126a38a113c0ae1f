"""How the work is cut: block sizes of the two kernels for a shape and a number of rows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

__all__ = ["Few", "Many", "Plan", "Size", "Wide", "candidates", "config_of", "named", "plan", "plan_of", "within"]

# Bytes of shared memory that the stages of a program may take: an H100 has 227 KiB of it for one.
_SHARED = 224 << 10


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
    ``overlap``: when the kernel after it may begin, "early", "late" (the last block has been multiplied) or "" (at the
    end): programs that wait for this one's end are in the way of its reads where those are all there is to do.
    """

    warps: int
    block_n: int
    block_m: int
    split: int
    stages: int
    overlap: str = "early"
    registers: int = 0


@dataclass(frozen=True)
class Wide:
    """Cuts the work of :mod:`qhub_triton.wide.kernel`: see there."""

    split: int
    stages: int


Plan = Few | Many | Wide


@dataclass(frozen=True)
class Size:
    """Is a weight of ``n`` rows on a GPU of ``processors``.

    ``blocks``: of a row; ``depth``: weights of a row in a block. ``light``: scales are plain, and there are no zeros;
    else widening weights in a program for many rows costs more than reading them. ``looked_up``: codes stand for the
    numbers of a table, which takes longer. ``stages``: the most that :class:`Wide` has room for; 0 where it cannot be
    used.
    """

    n: int
    blocks: int
    depth: int
    processors: int
    light: bool
    looked_up: bool = False
    stages: int = 0


def plan_of(config: dict[str, Any]) -> Plan:
    """Return the plan that ``config``, plain data, describes."""
    own = dict(config)
    return {"few": Few, "many": Many, "wide": Wide}[own.pop("kernel")](**own)


def config_of(plan: Plan) -> dict[str, Any]:
    """Return ``plan`` as plain data."""
    return {"kernel": type(plan).__name__.lower(), **asdict(plan)}


def named(plans: Iterable[Plan]) -> dict[str, dict[str, Any]]:
    """Return ``plans`` as plain data, each under a name made of its values."""
    found = [config_of(one) for one in plans]
    return {"-".join(str(value) for value in one.values()): one for one in found}


def plan(size: Size, m: int) -> Plan:
    """Return a plan for ``m`` rows of input.

    A rule drawn from measurements on an H100; a table of measurements goes before it.
    """
    n, blocks, processors = size.n, size.blocks, size.processors
    tall, short = -(-n // 128), -(-n // 64)
    # Small weights: smaller programs, and fewer parts of their short rows.
    small = blocks <= 32 and short <= processors // 2
    if m <= 8 and not size.light:
        pairs = -(-n // 32)
        if pairs >= 3 * processors:
            return Few(4, 2, 2, 8)
        return Few(8, 2, 2, 8) if pairs >= 1.5 * processors or blocks <= 32 else Few(16, 1, 1, 8)
    if m <= 2 and size.looked_up:
        return Few(8, 2, 2 if small else 1, 8)
    if m <= 16:
        # Four programs of 64 rows for each processor.
        split = _doubled(short, 4 * processors, 4 if small else 8)
        return within(Many(4, 64, 8 if m <= 8 else 16, split, 4, overlap="late"), size)
    if small and m <= 32:
        return within(Many(4, 64, 32, 4, 3, overlap="late"), size)
    if small and m <= 64:
        return within(Many(4, 64, 64, 4, 4), size)
    if m <= 64:
        return within(Many(8, 128, 32 if m <= 32 else 64, _doubled(tall, 2 * processors, 8), 4), size)
    split = _doubled(tall * -(-m // 128), processors, 4)
    if size.stages and tall * -(-m // 128) * split * 2 > processors:
        return within(Wide(split, size.stages), size)
    if m <= 128:
        if tall > processors:
            return within(Many(16, 256, 128, 1, 4, registers=128), size)
        return within(Many(8, 128, 64, _doubled(2 * tall, 2 * processors, 4), 3, registers=128), size)
    if tall * -(-m // 128) <= processors:
        if blocks < 64:
            return within(Many(8, 128, 128, 1, 3), size)
        return within(Many(8, 128, 128, 2, 3, registers=128), size)
    return within(Many(8, 128, 256, 1, 3), size)


def _doubled(tiles: int, most: int, limit: int) -> int:
    """Return the largest power of two up to ``limit`` by which ``tiles`` can be multiplied and not pass ``most``."""
    split = 1
    while split < limit and tiles * split * 2 <= most:
        split *= 2
    return split


def within(chosen: Plan, size: Size) -> Plan:
    """Return ``chosen`` with no more parts than get a block each, and no more than shared memory holds."""
    if isinstance(chosen, Wide):
        return replace(chosen, split=max(1, min(chosen.split, size.blocks)), stages=min(chosen.stages, size.stages))
    if not isinstance(chosen, Many):
        return chosen
    each = -(-size.blocks // max(1, min(chosen.split, size.blocks)))
    chosen = replace(chosen, split=-(-size.blocks // each))
    # A stage: a block of inputs in 16 bits, and the words of a block of weights.
    while chosen.stages * (chosen.block_m * size.depth * 2 + chosen.block_n * 64) > _SHARED:
        if chosen.stages > 2:
            chosen = replace(chosen, stages=chosen.stages - 1)
        elif chosen.block_m > 16:
            chosen = replace(chosen, block_m=chosen.block_m // 2)
        else:
            break
    return chosen


def candidates(size: Size, m: int) -> list[Plan]:
    """Return the plans that are worth measuring, those near the rule's."""
    chosen = plan(replace(size, stages=0), m)
    found: list[Plan] = [plan(size, m), chosen]
    if size.stages and m > 64:
        found += [Wide(split, size.stages) for split in ((1, 2, 4) if m <= 512 else (1,))]
    splits: tuple[int, ...] = (1, 2, 4, 8)
    if isinstance(chosen, Many):
        splits = tuple(s for s in (chosen.split // 2, chosen.split, chosen.split * 2) if 1 <= s <= 8)
    if m <= 8:
        found += [Few(8, 2, 2, 8), Few(4, 2, 2, 8), Few(16, 1, 1, 8)]
        found += [Many(4, 64, 8, split, 6, overlap="late") for split in splits]
    if m <= 16:
        rows = 8 if m <= 8 else 16
        found += [Many(4, 64, rows, split, 4, overlap="late") for split in splits]
        found += [Many(8, 128, 16, split, 4) for split in splits]
    elif m <= 32:
        found += [Many(8, 128, 32, split, 4) for split in splits]
        found += [Many(4, 64, 32, split, 3, overlap="late") for split in splits]
    elif m <= 64:
        found += [Many(8, 128, 64, split, 4) for split in splits] + [Many(4, 64, 64, split, 4) for split in splits]
    elif m <= 128:
        found += [Many(8, 128, 64, split, 3, registers=128) for split in splits]
        found += [Many(16, 256, 64, 1, 3), Many(16, 256, 128, 1, 4, registers=128)]
        found += [Many(8, 128, 128, split, 3, registers=128) for split in splits]
    else:
        found += [Many(8, 128, 256, 1, 3), Many(8, 128, 128, 1, 3, registers=128), Many(8, 128, 128, 1, 3)]
    return list(dict.fromkeys(within(one, size) for one in found))
