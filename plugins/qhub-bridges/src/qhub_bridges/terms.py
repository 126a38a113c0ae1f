"""An affine weight in the words of other libraries: ``w = scale * q + shift``, one of each for a run of a row."""

from __future__ import annotations

import torch
from torch import Tensor

from qhub.layouts import Affine, Layout, Parts

__all__ = ["affine_of", "group_of", "grouping_refusal", "layout_suffix", "terms"]


def affine_of(layout: Layout) -> Layout:
    """Return the layout of the numbers: that which a tiled layout holds in tiles, or ``layout`` itself."""
    return getattr(layout, "of", layout)


def layout_suffix(layout: Layout) -> str:
    """Return what the name of a kernel for this layout ends in: ``-tiled`` for tiles."""
    return "" if affine_of(layout) is layout else f"-{layout.kind}"


def group_of(layout: Affine) -> int:
    """Return how many weights of a row share a scale."""
    return min(layout.grid.cols, layout.in_features)


def grouping_refusal(layout: Layout, groups: frozenset[int] | None = None) -> str | None:
    """Return why scales are not one for each run of a row, of a length in ``groups`` if given; None where they are."""
    assert isinstance(layout, Affine)
    if layout.grid.kind != "block" or layout.grid.rows != 1:
        return f"takes one scale for each run of a row, here groups are {layout.grid.kind}, {layout.grid.rows} rows"
    group = group_of(layout)
    if layout.in_features % group:
        return f"takes whole groups, here {group} do not divide K = {layout.in_features}"
    if groups is not None and group not in groups:
        return f"takes groups of {'/'.join(map(str, sorted(groups)))}, here of {group}"
    return "takes unsigned codes" if layout.signed else None


def terms(layout: Layout, parts: Parts) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes (N, K) uint8, and ``scale`` and ``shift`` (N, K / group) float32 with ``w = scale * q + shift``."""
    if isinstance(layout, Affine):
        own = layout
    else:
        own, parts = layout.plain(parts)  # type: ignore[attr-defined]
    assert isinstance(own, Affine)
    scales, zeros = own.scales_and_zeros(parts)
    scale = scales.float() * own.unit
    if zeros is None:
        shift = scale * -own.zero_point
    elif own.zero == "value":
        shift = scale * -zeros.float()
    else:
        shift = zeros.float() * own.unit - scale * own.zero_point
    return own.codes(parts).to(torch.uint8), scale, shift
