"""What the kernels for tiles reach of a card, by how much work widening a weight is: for what nobody measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qhub.kernels.spec import Cost
from qhub.layouts import Float8, Lookup
from qhub.layouts.tiled import Tiled
from qhub_triton.wide.tiles import tiles_of

if TYPE_CHECKING:
    from qhub.kernels import Problem

__all__ = ["cost", "wide_cost"]


def cost(problem: Problem) -> Cost:
    """Return the cost of the kernels in Triton, as measured on an H100."""
    return Cost(bandwidth=0.75, rate=0.75 * _share(problem), unit="half", tile=16, launch=3e-6)


def wide_cost(problem: Problem) -> Cost:
    """Return the cost of the kernel for many rows on Hopper, as measured on an H100 with 512 and 2048 rows."""
    assert isinstance(problem.layout, Tiled)
    share = max(tile.share for tile in tiles_of(problem.layout))
    return Cost(bandwidth=0.75, rate=0.95 * share, unit="half", tile=128, launch=4e-6)


def _share(problem: Problem) -> float:
    """Return the rate of a weight in Triton as a share of that of 4-bit integers with a constant zero point."""
    layout = problem.layout
    assert isinstance(layout, Tiled)
    of: Any = layout.of
    if isinstance(of, Lookup):
        return 0.56
    if isinstance(of, Float8):
        return 0.7
    if getattr(of, "zero", "constant") != "constant" or layout.bits == 8:
        return 0.83
    return 1.0
