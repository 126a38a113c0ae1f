"""How the work is cut: block sizes of the two kernels for a shape and a number of rows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

__all__ = [
    "Few",
    "Many",
    "Plan",
    "Size",
    "Tile",
    "Wide",
    "candidates",
    "config_of",
    "named",
    "plan",
    "plan_of",
    "probed",
    "within",
]

# Bytes of shared memory that the stages of a program may take: an H100 has 227 KiB of it for one.
_SHARED = 224 << 10
# Bytes of shared memory that the tables of :mod:`qhub_triton.tiled.banks` take.
_BANKS = 32 << 10
# What it costs to add the parts of a tile of Wide up, by how many columns could be multiplied meanwhile: for each part.
_SUM = 800
# Rows of input at which plans of more rows than were compared are looked for.
_WALK = tuple(range(128, 4097, 128)) + tuple(1 << i for i in range(13, 20))


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
    ``banks``: codes of 4 bits are looked up in shared memory, not in registers.
    """

    warps: int
    block_n: int
    block_m: int
    split: int
    stages: int
    overlap: str = "early"
    registers: int = 0
    banks: bool = False


@dataclass(frozen=True)
class Wide:
    """Cuts the work of :mod:`qhub_triton.wide.kernel`: see there. ``rows``: of x, of a tile."""

    split: int
    stages: int
    rows: int = 128


Plan = Few | Many | Wide


@dataclass(frozen=True)
class Tile:
    """Is a tile that :class:`Wide` can have: ``rows`` of x, the most ``stages`` there is room for, and the ``share`` of
    a dense product's rate that is reached with it."""

    rows: int
    stages: int
    share: float


@dataclass(frozen=True)
class Size:
    """Is a weight of ``n`` rows on a GPU of ``processors``.

    ``blocks``: of a row; ``depth``: weights of a row in a block. ``light``: scales are plain, and there are no zeros;
    else widening weights in a program for many rows costs more than reading them. ``looked_up``: codes of 4 bits stand
    for the numbers of a table. ``wide``: the tiles that :class:`Wide` can have, by rising rows; none where
    it cannot be used.
    """

    n: int
    blocks: int
    depth: int
    processors: int
    light: bool
    looked_up: bool = False
    wide: tuple[Tile, ...] = ()


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
    if m <= 8 and (size.looked_up or not size.light):
        pairs = -(-n // 32)
        if pairs >= 3 * processors:
            return Few(4, 2, 2, 8)
        if pairs < 1.5 * processors and (size.looked_up or blocks > 32):
            return Few(8, 1, 2, 8) if blocks <= 32 else Few(16, 1, 1, 8)
        return Few(8, 2, 2, 8)
    if m <= 64 and size.looked_up:
        # Tables leave room for one such program on a processor, or for two with few rows.
        split = _doubled(tall, processors if m > 32 else 2 * processors, 8)
        return within(
            Many(8, 128, 16 if m <= 16 else 32 if m <= 32 else 64, split, 6 if m <= 16 else 4, banks=True), size
        )
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
    wide = _wide(size, m)
    if wide is not None:
        return within(wide, size)
    if m <= 128:
        if tall > processors:
            return within(Many(16, 256, 128, 1, 4, registers=128), size)
        return within(Many(8, 128, 64, _doubled(2 * tall, 2 * processors, 4), 3, registers=128), size)
    if tall * -(-m // 128) <= processors:
        if blocks < 64:
            return within(Many(8, 128, 128, 1, 3), size)
        return within(Many(8, 128, 128, 2, 3, registers=128), size)
    return within(Many(8, 128, 256, 1, 3), size)


def _wide(size: Size, m: int) -> Wide | None:
    """Return the plan of that kind that takes the least time by the rounds its programs need; None where they would
    not fill the processors."""
    if not size.wide:
        return None
    found: list[tuple[float, Wide]] = []
    for tile in size.wide if m > 128 else size.wide[:1]:
        tiles = -(-size.n // 128) * -(-m // tile.rows)
        most = _doubled(tiles, size.processors, 4)
        if tile is size.wide[0] and tiles * most * 2 <= size.processors:
            return None
        for split in sorted({most, 1 if tile.rows > 128 else most}):
            columns = size.blocks * size.depth / split / tile.share + (split * _SUM if split > 1 else 0)
            rounds = -(-tiles * split // size.processors)
            found.append((rounds * tile.rows * columns, Wide(split, tile.stages, tile.rows)))
    return min(found, key=lambda one: one[0])[1]


def _doubled(tiles: int, most: int, limit: int) -> int:
    """Return the largest power of two up to ``limit`` by which ``tiles`` can be multiplied and not pass ``most``."""
    split = 1
    while split < limit and tiles * split * 2 <= most:
        split *= 2
    return split


def within(chosen: Plan, size: Size) -> Plan:
    """Return ``chosen`` with no more parts than get a block each, and no more than shared memory holds."""
    if isinstance(chosen, Wide):
        if not size.wide:
            return chosen
        tile = next((one for one in size.wide if one.rows == chosen.rows), size.wide[0])
        # One stage would wait for itself.
        stages = max(2, min(chosen.stages, tile.stages))
        return Wide(max(1, min(chosen.split, size.blocks)), stages, tile.rows)
    if not isinstance(chosen, Many):
        return chosen
    each = -(-size.blocks // max(1, min(chosen.split, size.blocks)))
    chosen = replace(chosen, split=-(-size.blocks // each))
    # A stage: a block of inputs in 16 bits, and the words of a block of weights.
    room = _SHARED - (_BANKS if chosen.banks else 0)
    while chosen.stages * (chosen.block_m * size.depth * 2 + chosen.block_n * 64) > room:
        if chosen.stages > 2:
            chosen = replace(chosen, stages=chosen.stages - 1)
        elif chosen.block_m > 16:
            chosen = replace(chosen, block_m=chosen.block_m // 2)
        else:
            break
    return chosen


def candidates(size: Size, m: int) -> list[Plan]:
    """Return the plans that are worth measuring, those near the rule's."""
    chosen = plan(replace(size, wide=()), m)
    found: list[Plan] = [plan(size, m), chosen]
    for tile in size.wide if m > 128 else size.wide[:1] if m > 64 else ():
        found += [Wide(split, tile.stages, tile.rows) for split in ((1, 2, 4) if m <= 512 else (1,))]
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


def probed(size: Size, compared: tuple[int, ...]) -> list[int | tuple[int, dict[str, Any]]]:
    """Return the rows of input at which to compare a product with another: ``compared``, and, each with few rows, the
    plans for more rows that cut the work in a way that none of those does."""
    met = {_cut(plan(size, m)) for m in compared}
    found: list[int | tuple[int, dict[str, Any]]] = list(compared)
    for m in _WALK:
        one = plan(size, m)
        if _cut(one) not in met:
            met.add(_cut(one))
            # Tiles of up to 256 rows, the last of them not full.
            found.append((min(m, 300), config_of(one)))
    return found


def _cut(one: Plan) -> tuple[object, ...]:
    """Return what of a plan decides which code runs."""
    if isinstance(one, Few):
        return "few", one.block_m
    if isinstance(one, Many):
        return "many", one.block_m, one.split > 1, one.banks
    return "wide", one.rows, one.split > 1
