"""The kernel that writes a dense weight from the parts of a layout: one pass, limited by memory."""

from __future__ import annotations

import triton
import triton.language as tl

from qhub_triton.dense.decode import float8_value, formula, level_value, rounded, spread, times, unpacked

__all__ = ["dequantize_kernel"]


@triton.jit
def _place_of_scale(
    row, across, in_features, scale_columns, GRID: tl.constexpr, GROUP_ROWS: tl.constexpr, GROUP: tl.constexpr,
    LONG: tl.constexpr,
):  # fmt: skip
    """Return where the scales of the columns ``across`` of a stored row lie."""
    if LONG:
        row = row.to(tl.int64)
    if GRID == "block":
        return (row // GROUP_ROWS) * scale_columns + across // GROUP
    elif GRID == "flat":
        return (row * in_features + across) // GROUP
    else:
        return (row * in_features + across) % scale_columns


@triton.jit
def dequantize_kernel(
    out_ptr,
    q_ptr,
    table_ptr,
    scale_ptr,
    scale_super_ptr,
    scale_table_ptr,
    scale_offset_ptr,
    zero_ptr,
    zero_super_ptr,
    zero_table_ptr,
    zero_offset_ptr,
    column_ptr,
    row_ptr,
    first_row,
    first_column,
    first_word,
    rows,
    columns,
    words,
    row_bytes,
    row_stride,
    in_features,
    scale_columns,
    tiles,
    zero_point,
    unit,
    CODES: tl.constexpr,
    BITS: tl.constexpr,
    ALIGNED: tl.constexpr,
    GRID: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    EIGHTS: tl.constexpr,
    SHARED_ROWS: tl.constexpr,
    SCALE_STORED: tl.constexpr,
    SCALE_GROUP: tl.constexpr,
    SCALE_DIVIDE: tl.constexpr,
    ZERO: tl.constexpr,
    ZERO_STORED: tl.constexpr,
    ZERO_GROUP: tl.constexpr,
    ZERO_DIVIDE: tl.constexpr,
    HAS_POINT: tl.constexpr,
    HAS_UNIT: tl.constexpr,
    FORMULA: tl.constexpr,
    COLUMN_DIVIDE: tl.constexpr,
    ROW_DIVIDE: tl.constexpr,
    OUT: tl.constexpr,
    LONG: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """Write rows [first_row, first_row + rows) and columns likewise of a matrix to ``out_ptr``, from its first element.

    ``first_column`` is eight times ``first_word``.

    ``CODES``: ``"packed"``, ``"signed"`` or a float8 format. ``GRID``: ``"block"`` of ``GROUP_ROWS`` x ``GROUP``,
    ``"flat"`` runs of ``GROUP``, ``"strided"`` (``scale_columns`` groups). ``EIGHTS``: whether eight columns from a
    multiple of eight on share a scale. ``SHARED_ROWS``: whether the rows of a program do. ``FORMULA``: the dtype that
    each step of the formula is rounded to. ``words``: eights of columns; ``tiles``: along a row. ``LONG``: whether
    places of scales pass 2^31. A program writes ``R`` rows of ``C`` columns, one after the other.
    """
    program = tl.program_id(0)
    top = program // tiles * R
    tile = program % tiles
    column = tile * C + tl.arange(0, C)
    word = tile * (C // 8) + tl.arange(0, C // 8)
    mask = column < columns
    word_mask = word < words
    stored_column = column + first_column
    stored_word = word + first_word
    across = stored_word * 8 if EIGHTS else stored_column
    across_mask = word_mask if EIGHTS else mask
    if column_ptr is not None:
        factor = tl.load(column_ptr + stored_column, mask=mask, other=1.0).to(tl.float32)
    if SHARED_ROWS:
        index = _place_of_scale(
            top + first_row, across, in_features, scale_columns, GRID, GROUP_ROWS, GROUP, LONG
        )  # fmt: skip
        scale = level_value(
            scale_ptr, scale_super_ptr, scale_table_ptr, scale_offset_ptr, index, index, across_mask,
            SCALE_STORED, SCALE_GROUP, SCALE_DIVIDE,
        )  # fmt: skip
        zero = scale
        if ZERO != "constant":
            zero = level_value(
                zero_ptr, zero_super_ptr, zero_table_ptr, zero_offset_ptr, index, index, across_mask,
                ZERO_STORED, ZERO_GROUP, ZERO_DIVIDE,
            )  # fmt: skip
    for step in range(R):
        row = top + step
        inside = row < rows
        stored_row = row + first_row
        q_row = q_ptr + stored_row.to(tl.int64) * row_bytes
        if CODES == "packed" and BITS < 8:
            code = unpacked(q_row, stored_word, word_mask & inside, BITS, ALIGNED)
        else:
            code = tl.load(q_row + stored_column, mask=mask & inside, other=0).to(tl.int32)
        if not SHARED_ROWS:
            index = _place_of_scale(stored_row, across, in_features, scale_columns, GRID, GROUP_ROWS, GROUP, LONG)
            scale = level_value(
                scale_ptr, scale_super_ptr, scale_table_ptr, scale_offset_ptr, index, index, across_mask & inside,
                SCALE_STORED, SCALE_GROUP, SCALE_DIVIDE,
            )  # fmt: skip
            zero = scale
            if ZERO != "constant":
                zero = level_value(
                    zero_ptr, zero_super_ptr, zero_table_ptr, zero_offset_ptr, index, index, across_mask & inside,
                    ZERO_STORED, ZERO_GROUP, ZERO_DIVIDE,
                )  # fmt: skip
        if table_ptr is not None:
            value = tl.load(table_ptr + code)
        elif CODES == "packed" or CODES == "signed":
            value = code.to(tl.float32)
        else:
            value = float8_value(code, CODES)
        value = formula(
            value, spread(scale, EIGHTS), spread(zero, EIGHTS), zero_point, unit, ZERO, HAS_POINT, HAS_UNIT, FORMULA
        )  # fmt: skip
        if column_ptr is not None:
            value = times(value, factor, COLUMN_DIVIDE)
        if row_ptr is not None:
            value = times(value, tl.load(row_ptr + stored_row, mask=inside, other=1.0).to(tl.float32), ROW_DIVIDE)
        tl.store(out_ptr + row.to(tl.int64) * row_stride + column, rounded(value, OUT), mask=mask & inside)
