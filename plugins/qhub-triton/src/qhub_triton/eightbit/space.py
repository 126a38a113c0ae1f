"""One piece of memory for all that a call needs between its kernels: a single allocation."""

from __future__ import annotations

import torch
from torch import Tensor

from qhub_triton.launch import Launch

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
    """Is the memory of a plan. :meth:`at` gives a piece as a launch wants it: its address once compiled, a tensor
    before."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self.plan = plan
        self.memory = torch.empty(plan.nbytes, dtype=torch.uint8, device=device)
        self.base = self.memory.data_ptr()

    def tensor(self, name: str) -> Tensor:
        """Return a piece as a flat tensor."""
        start, count, dtype = self.plan.pieces[name]
        return self.memory[start : start + count * dtype.itemsize].view(dtype)

    def at(self, name: str, launch: Launch, device: int) -> Tensor | int:
        """Return a piece for ``launch`` on GPU number ``device``."""
        if launch.fast is not None and launch.device == device:
            return self.base + self.plan.pieces[name][0]
        return self.tensor(name)
