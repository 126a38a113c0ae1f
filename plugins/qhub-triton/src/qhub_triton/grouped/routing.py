"""Which rows meet which expert: pairs of a token and an expert, sorted and cut into tiles, without asking the device.

A pair is one of the S = tokens x top-k entries of the router's answer. How many pairs an expert has is known to the
device alone, so there are as many tiles as there could be, and those that are not needed have no expert.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["Routes", "routed"]

# Pairs up to which one program sorts them all by comparing each with each.
_SMALL = 1024


@dataclass(frozen=True)
class Routes:
    """Says where the pairs go. ``experts`` (tiles,): of each tile, or of each pair while ``single``; -1 (or any number
    that is no expert) for none. ``starts``, ``ends`` (tiles,) int32: its rows among the sorted pairs. ``order`` (S,):
    the pair at each sorted place; ``position`` (S,): the place of each pair. ``block``: most rows of a tile.

    ``single``: nothing is sorted: each pair is a tile of its own, in the router's order, and the other tensors are the
    same one.
    """

    experts: Tensor
    starts: Tensor
    ends: Tensor
    order: Tensor
    position: Tensor
    tiles: int
    block: int
    single: bool


def routed(ids: Tensor, experts: int, block: int) -> Routes:
    """Return the routes of the pairs ``ids`` (S,) of any integer dtype, in tiles of ``block`` rows.

    Numbers that are no expert (0 to ``experts`` - 1) get no tile, and come last.
    """
    count = ids.shape[0]
    most = min(count, experts)
    tiles = most + (count - most) // block
    device = ids.device
    order = torch.empty(count, dtype=torch.int32, device=device)
    position = torch.empty_like(order)
    table = torch.empty(3, tiles, dtype=torch.int32, device=device)
    if count <= _SMALL:
        size = max(16, triton.next_power_of_2(count))
        _route[(1,)](
            ids, order, position, table, count, experts, tiles, BLOCK=block, SIZE=size,
            EXPERTS=max(16, triton.next_power_of_2(experts)), TILES=max(16, triton.next_power_of_2(tiles)),
            CHUNK=min(size, 16), num_warps=16 if size >= 512 else 8 if size >= 128 else 4,
        )  # fmt: skip
    else:
        _sorted(ids, order, position, table, experts, block)
    return Routes(table[0], table[1], table[2], order, position, tiles, block, False)


def _sorted(ids: Tensor, order: Tensor, position: Tensor, table: Tensor, experts: int, block: int) -> None:
    device = ids.device
    known = torch.where((ids < 0) | (ids >= experts), experts, ids).to(torch.int32)
    ascending, places = torch.sort(known, stable=True)
    order.copy_(places)
    position[places] = torch.arange(ids.shape[0], dtype=torch.int32, device=device)
    numbers = torch.arange(experts, dtype=torch.int32, device=device)
    ends = torch.searchsorted(ascending, numbers, right=True, out_int32=True)
    begins = torch.searchsorted(ascending, numbers, out_int32=True)
    needed = (ends - begins + (block - 1)) // block
    last = needed.cumsum(0, dtype=torch.int32)
    tile = torch.arange(table.shape[1], dtype=torch.int32, device=device)
    expert = torch.searchsorted(last, tile, right=True, out_int32=True)
    held = expert.clamp(max=experts - 1)
    table[0] = torch.where(expert < experts, expert, -1)
    table[1] = begins[held] + (tile - (last - needed)[held]) * block
    table[2] = ends[held]


@triton.jit
def _known(ids, at, count, experts):
    """Return the numbers at ``at``: what is no expert counts as the one after the last, what is no pair as the next."""
    number = tl.load(ids + at, mask=at < count, other=0).to(tl.int32)
    number = tl.where((number < 0) | (number >= experts), experts, number)
    return tl.where(at < count, number, experts + 1)


@triton.jit
def _route(
    ids, order, position, table, count, experts, tiles,
    BLOCK: tl.constexpr, SIZE: tl.constexpr, EXPERTS: tl.constexpr, TILES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Sort ``count`` pairs by expert, keeping their order, and cut those of each expert into tiles of BLOCK rows."""
    pair = tl.arange(0, SIZE)
    number = _known(ids, pair, count, experts)
    expert = tl.arange(0, EXPERTS)
    rank = tl.zeros((SIZE,), tl.int32)
    amount = tl.zeros((EXPERTS,), tl.int32)
    for base in range(0, count, CHUNK):
        at = base + tl.arange(0, CHUNK)
        other = _known(ids, at, count, experts)
        ahead = (other[None, :] < number[:, None]) | (
            (other[None, :] == number[:, None]) & (at[None, :] < pair[:, None])
        )
        rank += tl.sum(ahead.to(tl.int32), 1)
        amount += tl.sum((other[None, :] == expert[:, None]).to(tl.int32), 1)
    tl.store(order + rank, pair, mask=pair < count)
    tl.store(position + pair, rank, mask=pair < count)
    amount = tl.where(expert < experts, amount, 0)
    needed = (amount + BLOCK - 1) // BLOCK
    last = tl.cumsum(needed, 0)
    end = tl.cumsum(amount, 0)
    tile = tl.arange(0, TILES)
    whose = tl.sum(((last[None, :] <= tile[:, None]) & (expert < experts)[None, :]).to(tl.int32), 1)
    hit = whose[:, None] == expert[None, :]
    its_end = tl.sum(tl.where(hit, end[None, :], 0), 1)
    its_begin = tl.sum(tl.where(hit, (end - amount)[None, :], 0), 1)
    its_first = tl.sum(tl.where(hit, (last - needed)[None, :], 0), 1)
    inside = tile < tiles
    tl.store(table + tile, tl.where(whose < experts, whose, -1), mask=inside)
    tl.store(table + tiles + tile, its_begin + (tile - its_first) * BLOCK, mask=inside)
    tl.store(table + 2 * tiles + tile, its_end, mask=inside)
