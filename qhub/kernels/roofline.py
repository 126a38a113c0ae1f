"""Guesses a kernel's time from what it must move and compute: for cards and shapes that nobody measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qhub.kernels.hardware import Card

__all__ = ["Cost", "Work", "guess"]


@dataclass(frozen=True)
class Cost:
    """Says what share of a card a kernel reaches, as its author measured it somewhere.

    ``bandwidth``: share of the memory's rate while it reads the weight. ``rate``: share of the rate of ``unit``:
    ``"half"`` (matrix units with 16-bit inputs), ``"byte"`` (with 8-bit inputs), ``"vector"`` (no matrix unit).
    ``tile``: rows that are multiplied at once: M is rounded up to a multiple. ``passes``: rows after which the weight
    is read again; 0: it is read once. ``through_dense``: the weight is written and read back in the input's dtype on
    the way. ``launch``: seconds besides.
    """

    bandwidth: float = 0.5
    rate: float = 0.5
    unit: str = "half"
    tile: int = 1
    passes: int = 0
    through_dense: bool = False
    launch: float = 3e-6


@dataclass(frozen=True)
class Work:
    """Is one product: ``n`` x ``k`` weights in ``weight`` bytes, inputs and outputs of ``item`` bytes a number."""

    n: int
    k: int
    weight: int
    item: int

    def floor(self, m: int, card: Card, unit: str = "half") -> float:
        """Return the seconds below which no kernel gets for ``m`` rows: each byte moved once, or the arithmetic."""
        moved = self.weight + m * (self.n + self.k) * self.item
        return max(moved / card.bandwidth, 2 * m * self.n * self.k / card.rate(unit, self.item))


def guess(cost: Cost, work: Work, m: int, card: Card) -> float:
    """Return the seconds that a kernel of ``cost`` may take for ``m`` rows of input."""
    rows = -(-m // cost.tile) * cost.tile
    weight = work.weight * (-(-m // cost.passes) if cost.passes else 1)
    moved = weight + m * (work.n + work.k) * work.item
    computed = 2 * rows * work.n * work.k / (card.rate(cost.unit, work.item) * cost.rate)
    if cost.through_dense:
        # Decoding writes the weight, the product reads it: one after the other.
        size = work.n * work.k * work.item
        decoded = (work.weight + size) / (card.bandwidth * cost.bandwidth)
        return cost.launch + decoded + max((size + m * (work.n + work.k) * work.item) / card.bandwidth, computed)
    return cost.launch + max(moved / (card.bandwidth * cost.bandwidth), computed)
