"""One piece of memory for all that a call needs between its kernels: a single allocation."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Plan", "Space"]

_ALIGNMENT = 256


class Plan:
    """Lays out named pieces one after the other; made once for a number of rows."""

    def __init__(self) -> None:
        self.pieces: dict[str, tuple[int, int, torch.dtype]] = {}
        self.nbytes = 0

    def add(self, name: str, count: int, dtype: torch.dtype) -> None:
        """Add ``count`` values of ``dtype``."""
        self.pieces[name] = (self.nbytes, count, dtype)
        self.nbytes += -(-count * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT


class Space:
    """Is the memory of a plan."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self.pieces = plan.pieces
        self.memory = torch.empty(plan.nbytes, dtype=torch.uint8, device=device)
        self.base = self.memory.data_ptr()

    def tensor(self, name: str) -> Tensor:
        """Return a piece as a flat tensor."""
        start, count, dtype = self.pieces[name]
        return self.memory[start : start + count * dtype.itemsize].view(dtype)

    def address(self, name: str) -> int:
        """Return where a piece begins."""
        return self.base + self.pieces[name][0]
