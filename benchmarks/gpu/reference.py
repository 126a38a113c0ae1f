"""What is right: products in float64 with a contestant's own dequantized weight, for the rows that are checked."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.gpu.case import Case, Contestant, Prepared, checked_rows

__all__ = ["Reference"]

# Rows of the weight that are held in float64 at once: 300 MB where K is 8192.
_BAND = 4096


class Reference:
    """Holds x @ W.T in float64 for the rows that are checked at any M, W being the contestant's own."""

    def __init__(self, case: Case, contestant: Contestant, prepared: Prepared, rows: Sequence[int]) -> None:
        self.places = sorted({place for m in rows for place in checked_rows(m)})
        self.index = {place: index for index, place in enumerate(self.places)}
        x = case.inputs(contestant.dtype, contestant.outliers)[self.places]
        weight = prepared.dense()
        self.exact = _product(x, weight)
        self.rounded = None if prepared.rounded is None else _product(prepared.rounded(x), weight)

    def errors(self, y: Tensor, m: int) -> tuple[float, float | None]:
        """Return the relative errors of ``y`` (M, N): against x @ W.T, and against the format's own rounding of x."""
        places = checked_rows(m)
        at = [self.index[place] for place in places]
        seen = y[places].double()

        def relative(wanted: Tensor) -> float:
            return float((seen - wanted).norm() / wanted.norm())

        return relative(self.exact[at]), None if self.rounded is None else relative(self.rounded[at])


def _product(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.double()
    return torch.cat([wide @ band.double().t() for band in weight.split(_BAND)], dim=1)
