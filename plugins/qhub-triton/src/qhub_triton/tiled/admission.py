"""Which weights in tiles the kernels do not take."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qhub.layouts import Float8, Lookup
from qhub.layouts.tiled import Tiled

if TYPE_CHECKING:
    from qhub.kernels import Problem

__all__ = ["accepts"]


def accepts(problem: Problem) -> str | None:
    """Return why ``problem`` is left to others; None where the kernels take it."""
    layout = problem.layout
    assert isinstance(layout, Tiled)
    if isinstance(layout.of, Float8) and layout.of.format not in ("e4m3fn", "e5m2"):
        return f"widens E4M3 and E5M2, not {layout.of.format}"
    if (
        isinstance(layout.of, Lookup)
        and layout.of.scales_nested is not None
        and layout.of.scales_nested.dtype != "uint8"
    ):
        return f"second-level scales of {layout.of.scales_nested.dtype} codes"
    return None
