"""Which tiles the kernel for many rows on Hopper can cut a weight's work into, and what it reaches with them."""

from __future__ import annotations

from qhub.layouts import Float8, Lookup
from qhub.layouts.tiled import Tiled
from qhub_triton.tiled.plans import Tile

__all__ = ["HEIGHT", "scaled_late", "span_of", "tiles_of"]

# Rows of W of a tile.
HEIGHT = 128
# A processor of an H100 has 227 KiB of shared memory for a program; barriers take some of it.
_SHARED = (227 << 10) - 1024


def tiles_of(layout: Tiled) -> tuple[Tile, ...]:
    """Return the tiles there are, of 128 rows of x and, where a block has no more than 128 columns, of 256."""
    shares = _shares(layout)
    found = []
    for rows, share in zip((128, 256), shares, strict=True):
        # Beside stages, each a block of x and its words, there is a tile of y.
        stages = (_SHARED - rows * HEIGHT * 2) // (rows * layout.per_word * 64 + HEIGHT * 64)
        if stages >= 2:
            found.append(Tile(rows, stages, share))
    return tuple(found)


def span_of(rows: int, per_word: int) -> int:
    """Return how many columns of x come at a time: a block's, or with ``rows`` 256 what a group brings."""
    return 64 if rows == 256 else per_word * 32


def scaled_late(layout: Tiled) -> bool:
    """Return whether sums are scaled, not weights: a row has one scale, and what codes are less by is exact."""
    constant = getattr(layout.of, "zero", "constant") == "constant"
    return layout.groups == 1 and constant and float(getattr(layout.of, "zero_point", 0.0)) % 1 == 0


def _shares(layout: Tiled) -> tuple[float, float]:
    """Return what part of a dense product's rate is reached with tiles of 128 and of 256 rows of x: as measured on an
    H100 with 512 and 2048 rows, in bfloat16."""
    late = scaled_late(layout)
    if isinstance(layout.of, Lookup):
        return 0.62, 0.85
    if isinstance(layout.of, Float8):
        return (0.84, 0.95) if late else (0.76, 0.90)
    if layout.bits == 8:
        return (0.85 if late else 0.82), 0.96
    if getattr(layout.of, "zero", "constant") != "constant":
        return 0.94, 1.0
    return 1.0, 0.98
