"""The product with inputs rounded to 8 bits: gathered once per weight, the way chosen by the rows of input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qhub.layouts import Layout, Parts
from qhub_triton.eightbit.choosing import Choice, Setting, choice, choice_of, fitted
from qhub_triton.eightbit.launching import Row, RowProduct, Tile, TileProduct
from qhub_triton.eightbit.library import LibraryProduct
from qhub_triton.eightbit.product import multiply
from qhub_triton.launch import interpreted

__all__ = ["bind", "linear"]


def linear(
    x: Tensor, layout: Layout, parts: Parts, bias: Tensor | None = None, config: dict[str, Any] | None = None
) -> Tensor:
    """Return ``x @ W.T + bias`` for x (M, K) contiguous, in x's dtype; ``config``: of :func:`choosing.tunables`."""
    return bind(layout, parts, x.dtype, config)(x, bias)


def bind(
    layout: Layout, parts: Parts, dtype: torch.dtype, config: dict[str, Any] | None = None
) -> Callable[[Tensor, Tensor | None], Tensor]:
    """Return what computes ``x @ W.T + bias`` for x (M, K) contiguous of ``dtype``, bias (N,) of ``dtype`` or None."""
    return _Bound(layout, parts, dtype, None if config is None else choice_of(config))


class _Bound:
    """Is a weight with the ways to multiply it that were needed so far."""

    def __init__(self, layout: Layout, parts: Parts, dtype: torch.dtype, chosen: Choice | None) -> None:
        self.layout, self.parts, self.chosen = layout, parts, chosen
        self.setting = Setting.of(layout, parts, dtype, interpreted(multiply))
        self.ways: dict[int, Callable[[Tensor, Tensor | None], Tensor]] = {}

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        m = x.shape[0]
        size = (m - 1).bit_length() if m > 1 else -1
        way = self.ways.get(size)
        if way is None:
            way = self.ways[size] = self._way(m)
        if x.data_ptr() % 16:
            # Compiled for addresses that are multiples of 16; a slice of something larger may start anywhere.
            x = x.clone()
        return way(x, bias)

    def _way(self, m: int) -> Callable[[Tensor, Tensor | None], Tensor]:
        # For all M of a power of two: the largest of them is what counts.
        rows = 1 if m == 1 else 1 << (m - 1).bit_length()
        setting = self.setting
        chosen = fitted(self.chosen or choice(setting, rows), setting, rows)
        if isinstance(chosen, Row):
            return RowProduct(self.layout, self.parts, chosen)
        if isinstance(chosen, Tile):
            return TileProduct(self.layout, self.parts, chosen)
        return LibraryProduct(self.layout, self.parts, chosen)
