"""The layout of each layer, and what fp8 files can hold of other methods' numbers."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from qhub.errors import ConfigError
from qhub.layouts import Float8, Grid, Layout
from qhub.plan import Adoption, LayerPlan, Skip, WeightInfo
from qhub_fp8.settings import float8_layout, halves, settings_of

__all__ = ["adopt", "grid_of", "plan"]


def plan(config: Any, weights: Sequence[WeightInfo]) -> Mapping[str, LayerPlan | Skip]:
    """Return the layout of each weight."""
    settings = settings_of(config)
    statistics = ("max_abs",) if settings.scheme == "static" else ()
    plans: dict[str, LayerPlan | Skip] = {}
    for weight in weights:
        if weight.kind == "embedding":
            plans[weight.name] = Skip("fp8 quantizes linear layers")
            continue
        expert = weight.kind == "experts"
        stacked = halves(weight.name, weight.out_features) if weight.experts is not None else 1
        layout = settings.layout(weight.out_features, weight.in_features, expert=expert, projections=stacked)
        plans[weight.name] = LayerPlan(layout, statistics=statistics)
    return plans


def grid_of(layout: Layout) -> tuple[int, int] | None:
    """Return the (rows, columns) that share a scale in ``layout``, sizes that reach its end as 0; None where it is no
    float8 layout of blocks."""
    if not isinstance(layout, Float8) or layout.grid.kind != "block" or layout.transforms:
        return None
    rows, cols = layout.grid.rows, layout.grid.cols
    return (0 if rows >= layout.out_features else rows, 0 if cols >= layout.in_features else cols)


def adopt(layouts: Mapping[str, Layout], others: Sequence[str], options: Mapping[str, Any]) -> Adoption:
    """Return a FineGrainedFP8Config and float8 layouts for ``layouts``, with blocks that lie within all of theirs.

    One scale for a matrix, or one for a row, is repeated for blocks. ``others``: linear weights that stay dense; the
    config lists their modules. Raises :class:`ConfigError` when none of the layouts is float8.
    """
    from transformers import FineGrainedFP8Config

    grids = {name: found for name, layout in layouts.items() if (found := grid_of(layout)) is not None}
    if not grids:
        raise ConfigError("fp8 files hold 8-bit floats with scales per tensor, row or block; none of these weights is")
    values = dict(options)
    sources = [layout for name, layout in layouts.items() if name in grids]
    static = {layout.activation.static for layout in sources}
    kinds = {layout.activation.kind for layout in sources}
    if "activation_scheme" not in values:
        values["activation_scheme"] = "static" if static == {True} else "none" if kinds == {"none"} else "dynamic"
    formats = Counter(layout.format for layout in sources if isinstance(layout, Float8))
    values.setdefault("fmt", "e5m2" if formats.most_common(1)[0][0] == "e5m2" else "e4m3")
    if "weight_block_size" not in values:
        values["weight_block_size"] = _common_block(grids)
    dense = [name.removesuffix(".weight") for name in (*others, *(name for name in layouts if name not in grids))]
    if dense:
        values.setdefault("modules_to_not_convert", sorted(dense))
    config = FineGrainedFP8Config(**values)
    settings = settings_of(config)
    adopted: dict[str, Layout | Skip] = {}
    for name, layout in layouts.items():
        if name not in grids or not isinstance(layout, Float8):
            adopted[name] = Skip(
                f"fp8 holds 8-bit floats with scales per tensor, row or block, not a {layout.kind} layout"
            )
            continue
        activation = settings.activation(layout.in_features)
        if layout.format not in ("e4m3fn", "e5m2"):
            adopted[name] = Skip(f"fp8 files hold E4M3 and E5M2, not {layout.format}")
        elif settings.block is None and grids[name] == (1, 0):
            # A file without blocks may have a scale a row.
            adopted[name] = dataclasses.replace(
                layout, activation=activation, grid=Grid("block", 1, layout.in_features)
            )
        else:
            adopted[name] = float8_layout(
                layout.out_features, layout.in_features, settings.block, layout.format, activation
            )
    return Adoption(config, adopted)


def _common_block(grids: Mapping[str, tuple[int, int]]) -> list[int] | None:
    """Return a block size whose blocks lie within those of every grid; None where all have one scale, or all one a
    row."""
    kinds = set(grids.values())
    if kinds in ({(0, 0)}, {(1, 0)}):
        return None
    rows = [r for r, _ in kinds if r]
    cols = [c for _, c in kinds if c]
    # The smallest sizes: a larger grid's scales are repeated. What does not divide is refused when it is compared.
    return [min(rows) if rows else 128, min(cols) if cols else 128]
