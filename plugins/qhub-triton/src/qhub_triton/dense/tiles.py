"""The kernel that writes a dense weight from codes in tiles (:mod:`qhub.layouts.tiled`): a tile's words at a time."""

from __future__ import annotations

import triton
import triton.language as tl

from qhub_triton.dense.decode import float8_value, formula, level_value, rounded, times
from qhub_triton.tiled.groups import place_of, run_of

__all__ = ["tiles_kernel"]


@triton.jit
def tiles_kernel(
    out_ptr, q_ptr, table_ptr, scale_ptr, scale_super_ptr, scale_table_ptr, scale_offset_ptr, zero_ptr, zero_super_ptr,
    zero_table_ptr, zero_offset_ptr, column_ptr, row_ptr,
    first_row, first_block, rows, columns, row_stride, all_blocks, blocks, groups, zero_point, unit,
    CODES: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, SCALE_STORED: tl.constexpr,
    SCALE_GROUP: tl.constexpr, SCALE_DIVIDE: tl.constexpr, ZERO: tl.constexpr, ZERO_STORED: tl.constexpr,
    ZERO_GROUP: tl.constexpr, ZERO_DIVIDE: tl.constexpr, HAS_POINT: tl.constexpr, HAS_UNIT: tl.constexpr,
    FORMULA: tl.constexpr, COLUMN_DIVIDE: tl.constexpr, ROW_DIVIDE: tl.constexpr, OUT: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Write ``rows`` x ``columns`` of a matrix, from row ``first_row`` (a multiple of ``R``) and the first column of
    block ``first_block`` on, to ``out_ptr``.

    ``blocks``: those to write of the ``all_blocks`` of a row; ``groups``: of a row. ``GROUP``: columns that share a
    scale, a multiple of 32 or all. ``CODES``, ``FORMULA`` and the like: as for
    :func:`qhub_triton.dense.kernel.dequantize_kernel`. A program writes ``R`` rows of one block; ``R`` divides 64.
    """
    P: tl.constexpr = 16 // BITS
    RUN: tl.constexpr = run_of(P, GROUP)
    program = tl.program_id(0)
    block = program % blocks
    out_row = program // blocks * R + tl.arange(0, R)
    row_mask = out_row < rows
    row = out_row + first_row
    word = tl.arange(0, 32)
    tile = (program // blocks * R + first_row) // 64
    held = ((tile.to(tl.int64) * all_blocks + block + first_block) * 64 + row % 64)[:, None] * 32 + word[None, :]
    words = tl.load(q_ptr + held, mask=row_mask[:, None], other=0).to(tl.int32)
    if row_ptr is not None:
        row_factor = tl.load(row_ptr + row, mask=row_mask, other=1.0).to(tl.float32)[:, None]
    out = out_ptr + out_row.to(tl.int64)[:, None] * row_stride + (block * P * 32 + word)[None, :]
    for run in tl.static_range(P // RUN):
        group = ((block + first_block) * P + run * RUN) * 32 // GROUP
        mask = row_mask & (group < groups)
        place = (tile.to(tl.int64) * groups + group) * 64 + place_of(row)
        index = row.to(tl.int64) * groups + group
        scale = level_value(
            scale_ptr, scale_super_ptr, scale_table_ptr, scale_offset_ptr, place, index, mask,
            SCALE_STORED, SCALE_GROUP, SCALE_DIVIDE,
        )  # fmt: skip
        zero = scale
        if ZERO != "constant":
            zero = level_value(
                zero_ptr, zero_super_ptr, zero_table_ptr, zero_offset_ptr, place, index, mask,
                ZERO_STORED, ZERO_GROUP, ZERO_DIVIDE,
            )  # fmt: skip
        for slice in tl.static_range(run * RUN, run * RUN + RUN):
            column = (block * P + slice) * 32 + word
            code = (words >> (BITS * slice)) & ((1 << BITS) - 1)
            if table_ptr is not None:
                # The hint makes the compiler read in the order of the words; single numbers, as nothing is aligned.
                value = tl.load(table_ptr + tl.max_contiguous(code, [1, 2]))
            elif CODES == "packed":
                value = code.to(tl.float32)
            elif CODES == "signed":
                # Two's complement is held with its highest bit turned.
                value = (code - 128).to(tl.float32)
            else:
                value = float8_value(code, CODES)
            value = formula(
                value, scale[:, None], zero[:, None], zero_point, unit, ZERO, HAS_POINT, HAS_UNIT, FORMULA
            )  # fmt: skip
            if column_ptr is not None:
                stored = column + first_block * P * 32
                factor = tl.load(column_ptr + stored, mask=column < columns, other=1.0).to(tl.float32)
                value = times(value, factor[None, :], COLUMN_DIVIDE)
            if row_ptr is not None:
                value = times(value, row_factor, ROW_DIVIDE)
            tl.store(out + slice * 32, rounded(value, OUT), mask=row_mask[:, None] & (column < columns)[None, :])
