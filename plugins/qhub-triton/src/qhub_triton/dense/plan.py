"""What a layout asks of the dequantizing kernel: the constants it is compiled with, or why it cannot be done."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qhub.layouts import Affine, Float8, Lookup
from qhub.layouts.packing import packed_length
from qhub.layouts.tiled import SLICE, Tiled

if TYPE_CHECKING:
    from torch import Tensor

    from qhub.layouts import Layout, Nested, Parts, Transform

__all__ = ["Plan", "planned"]

# torch's names of the 8-bit floats, and what kernels get instead: bytes.
_FLOAT8 = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")


@dataclass(frozen=True, eq=False)
class Plan:
    """Is how one layout is dequantized. ``constants``: of the kernel, those left out that only the parts can tell.

    ``columns``, ``rows``: in its grid's view, in which scales are read (a strided grid has one of its own).
    ``rank``: dimensions of the codes of one matrix. ``launches``: what :mod:`qhub_triton.dense.launching` remembers.
    ``column``, ``row``: the transform that multiplies columns or rows; ``permute``: the one that moves columns;
    ``scaled_first``: whether the columns are multiplied after they are moved, so their factors are moved back.
    """

    layout: Layout
    rows: int
    columns: int
    row_bytes: int
    scale_columns: int
    point: float
    unit: float
    formula_of_scales: bool
    rank: int
    constants: dict[str, Any]
    column: Transform | None = None
    row: Transform | None = None
    permute: Transform | None = None
    scaled_first: bool = False
    whole: bool = False
    nested: dict[str, Nested | None] = field(default_factory=dict)
    launches: dict[Any, Any] = field(default_factory=dict, repr=False)


_plans: dict[Layout, Plan | str] = {}


def planned(layout: Layout) -> Plan | str:
    """Return how the kernel dequantizes ``layout``, or why it cannot; remembered."""
    found = _plans.get(layout)
    if found is None:
        found = _plans[layout] = _planned(layout)
    return found


def _planned(layout: Layout) -> Plan | str:
    of = layout.of if isinstance(layout, Tiled) else layout
    if not isinstance(of, (Affine, Lookup, Float8)):
        return f"dequantizes affine, lookup and float8 layouts, plain or in tiles, this is {of.kind}"
    surrounding = _surrounding(layout)
    if isinstance(surrounding, str):
        return surrounding
    n, k = of.out_features, of.in_features
    shape: dict[str, Any] = {"rows": n, "columns": k, "row_bytes": 0, "scale_columns": 1}
    if isinstance(layout, Tiled):
        block = layout.per_word * SLICE
        # One group of a whole row may end where a block does.
        group = layout.group_size if layout.groups > 1 else layout.blocks * block
        constants: dict[str, Any] = {"BITS": layout.bits, "GROUP": group}
    else:
        shape, constants = _view(of)
        if shape["columns"] != k and (surrounding["column"] or surrounding["row"]):
            return "multiplies no columns or rows of a matrix whose groups are strided"
    point, unit, formula_of_scales = 0.0, 1.0, False
    constants |= {"ZERO": "constant", "CODES": of.format if isinstance(of, Float8) else "packed"}
    if isinstance(of, Affine):
        point, unit, formula_of_scales = of.zero_point, of.unit, of.math == "scales"
        constants["ZERO"] = of.zero
        if of.signed:
            constants["CODES"] = "signed"
    nested = of.scale_tensors()
    for name in ("scales", "zeros"):
        short, second = name[:-1].upper(), nested.get(name)
        constants[f"{short}_GROUP"] = second.group if second else 0
        constants[f"{short}_DIVIDE"] = bool(second and second.divide)
    constants["HAS_POINT"], constants["HAS_UNIT"] = point != 0.0, unit != 1.0
    return Plan(
        layout=layout,
        **shape,
        point=float(point),
        unit=float(unit),
        formula_of_scales=formula_of_scales,
        rank=len(layout.core_specs()["qweight"].shape),
        constants=constants,
        whole=(shape["rows"], shape["columns"]) != (n, k),
        nested=nested,
        **surrounding,
    )


def _view(layout: Affine | Lookup | Float8) -> tuple[dict[str, int], dict[str, Any]]:
    """Return the rows, columns and bytes of a row of the matrix as the kernel sees it, and its grid's constants."""
    n, k, grid = layout.out_features, layout.in_features, layout.grid
    bits = 8 if isinstance(layout, Float8) else layout.bits
    rows, columns, kind = n, k, str(grid.kind)
    group_rows, group, scale_columns = 1, grid.cols, 1
    if kind == "block":
        group_rows, group, scale_columns = min(grid.rows, n), min(grid.cols, k), -(-k // grid.cols)
    elif kind == "flat" and k % group == 0:
        kind, scale_columns = "block", k // group
    elif kind == "strided":
        scale_columns = n * k // group
        # Rows without padding follow each other without a gap, so that the matrix can be cut anew.
        if (bits == 8 or k % 8 == 0) and scale_columns % 8 == 0:
            # Seen with the members of a group below each other, a tile reads each scale once.
            kind, group_rows, rows, columns, group = "block", group, group, scale_columns, 1
    eights = group % 8 == 0 or group >= columns if kind == "block" else kind == "flat" and group % 8 == 0 == k % 8
    shape = {
        "rows": rows,
        "columns": columns,
        "row_bytes": columns if bits == 8 else packed_length(columns, bits),
        "scale_columns": scale_columns,
    }
    constants = {
        "BITS": bits,
        "GRID": kind,
        "GROUP_ROWS": group_rows,
        "GROUP": group,
        "EIGHTS": eights,
        "LONG": n * k >= 2**31,
    }
    return shape, constants


def _surrounding(layout: Layout) -> dict[str, Any] | str:
    """Return the transforms that the kernel, and a move of columns behind it, can do; or why they are too many."""
    chain = [t for t in layout.transforms if t.side == "in"]
    behind = [t for t in layout.transforms if t.side == "out"]
    factors = [t for t in chain if t.kind in ("scale", "divide")]
    moves = [t for t in chain if t.kind == "permute"]
    if len(factors) + len(moves) != len(chain) or any(t.kind not in ("scale", "divide") for t in behind):
        return f"takes permuted inputs and scaled inputs and outputs, this has {[f'{t.side} {t.kind}' for t in chain]}"
    if len(factors) > 1 or len(moves) > 1 or len(behind) > 1:
        return "takes one permutation, one scale of inputs and one of outputs, this has more"
    return {
        "column": factors[0] if factors else None,
        "row": behind[0] if behind else None,
        "permute": moves[0] if moves else None,
        "scaled_first": bool(factors and moves and chain[0] is factors[0]),
    }


def stored(part: Tensor) -> tuple[Tensor, str]:
    """Return ``part`` as the kernel reads it, and what its numbers are: ``"number"`` or an 8-bit float format."""
    import torch

    name = str(part.dtype).removeprefix("torch.")
    return (part.view(torch.uint8), name.removeprefix("float8_")) if name in _FLOAT8 else (part, "number")


def companions(name: str, parts: Parts) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the second-level scales, the table and the offset of the tensor ``name``; None for what it lacks."""
    return parts.get(f"{name}_super"), parts.get(f"{name}_table"), parts.get(f"{name}_offset")
