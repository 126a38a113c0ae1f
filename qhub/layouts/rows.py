"""Cuts and stacks the scales of a matrix by rows, where that is exact: what fused experts and gate/up halves need."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qhub.layouts.grid import Grid, covering
from qhub.layouts.nested import Nested

if TYPE_CHECKING:
    from qhub.layouts.base import Layout, Parts

__all__ = ["cut_scales", "identical", "stack_scales"]


def identical(tensors: Sequence[Tensor]) -> bool:
    """Return whether all ``tensors`` are known to hold the same; on the meta device only one and the same tensor is."""
    first = tensors[0]
    if first.device.type == "meta":
        return all(other is first for other in tensors[1:])
    return all(torch.equal(other, first) for other in tensors[1:])


def cut_scales(
    layout: Layout, grid: Grid, names: Mapping[str, Nested | None], parts: Parts, start: int, stop: int
) -> dict[str, Tensor] | None:
    """Return the scale tensors of rows [start, stop); None when a group or a second-level group would be torn."""
    cut = grid.row_slice(start, stop, layout.in_features)
    if cut is None:
        return None
    window, axis = cut
    result: dict[str, Tensor] = {}
    shape = grid.scale_shape(layout.out_features, layout.in_features)
    for name, nested in names.items():
        index = (..., window) if axis == -1 else (..., window, slice(None))
        result[name] = parts[name][index]
        if nested is None:
            continue
        per_step = math.prod(shape[len(shape) + axis + 1 :])
        if nested.group:
            supers = covering(window.start * per_step, window.stop * per_step, nested.group)
            if supers is None:
                return None
            result[f"{name}_super"] = parts[f"{name}_super"][..., supers]
        else:
            result[f"{name}_super"] = parts[f"{name}_super"]
        for companion in ("table", "offset"):
            if f"{name}_{companion}" in parts:
                result[f"{name}_{companion}"] = parts[f"{name}_{companion}"]
    return result


def taken_rows(
    layout: Layout, grid: Grid, names: Mapping[str, Nested | None], codes: str, parts: Parts, index: Tensor
) -> tuple[Layout, dict[str, Tensor]] | None:
    """Return layout and parts of the rows ``index``; None unless each row has plain scales of its own."""
    own = grid.kind == "block" and grid.rows == 1 and not any(names.values())
    if not own or any(transform.side == "out" for transform in layout.transforms):
        return None
    cut = {name: parts[name].index_select(-2, index) for name in (codes, *names)}
    return layout.with_rows(index.shape[0]), {**parts, **cut}


def stack_scales(
    layout: Layout, grid: Grid, names: Mapping[str, Nested | None], parts: Sequence[Parts], layouts: Sequence[Layout]
) -> dict[str, Tensor] | None:
    """Return the scale tensors of several matrices on top of each other; None when that is not exact."""
    if grid.kind == "strided":
        return None
    edge = grid.rows if grid.kind == "block" else grid.cols
    for one in layouts[:-1]:
        size = one.out_features if grid.kind == "block" else one.out_features * one.in_features
        if size % edge:
            return None
    axis = -2 if grid.kind == "block" else -1
    result: dict[str, Tensor] = {}
    for name, nested in names.items():
        result[name] = torch.cat([p[name] for p in parts], dim=axis)
        if nested is None:
            continue
        counts = [math.prod(grid.scale_shape(one.out_features, one.in_features)) for one in layouts]
        fixed = [f"{name}_{c}" for c in ("table", "offset") if f"{name}_{c}" in parts[0]]
        if not nested.group:
            fixed.append(f"{name}_super")
        elif any(count % nested.group for count in counts[:-1]):
            return None
        else:
            result[f"{name}_super"] = torch.cat([p[f"{name}_super"] for p in parts], dim=-1)
        for companion in fixed:
            if not identical([p[companion] for p in parts]):
                return None
            result[companion] = parts[0][companion]
    return result
