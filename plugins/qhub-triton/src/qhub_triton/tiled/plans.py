"""How the work is cut: block sizes of the two kernels for a shape and a number of rows."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

__all__ = [
    "Few",
    "Many",
    "Plan",
    "Size",
    "Tile",
    "Wide",
    "config_of",
    "plan",
    "plan_of",
    "within",
]

# Bytes of shared memory that a program has besides its stages.
_BESIDE = 3 << 10
# Bytes of shared memory that the tables of :mod:`qhub_triton.tiled.banks` take.
_BANKS = 32 << 10
# What it costs to add the parts of a tile of Wide up, by how many columns could be multiplied meanwhile: for each part.
_SUM = 800


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

    ``memory``: bytes of shared memory that a program may have. ``blocks``: of a row; ``depth``: weights of a row in a
    block. ``nested``: scales lie under a second level of them: then widening weights in a program for many rows costs
    more than reading them. ``zeros``: weights are less a zero of their group. ``looked_up``: codes of 4 bits stand for
    the numbers of a table. ``banks``: programs for many rows may have that in shared memory beside their stages.
    ``wide``: the tiles that :class:`Wide` can have, by rising rows; none where it cannot be used.
    """

    n: int
    blocks: int
    depth: int
    processors: int
    memory: int = 227 << 10
    nested: bool = False
    zeros: bool = False
    looked_up: bool = False
    banks: bool = False
    wide: tuple[Tile, ...] = ()


def plan_of(config: dict[str, Any]) -> Plan:
    """Return the plan that ``config``, plain data, describes."""
    own = dict(config)
    return {"few": Few, "many": Many, "wide": Wide}[own.pop("kernel")](**own)


def config_of(plan: Plan) -> dict[str, Any]:
    """Return ``plan`` as plain data."""
    return {"kernel": type(plan).__name__.lower(), **asdict(plan)}


def plan(size: Size, m: int) -> Plan:
    """Return a plan for ``m`` rows of input.

    A rule drawn from measurements on an H100; a table of measurements goes before it.
    """
    n, blocks, processors = size.n, size.blocks, size.processors
    tall, short, pairs = -(-n // 128), -(-n // 64), -(-n // 32)
    # Small weights: smaller programs, and fewer parts of their short rows.
    small = blocks <= 32 and short <= processors // 2
    if m <= 8 and size.nested:
        return _few(pairs, blocks, processors)
    if m <= 8 and size.looked_up:
        return within(_looked_up(pairs, blocks, processors, size.banks), size)
    if m <= 64 and size.banks:
        return within(_banked(tall, m, processors), size)
    if m <= 8 and size.zeros and small:
        return Few(8, 2, 2, 8)
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


def _few(pairs: int, blocks: int, processors: int) -> Few:
    if pairs >= 3 * processors:
        return Few(4, 2, 2, 8)
    return Few(8, 2, 2, 8) if pairs >= 1.5 * processors or blocks <= 32 else Few(16, 1, 1, 8)


def _looked_up(pairs: int, blocks: int, processors: int, banks: bool) -> Few | Many:
    """Return the plan for up to 8 rows where codes are looked up: see :mod:`qhub_triton.tiled.banks`."""
    if pairs >= 3 * processors:
        return Few(4, 2 if blocks <= 32 else 1, 2, 8)
    if pairs >= 1.5 * processors:
        return Few(8, 2, 2, 8)
    if blocks <= 32:
        return Few(8, 1, 2, 8)
    return Many(4, 64, 8, 8, 3, overlap="late", banks=True) if banks else Few(16, 1, 1, 8)


def _banked(tall: int, m: int, processors: int) -> Many:
    """Return the same for up to 64 rows."""
    # Tables leave room for two such programs on a processor; with inputs of 64 rows, for one.
    split = _doubled(tall, processors if m > 32 else 2 * processors, 8)
    rows = 16 if m <= 16 else 32 if m <= 32 else 64
    return Many(8, 128, rows, split, 6 if m <= 16 else 4, overlap="late", banks=True)


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
    room = size.memory - _BESIDE - (_BANKS if chosen.banks else 0)
    while chosen.stages * (chosen.block_m * size.depth * 2 + chosen.block_n * 64) > room:
        if chosen.stages > 2:
            chosen = replace(chosen, stages=chosen.stages - 1)
        elif chosen.block_m > 16:
            chosen = replace(chosen, block_m=chosen.block_m // 2)
        elif chosen.block_n > 64:
            chosen = replace(chosen, block_n=chosen.block_n // 2, warps=max(4, chosen.warps // 2))
        else:
            break
    return chosen
