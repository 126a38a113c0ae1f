"""Counters by which programs of one product learn that they are the last: zero before and after every launch.

Two streams at work must not share them, and a captured graph must find them zero whenever it is replayed first. So they
are made, zero, before anything is captured, a slot for each stream that comes along.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["SIZE", "counters", "prepare"]

# Counters of a slot: products of more tiles than that fill any GPU without sharing columns.
SIZE = 1 << 14
_SLOTS = 32

_pools: dict[torch.device, Tensor] = {}
_taken: dict[tuple[torch.device, int], Tensor] = {}


def prepare(device: torch.device) -> None:
    """Make the counters of ``device``, unless they are there, or a graph is being captured."""
    if device not in _pools and not _capturing(device):
        _pools[device] = torch.zeros(_SLOTS, SIZE, dtype=torch.int32, device=device)


def counters(device: torch.device, stream: int) -> Tensor:
    """Return SIZE counters (int32, zero) for ``stream``."""
    mine = _taken.get((device, stream))
    if mine is None:
        prepare(device)
        used = sum(1 for taken, _ in _taken if taken == device)
        if device not in _pools or used == _SLOTS:
            # Fresh ones for this launch alone; in a graph, the zeros are written again at every replay.
            return torch.zeros(SIZE, dtype=torch.int32, device=device)
        mine = _taken[device, stream] = _pools[device][used]
    return mine


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
