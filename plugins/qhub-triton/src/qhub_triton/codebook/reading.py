"""What a codebook layout asks of the kernels, or why they leave it to others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qhub.layouts import Codebook

if TYPE_CHECKING:
    from qhub.kernels import Problem
    from qhub.layouts import Layout, Transform

__all__ = ["Reading", "Side", "accepts", "accepts_dense", "reading"]

# The narrowest product of matrix units, and what one program holds of a row.
_NARROWEST, _WIDEST = 16, 1 << 16


@dataclass(frozen=True)
class Side:
    """Is what happens to inputs or outputs: divided and scaled before a rotation, scaled after it. None: it is not."""

    divide: Transform | None = None
    before: Transform | None = None
    rotate: Transform | None = None
    after: Transform | None = None

    def refusal(self, size: int) -> str | None:
        """Return why ``size`` features cannot be turned so; None when they can."""
        if self.rotate is not None and size // self.rotate.factor < _NARROWEST:
            return f"rotates by powers of two from {_NARROWEST} on, this has {size // self.rotate.factor}"
        if self.rotate is None and size > _WIDEST:
            return f"takes rows of at most {_WIDEST} features where none is rotated, these have {size}"
        return None

    @property
    def idle(self) -> bool:
        """Return whether nothing happens."""
        return self.divide is self.before is self.rotate is self.after is None


@dataclass(frozen=True)
class Reading:
    """Is how kernels read a layout.

    ``places``: for each codebook, at which byte of a block's codes its own begins and how many it has. ``stride``:
    bytes of a block's codes. ``entries``: rows of the codebooks' tensor. ``scale_rows``: how many rows share a scale.
    """

    places: tuple[tuple[int, int], ...]
    stride: int
    entries: int
    scale_rows: int
    inputs: Side
    outputs: Side


def reading(layout: Layout) -> Reading | str:
    """Return how the products read ``layout``, or why they cannot."""
    found = stored(layout)
    if isinstance(found, str):
        return found
    assert isinstance(layout, Codebook)
    if layout.signs:
        return "multiplies vectors without signs of their own"
    if layout.scales_nested is not None:
        return "takes plain scales, these are quantized in turn"
    grid = layout.grid
    if grid.kind != "block" or grid.cols < layout.in_features:
        return "takes one scale for a whole row or several, not groups along K"
    inputs, outputs = _side(layout, "in"), _side(layout, "out")
    for side in (inputs, outputs):
        if isinstance(side, str):
            return side
    assert isinstance(inputs, Side) and isinstance(outputs, Side)
    if outputs.rotate is None and not outputs.idle:
        return "scales outputs behind a rotation only"
    for side, size in ((inputs, layout.in_features), (outputs, layout.out_features)):
        reason = side.refusal(size)
        if reason is not None:
            return reason
    return Reading(*found, min(grid.rows, layout.out_features), inputs, outputs)


def stored(layout: Layout) -> tuple[tuple[tuple[int, int], ...], int, int] | str:
    """Return places, stride and entries of a layout's codes, or why no kernel reads them."""
    if not isinstance(layout, Codebook):
        return f"reads codebook layouts, this is {layout.kind}"
    if layout.out_group != 1:
        return f"reads vectors of one row, these have {layout.out_group}"
    if layout.in_group not in (4, 8, 16, 32):
        return f"reads vectors of 4, 8, 16 or 32 weights, not {layout.in_group}"
    if layout.out_features * layout.in_features >= 1 << 40:
        return "the matrix is too large"
    sizes = [1 if bits <= 8 else 2 for bits in layout.nbits]
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    rows = max(
        2 ** (bits if shift is None else bits - layout.in_group)
        for bits, shift in zip(layout.nbits, layout.folded or (None,) * len(sizes), strict=True)
    )
    return tuple(zip(starts, sizes, strict=True)), sum(sizes), rows


def _side(layout: Codebook, side: str) -> Side | str:
    steps = [t for t in layout.transforms if t.side == side]
    kinds = [t.kind for t in steps]
    named = {"divide": None, "before": None, "rotate": None, "after": None}
    rotated = False
    for step in steps:
        place = {"divide": "divide", "hadamard": "rotate"}.get(step.kind, "after" if rotated else "before")
        if step.kind == "permute" or named[place] is not None or (place == "divide" and (rotated or named["before"])):
            return f"divides, scales, rotates and scales in this order, this has {kinds} on the {side}put"
        rotated = rotated or place == "rotate"
        named[place] = step  # type: ignore[assignment]
    if side == "in" and named["after"] is not None:
        return "scales inputs before their rotation, not after"
    return Side(**named)


def accepts(problem: Problem) -> str | None:
    """Return why ``problem`` is left to others; None where the products take it."""
    found = reading(problem.layout)
    return found if isinstance(found, str) else None


def accepts_dense(problem: Problem) -> str | None:
    """Return why ``problem``'s weight is dequantized by others; None where the dense kernel does it."""
    found = reading(problem.layout)
    if isinstance(found, str):
        return found
    if problem.layout.transforms:
        return "dequantizes stored matrices, transforms are left to others"
    return None
