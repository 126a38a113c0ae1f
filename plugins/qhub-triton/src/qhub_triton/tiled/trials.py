"""Plans beside the rule's: those worth measuring for a number of rows, and those to be compared before use."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from qhub_triton.tiled.plans import Few, Many, Plan, Size, Wide, config_of, plan, within

__all__ = ["candidates", "named", "probed"]

# Rows of input at which plans of more rows than were compared are looked for.
_WALK = tuple(range(128, 4097, 128)) + tuple(1 << i for i in range(13, 20))


def named(plans: Iterable[Plan]) -> dict[str, dict[str, Any]]:
    """Return ``plans`` as plain data, each under a name made of its values."""
    found = [config_of(one) for one in plans]
    return {"-".join(str(value) for value in one.values()): one for one in found}


def candidates(size: Size, m: int) -> list[Plan]:
    """Return the plans that are worth measuring, those near the rule's."""
    chosen = plan(replace(size, wide=()), m)
    found: list[Plan] = [plan(size, m), chosen]
    for tile in size.wide if m > 128 else size.wide[:1] if m > 64 else ():
        found += [Wide(split, tile.stages, tile.rows) for split in ((1, 2, 4) if m <= 512 else (1,))]
    splits: tuple[int, ...] = (1, 2, 4, 8)
    if isinstance(chosen, Many):
        splits = tuple(s for s in (chosen.split // 2, chosen.split, chosen.split * 2) if 1 <= s <= 8)
    found += _with_tables(m, splits, size) or _without(m, splits)
    return list(dict.fromkeys(within(one, size) for one in found))


def _with_tables(m: int, splits: tuple[int, ...], size: Size) -> list[Plan]:
    """Return plans that look codes up in shared memory, with ``splits`` parts where they have parts."""
    if m > 64 or not size.looked_up:
        return []
    found: list[Plan] = []
    if m <= 8:
        found = [Few(warps, tall, 2, 8) for warps in (4, 8) for tall in (1, 2)]
        found.append(Few(16, 1, 1, 8))
    if not size.banks:
        return found
    if m <= 8:
        return found + [Many(4, 64, 8, s, 3, overlap="late", banks=True) for s in splits]
    rows, stages = (16, 6) if m <= 16 else (32, 4) if m <= 32 else (64, 4)
    found += [Many(8, 128, rows, s, stages, overlap="late", banks=True) for s in splits]
    return found + [Many(4, 64, rows, s, 5, overlap="late", banks=True) for s in splits if rows > 16]


def _without(m: int, splits: tuple[int, ...]) -> list[Plan]:
    """Return plans that look nothing up in shared memory, with ``splits`` parts where they have parts."""
    found: list[Plan]
    if m <= 16:
        rows = 8 if m <= 8 else 16
        found = [Few(8, 2, 2, 8), Few(4, 2, 2, 8), Few(16, 1, 1, 8)] if m <= 8 else []
        found += [Many(4, 64, 8, s, 6, overlap="late") for s in splits if m <= 8]
        found += [Many(4, 64, rows, s, 4, overlap="late") for s in splits]
        return found + [Many(8, 128, 16, s, 4) for s in splits]
    if m <= 32:
        found = [Many(8, 128, 32, s, 4) for s in splits]
        return found + [Many(4, 64, 32, s, 3, overlap="late") for s in splits]
    if m <= 64:
        return [Many(warps, 16 * warps, 64, s, 4) for warps in (4, 8) for s in splits]
    if m <= 128:
        found = [Many(8, 128, 64, s, 3, registers=128) for s in splits]
        found += [Many(16, 256, 64, 1, 3), Many(16, 256, 128, 1, 4, registers=128)]
        return found + [Many(8, 128, 128, s, 3, registers=128) for s in splits]
    return [Many(8, 128, 256, 1, 3), Many(8, 128, 128, 1, 3, registers=128), Many(8, 128, 128, 1, 3)]


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
