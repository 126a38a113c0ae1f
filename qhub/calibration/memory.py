"""Remembers products with weights that are quantized already, so that later passes over a block need not repeat them.

Within a block each pass begins at its start. What a finished layer computes for a sample stays the same until the block
is done, because all that comes before it is finished too; so does an attention with nothing unfinished before it.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from qhub.calibration.products import Key

__all__ = ["ATTENTION", "ProductMemory", "RunMemory", "budget"]

# Beside the blocks' outputs themselves; where it is used up, products are computed again.
_CPU_BYTES = 1 << 30
_SHARE_OF_FREE = 0.4


def budget(device: torch.device) -> int:
    """Return how many bytes may be remembered on ``device``."""
    if device.type == "cuda":
        return int(_SHARE_OF_FREE * torch.cuda.mem_get_info(device)[0])
    return _CPU_BYTES if device.type == "cpu" else 0


# Stands for every scaled dot product attention of a block; the n-th of a run is told by its number.
ATTENTION = Key("attention")


class ProductMemory:
    """Holds products of one block. ``finished``: the matrices whose weights will not change any more."""

    def __init__(self, limit: int) -> None:
        self.finished: set[Key] = set()
        self.left = limit
        self.kept: dict[tuple[int, Key, int], tuple[Tensor, int]] = {}

    def run(self, number: int) -> RunMemory:
        """Return the memory for one run with batch ``number``."""
        return RunMemory(self, number)


class RunMemory:
    """Is asked for each product of a run, in order."""

    def __init__(self, memory: ProductMemory, number: int) -> None:
        self._memory = memory
        self._number = number
        self._uses: Counter[Key] = Counter()
        self._clean = True

    def recall(self, key: Key) -> Tensor | None:
        """Return the product with ``key`` that an earlier run of this batch made at this place; None if there is
        none."""
        self._uses[key] += 1
        self._clean = self._clean and (key == ATTENTION or key in self._memory.finished)
        place = (self._number, key, self._uses[key])
        found = self._memory.kept.get(place)
        if found is None:
            return None
        value, version = found
        if value._version != version:
            # The block wrote into it afterwards.
            del self._memory.kept[place]
            return None
        return value

    def keep(self, key: Key, value: Tensor) -> None:
        """Remember the product that was just made with ``key``, if its weight is finished and there is room."""
        settled = self._clean if key == ATTENTION else key in self._memory.finished
        if not settled or value.nbytes > self._memory.left:
            return
        self._memory.left -= value.nbytes
        self._memory.kept[self._number, key, self._uses[key]] = value, value._version
