"""Launches of the dequantizing kernels: what a weight's parts decide is worked out at the first, then looked up."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qhub.layouts import Parts
from qhub.layouts.tiled import ROWS, SLICE, Tiled
from qhub_triton.dense.kernel import dequantize_kernel
from qhub_triton.dense.plan import Plan, companions, stored
from qhub_triton.dense.tiles import tiles_kernel
from qhub_triton.launch import interpreted, stream_of

__all__ = ["TYPES", "launch", "tile"]

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# Columns and warps of a program; rows and columns of one where each column's scale serves several rows. Measured on an
# H100: 2.4 to 2.9 TB/s of reads and writes, for every layout.
_TILE = (1024, 4)
_TILE_DOWN = (32, 2048)
# Slices of 32 weights that a program writes of a matrix in tiles, at most.
_SLICES = 256


def tile(constants: dict[str, Any], columns: int, first_row: int) -> tuple[int, int, int]:
    """Return how many rows and columns a program writes, and with how many warps."""
    width, warps = _TILE
    height = 1
    # Where every column has a scale of its own, several rows use it while it is there.
    if constants["GRID"] == "block" and not constants["EIGHTS"]:
        while height < _TILE_DOWN[0] and constants["GROUP_ROWS"] % (2 * height) == 0 == first_row % (2 * height):
            height *= 2
        width = _TILE_DOWN[1] if height > 1 else width
    return height, min(width, max(8, triton.next_power_of_2(columns))), warps


def launch(plan: Plan, parts: Parts, out: Tensor, first_row: int, first_column: int) -> None:
    """Write the plan's matrix from (first_row, first_column) on to ``out`` (rows, columns) contiguous along columns."""
    codes = parts["qweight"]
    if codes.dtype.is_floating_point:
        codes = codes.view(torch.uint8)
    zeros = parts.get("zeros")
    scale, scale_stored = stored(parts["scales"].contiguous())
    zero, zero_stored = (None, "number") if zeros is None else stored(zeros.contiguous())
    column, row = plan.column, plan.row
    factors = None if column is None else parts[column.part]  # type: ignore[index]
    if factors is not None and plan.scaled_first:
        factors = factors[parts["in_perm"].long()]
    tensors = (
        out,
        codes.contiguous(),
        parts.get("table"),
        scale,
        *companions("scales", parts),
        zero,
        *companions("zeros", parts),
        factors,
        None if row is None else parts[row.part],  # type: ignore[index]
    )
    # All that a compiled kernel depends on, and every number it is called with.
    known = tuple([None if t is None else (t.dtype, t.data_ptr() % 16) for t in tensors])
    key = (known, scale_stored, zero_stored, out.shape, out.stride(0), first_row, first_column, out.device.index)
    found = plan.launches.get(key)
    if found is not None:
        compiled, grid, device, rest = found
        if torch.cuda.current_device() == device:
            pointers = [None if t is None else t.data_ptr() for t in tensors]
            compiled.run(
                grid, 1, 1, stream_of(device), compiled.function, compiled.packed_metadata, None, None, None, *pointers,
                *rest,
            )  # fmt: skip
            return
    kernel, grid, numbers, constants, warps = _prepared(
        plan, tensors, scale_stored, zero_stored, first_row, first_column
    )
    # No multiply-add in one rounding: the layouts round twice.
    options = {"num_warps": warps, "enable_fp_fusion": False}
    if interpreted(kernel) or not out.is_cuda:
        kernel[(grid,)](*tensors, *numbers, **constants, **options)
        return
    with torch.cuda.device(out.device):
        compiled = kernel[(grid,)](*tensors, *numbers, **constants, **options)
    if torch.version.cuda is not None:
        values = [constants[name] for name in kernel.arg_names[len(tensors) + len(numbers) :]]
        plan.launches[key] = compiled, grid, out.device.index, (*numbers, *values)


def _prepared(
    plan: Plan, tensors: tuple[Any, ...], scale_stored: str, zero_stored: str, first_row: int, first_column: int
) -> tuple[Any, int, tuple[int | float, ...], dict[str, Any], int]:
    """Return kernel, grid, the arguments after ``tensors``, the constants and the number of warps."""
    out, codes, scale = tensors[0], tensors[1], tensors[3]
    rows, columns = out.shape
    column, row = plan.column, plan.row
    constants = {
        **plan.constants,
        "SCALE_STORED": scale_stored,
        "ZERO_STORED": zero_stored,
        "FORMULA": TYPES[scale.dtype] if plan.formula_of_scales and plan.nested["scales"] is None else tl.float32,
        "COLUMN_DIVIDE": column is not None and column.kind == "divide",
        "ROW_DIVIDE": row is not None and row.kind == "divide",
        "OUT": TYPES[out.dtype],
    }
    layout = plan.layout
    numbers: tuple[int | float, ...]
    if isinstance(layout, Tiled):
        height = min(ROWS, _SLICES // triton.next_power_of_2(layout.per_word))
        width = layout.per_word * SLICE
        assert first_row % height == 0 and first_column % width == 0
        blocks = -(-columns // width)
        numbers = (
            first_row, first_column // width, rows, columns, out.stride(0), layout.blocks, blocks, layout.groups,
            plan.point, plan.unit,
        )  # fmt: skip
        return tiles_kernel, blocks * -(-rows // height), numbers, {**constants, "R": height}, 4
    word = min(constants["BITS"] & -constants["BITS"], 4)
    height, width, warps = tile(constants, columns, first_row)
    constants |= {
        "ALIGNED": plan.row_bytes % word == 0 and codes.data_ptr() % word == 0,
        "SHARED_ROWS": height > 1 and constants["GRID"] == "block" and constants["GROUP_ROWS"] % height == 0,
        "R": height,
        "C": width,
    }
    tiles = -(-columns // width)
    numbers = (
        first_row, first_column, first_column // 8, rows, columns, -(-columns // 8), plan.row_bytes, out.stride(0),
        plan.columns, plan.scale_columns, tiles, plan.point, plan.unit,
    )  # fmt: skip
    return dequantize_kernel, tiles * -(-rows // height), numbers, constants, warps
