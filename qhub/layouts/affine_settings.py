"""What integer layouts have in common, in the words that configs use: bits, group size, zeros; for ``qhub_adopt``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qhub.layouts.affine import Affine
from qhub.layouts.base import Layout

__all__ = ["AffineSettings", "affine_settings"]


@dataclass(frozen=True)
class AffineSettings:
    """Describes integer layouts that one config is to hold.

    ``bits``: the widest codes. ``group_size``: along K, that of the finest grid; -1 for whole rows everywhere.
    ``symmetric``: whether every zero is the middle code, 2^(bits-1), and none is kept. ``act_order``: whether any has
    its inputs permuted. ``misfits``: why a layout is none of these, by weight; the rest counts without them.
    """

    bits: int
    group_size: int
    symmetric: bool
    act_order: bool
    misfits: Mapping[str, str]


def affine_settings(layouts: Mapping[str, Layout], widths: Sequence[int]) -> AffineSettings:
    """Return the settings that ``layouts``, by weight, share; ``widths``: the bits that the target has, ascending."""
    misfits: dict[str, str] = {}
    fits: dict[str, Affine] = {}
    groups: list[int] = []
    for name, layout in layouts.items():
        reason = None
        group = 0
        if not isinstance(layout, Affine):
            reason = f"its numbers are no integers under scales, they are {layout.kind}"
        elif layout.bits > widths[-1]:
            reason = f"it has {layout.bits} bits, the target at most {widths[-1]}"
        else:
            group = _along_k(layout)
            if group < 2:
                reason = f"its scales do not stay the same along a row ({layout.grid.kind} groups)"
        if reason is not None:
            misfits[name] = reason
        elif isinstance(layout, Affine):
            fits[name] = layout
            groups.append(0 if group >= layout.in_features else group)
    most = max((layout.bits for layout in fits.values()), default=widths[-1])
    bits = next(width for width in widths if width >= most)
    # 0 stands for whole rows, which the greatest common divisor leaves out of account.
    shared = math.gcd(*groups) if groups else 0
    if shared and any(not group for group in groups):
        # A whole row under one scale is many groups under the same.
        rows = [fits[name].in_features for name, group in zip(fits, groups, strict=True) if not group]
        shared = math.gcd(shared, *rows)
    symmetric = all(
        layout.zero == "constant" and layout.zero_point == (0 if layout.signed else 2 ** (layout.bits - 1))
        for layout in fits.values()
    )
    # With the middle of narrower codes the wider ones would need another zero for each layer.
    symmetric = symmetric and len({layout.bits for layout in fits.values()}) <= 1 and most == bits
    order = any(transform.kind == "permute" for layout in fits.values() for transform in layout.transforms)
    return AffineSettings(bits, shared or -1, symmetric, order, misfits)


def _along_k(layout: Affine) -> int:
    """Return how many neighbours along K are sure to share a scale; 0 where none are."""
    grid, k = layout.grid, layout.in_features
    if grid.kind == "block":
        return min(grid.cols, k)
    return math.gcd(grid.cols, k) if grid.kind == "flat" else 0
