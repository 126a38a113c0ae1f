"""How the work is cut: block sizes of the two kernels for a shape and a number of rows."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

__all__ = ["Few", "Many", "plan", "plan_of"]


@dataclass(frozen=True)
class Few:
    """Cuts the work of :mod:`qhub_triton.tiled.few`: see there."""

    warps: int
    tall: int
    ahead: int
    block_m: int


@dataclass(frozen=True)
class Many:
    """Cuts the work of :mod:`qhub_triton.tiled.many`: see there."""

    warps: int
    block_n: int
    block_m: int
    split: int
    stages: int
    early: bool = False


def plan_of(config: dict[str, Any]) -> Few | Many:
    """Return the plan that ``config``, plain data, describes."""
    own = dict(config)
    return {"few": Few, "many": Many}[own.pop("kernel")](**own)


def config_of(plan: Few | Many) -> dict[str, Any]:
    """Return ``plan`` as plain data."""
    return {"kernel": type(plan).__name__.lower(), **asdict(plan)}


def plan(n: int, blocks: int, m: int, processors: int) -> Few | Many:
    """Return a plan for an output of ``n`` columns and ``m`` rows on a GPU of ``processors``.

    ``blocks``: of a row. What the measurements on an H100 say, as a rule; a table of measurements goes before it.
    """
    if m <= 16:
        warps = 8 if blocks >= 8 else 4
        return Few(warps, 1, 4 if blocks >= 4 * warps else 2, 8 if m <= 8 else 16)
    block_m = 32 if m <= 32 else 64 if m <= 64 else 128
    block_n = 128 if block_m == 128 and n >= 128 * processors // 2 else 64
    tiles = -(-n // block_n) * -(-m // block_m)
    split = 1
    while tiles * split < processors and split < 8 and blocks // (split * 2) >= 4:
        split *= 2
    return Many(8 if block_n == 128 else 4, block_n, block_m, split, 4 if block_m <= 64 else 3)


def within(chosen: Few | Many, blocks: int) -> Few | Many:
    """Return ``chosen`` with no more parts than there are blocks."""
    if isinstance(chosen, Many):
        return replace(chosen, split=max(1, min(chosen.split, blocks)))
    return chosen
