"""Cuts a matrix into pieces of few rows, so that what is computed from one piece at a time takes little memory."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["all_finite", "chunk_size", "row_chunks"]

# Weights handled at a time on a CPU: 0.5 MB in float32, so that a dozen temporaries take 6 MB. On one core pieces of
# 2^16 to 2^20 weights take the same time; torch gives each thread at least 2^15 elements (at::internal::GRAIN_SIZE).
_CPU, _PER_THREAD = 1 << 17, 1 << 15
# On accelerators starting an operation takes as long as some 10^6 weights do.
_ACCELERATOR = 1 << 24


def chunk_size(device: torch.device) -> int:
    """Return how many weights are handled at a time on ``device``."""
    return max(_CPU, _PER_THREAD * torch.get_num_threads()) if device.type == "cpu" else _ACCELERATOR


def row_chunks(rows: int, cols: int, device: torch.device, group: int = 1) -> Iterator[slice]:
    """Yield slices that cover ``rows`` rows of ``cols`` weights in order, of at most :func:`chunk_size` weights each.

    Every piece but the last holds a whole number of runs of ``group`` consecutive weights of the flattened matrix;
    where so few weights hold none that also ends with a row, a piece is the smallest that does.
    """
    unit = group // math.gcd(group, cols)
    step = max(1, chunk_size(device) // max(1, unit * cols)) * unit
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def all_finite(tensor: Tensor) -> bool:
    """Return whether ``tensor`` of any float dtype holds neither NaN nor infinity; makes no copy of 2 bytes and more.

    The smallest and the largest value tell: both are NaN where one value is (``torch.aminmax``).
    """
    if not tensor.numel():
        return True
    if tensor.element_size() == 1:
        # torch compares no 8-bit floats.
        tensor = tensor.float()
    low, high = torch.aminmax(tensor.detach())
    return bool(torch.isfinite(low)) and bool(torch.isfinite(high))
