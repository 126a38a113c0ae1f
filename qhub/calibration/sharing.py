"""Several processes: each sees its share of the samples, and sums and maxima are taken over all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

from qhub.calibration.statistics import MAXIMA, Sums

__all__ = ["barrier", "from_first", "processes", "rank", "reduce_sums", "share"]

_T = TypeVar("_T")


def processes() -> int:
    """Return how many processes calibrate together; 1 without ``torch.distributed``."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return which of them this one is."""
    return dist.get_rank() if processes() > 1 else 0


def share(items: Sequence[_T]) -> list[_T]:
    """Return this process's share: every n-th, so that long and short samples mix."""
    return list(items[rank() :: processes()])


def reduce_sums(sums: Sums) -> None:
    """Replace the sums, and the maxima among them, by those over all processes."""
    if processes() == 1:
        return
    for name in sums.names:
        dist.all_reduce(sums.tensors[name], op=dist.ReduceOp.MAX if name in MAXIMA else dist.ReduceOp.SUM)
    count = torch.tensor(sums.tokens, device=next((t.device for t in sums.tensors.values()), None))
    dist.all_reduce(count)
    sums.tokens = int(count)


def from_first(value: _T) -> _T:
    """Return the value that the first process gives; a small one, it is pickled."""
    if processes() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def barrier() -> None:
    """Wait for the others."""
    if processes() > 1:
        dist.barrier()
