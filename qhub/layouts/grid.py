"""Says which weights of a matrix share one scale: blocks, runs of the flattened matrix, or strided slabs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qhub.errors import LayoutError

__all__ = ["Grid", "covering"]


@dataclass(frozen=True)
class Grid:
    """Describes how an (N, K) matrix is cut into groups that share a scale.

    ``kind``:

    * ``"block"``: rectangles of ``rows`` x ``cols``; scales have shape (ceil(N/rows), ceil(K/cols)). Groups along K are
      ``rows=1``; one scale per row is ``cols=K``; one scale for all is ``rows=N, cols=K``.
    * ``"flat"``: runs of ``cols`` consecutive weights of the flattened matrix, the last one possibly shorter; scales
      have shape (ceil(N*K/cols),). Used where a run may cross a row.
    * ``"strided"``: the flattened matrix seen as (cols, N*K/cols); a group is a column of that view, so its members lie
      N*K/cols apart; scales have shape (N*K/cols,).
    """

    kind: Literal["block", "flat", "strided"]
    rows: int
    cols: int

    def __post_init__(self) -> None:
        if self.rows < 1 or self.cols < 1:
            raise LayoutError(f"groups of {self.rows}x{self.cols} weights hold none: choose positive sizes")

    @staticmethod
    def along_k(group_size: int) -> Grid:
        """Return groups of ``group_size`` consecutive input features of one row."""
        return Grid("block", 1, group_size)

    @staticmethod
    def flat_runs(group_size: int, in_features: int) -> Grid:
        """Return runs of ``group_size`` in the flattened matrix: blocks of one row where rows hold whole runs."""
        flat = Grid("flat", 1, group_size)
        return flat if in_features % group_size else Grid.along_k(group_size)

    def scale_shape(self, out_features: int, in_features: int) -> tuple[int, ...]:
        """Return the shape of the scale tensor of an (out_features, in_features) matrix."""
        if self.kind == "block":
            return (-(-out_features // self.rows), -(-in_features // self.cols))
        count = out_features * in_features
        if self.kind == "flat":
            return (-(-count // self.cols),)
        if count % self.cols:
            raise LayoutError(
                f"strided groups of {self.cols} do not divide a {out_features}x{in_features} matrix: "
                "choose a group size that divides the number of weights"
            )
        return (count // self.cols,)

    def split(self, weight: Tensor) -> Tensor:
        """View ``weight`` (..., N, K) with group members on their own axes, so that :meth:`spread` scales broadcast."""
        *batch, n, k = weight.shape
        if self.kind == "block":
            # A block larger than the matrix is not filled up: one row of a matrix under one scale stays one row.
            rows, cols = min(self.rows, n), min(self.cols, k)
            pad_n, pad_k = -n % rows, -k % cols
            if pad_n or pad_k:
                weight = torch.nn.functional.pad(weight, (0, pad_k, 0, pad_n))
            return weight.reshape(*batch, (n + pad_n) // rows, rows, (k + pad_k) // cols, cols)
        flat = weight.reshape(*batch, n * k)
        if self.kind == "flat":
            if n * k % self.cols:
                flat = torch.nn.functional.pad(flat, (0, -(n * k) % self.cols))
            return flat.reshape(*batch, -1, self.cols)
        return flat.reshape(*batch, self.cols, -1)

    def spread(self, scale: Tensor) -> Tensor:
        """View ``scale`` (..., *scale_shape) so that it broadcasts against :meth:`split`."""
        if self.kind == "block":
            return scale.unsqueeze(-2).unsqueeze(-1)
        return scale.unsqueeze(-1) if self.kind == "flat" else scale.unsqueeze(-2)

    def expand(self, scale: Tensor, out_features: int, in_features: int) -> Tensor:
        """Return the scale (out_features, in_features) of each weight, from ``scale`` (*scale_shape)."""
        shape = self.split(torch.empty(out_features, in_features, device="meta")).shape
        return self.join(self.spread(scale).expand(shape), out_features, in_features)

    @property
    def member_dims(self) -> tuple[int, ...]:
        """Return the axes of :meth:`split` along which the members of one group lie."""
        return {"block": (-3, -1), "flat": (-1,), "strided": (-2,)}[self.kind]

    def join(self, split: Tensor, out_features: int, in_features: int) -> Tensor:
        """Undo :meth:`split`: return (..., N, K), padding cut off."""
        if self.kind == "block":
            *batch, a, b, c, d = split.shape
            return split.reshape(*batch, a * b, c * d)[..., :out_features, :in_features]
        *batch, a, b = split.shape
        flat = split.reshape(*batch, a * b)[..., : out_features * in_features]
        return flat.reshape(*batch, out_features, in_features)

    def row_slice(self, start: int, stop: int, in_features: int) -> tuple[slice, int] | None:
        """Return which scales rows [start, stop) own, as a slice of one scale axis counted from the end.

        None when the slice's own groups would not be those of the whole, so that no exact slice exists.
        """
        if self.kind == "block":
            window = covering(start, stop, self.rows)
            return None if window is None else (window, -2)
        if self.kind == "flat":
            window = covering(start * in_features, stop * in_features, self.cols)
            return None if window is None else (window, -1)
        return None

    def fits(self, out_features: int, in_features: int) -> bool:
        """Return whether :meth:`split` adds no padding."""
        if self.kind == "block":
            return out_features % min(self.rows, out_features) == 0 and in_features % min(self.cols, in_features) == 0
        return math.prod((out_features, in_features)) % self.cols == 0


def covering(start: int, stop: int, size: int) -> slice | None:
    """Return which groups of ``size`` the members [start, stop) form; None unless counted from ``start`` they do too.

    Counted anew, the members fall into the same groups when ``start`` begins one or all lie in one. A torn end does no
    harm.
    """
    if start % size and start // size != (stop - 1) // size:
        return None
    return slice(start // size, -(-stop // size))
