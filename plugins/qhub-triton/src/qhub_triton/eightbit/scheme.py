"""What the kernels need to know of a layout, found once: how inputs are rounded, where scales lie."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qhub.layouts import Affine, Float8, Layout, Parts
from qhub.layouts.activations import Activation

__all__ = ["CODES", "Scheme", "own_scales", "scheme_of"]

_KINDS = {"int8": 0, "e4m3fn": 1, "e5m2": 2}
_POWERS = {"float32": 0, "ue8m0": 1, "e8m0fnu": 2, "e8m0even": 3}
# Dtypes of codes, by kind.
CODES = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class Scheme:
    """Holds the numbers of an input's rounding and of a weight's scales, as kernels take them.

    ``kind``, ``powers``: see :mod:`qhub_triton.eightbit.steps`. ``scale``: of inputs, 0 for one per row, 1 stored, 2
    for one per tensor. ``limit``, ``threshold``: 0 for none. ``shift``: the exponent of ``largest`` as frexp counts.
    ``rows``, ``cols``: weights that share a scale; ``across``: scales in a row of blocks.
    """

    kind: int
    scale: int
    group: int
    top: float
    largest: float
    shift: int
    limit: float
    powers: int
    threshold: float
    rows: int
    cols: int
    across: int
    unit: float

    @property
    def constants(self) -> dict[str, Any]:
        """Return what every kernel that rounds takes at compile time."""
        return {
            "KIND": self.kind, "TOP": self.top, "LARGEST": self.largest, "SHIFT": self.shift,
            "LIMIT": self.limit, "POWERS": self.powers,
        }  # fmt: skip

    @property
    def blocks(self) -> bool:
        """Return whether the weight's scales change along K."""
        return self.across > 1


_known: dict[int, tuple[Layout, Scheme]] = {}


def scheme_of(layout: Layout) -> Scheme:
    """Return the scheme of ``layout``, which has passed :mod:`qhub_triton.eightbit.accepting`; remembered by layout."""
    entry = _known.get(id(layout))
    if entry is not None and entry[0] is layout:
        return entry[1]
    if len(_known) > 4096:
        _known.clear()
    scheme = _made(layout)
    # The layout is kept too: while it lives, no other has its id.
    _known[id(layout)] = (layout, scheme)
    return scheme


def _made(layout: Layout) -> Scheme:
    assert isinstance(layout, (Affine, Float8))
    activation: Activation = layout.activation
    rows = min(layout.grid.rows, layout.out_features)
    across = layout.scale_shape[-1]
    return Scheme(
        kind=_KINDS["int8" if activation.kind == "int8" else activation.format],
        scale=1 if activation.static else {"row": 0, "group": 0, "tensor": 2}[activation.granularity],
        group=activation.group,
        top=float(activation.top or activation.largest),
        largest=activation.largest,
        shift=math.frexp(activation.largest)[1],
        limit=activation.limit or 0.0,
        powers=_POWERS[activation.scale_format],
        threshold=activation.threshold,
        rows=rows,
        cols=layout.grid.cols if across > 1 else layout.in_features,
        across=across,
        unit=layout.unit if isinstance(layout, Affine) else 1.0,
    )


def own_scales(parts: Parts) -> Tensor:
    """Return the weight's scales; those in E8M0 as bytes, which kernels read."""
    scales = parts["scales"]
    return scales.view(torch.uint8) if scales.dtype == torch.float8_e8m0fnu else scales
