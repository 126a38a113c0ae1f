"""Scales and zeros of rows and groups of a tiled layout, plain or under a second level of scales."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["group_scales", "group_zeros", "paired", "place_of", "run_of"]


@triton.constexpr_function
def run_of(per_word, group):
    """Return how many slices in a row share their scales, wherever in a block one starts counting by so many.

    ``per_word``: slices of a block. ``group``: weights that share a scale, a multiple of 32.
    """
    a, b = group // 32, per_word
    while b:
        a, b = b, a % b
    return a


@triton.jit
def place_of(row):
    """Return where ``row`` is among its tile's 64: rows 8 apart, of the same 16, lie side by side."""
    return row % 64 // 16 * 16 + row % 8 * 2 + row // 8 % 2


@triton.jit
def _place(row, group, GROUPS):
    """Return where the number of (row, group) lies in (T, G, 64): see :func:`place_of`."""
    return ((row // 64)[None, :] * GROUPS + group[:, None]) * 64 + place_of(row)[None, :]


@triton.jit
def group_scales(scales, supers, table, offset, row, group, GROUPS, known, NESTED: tl.constexpr):
    """Return the scales (len(group), len(row)) float32 of ``row`` in ``group``; 0 where not ``known``.

    NESTED: None, or (second-level group, has table, has offset, divides) of :class:`qhub.layouts.Nested`. Plain scales
    in bytes are powers of two, in E8M0: the exponent of a float32.
    """
    code = tl.load(scales + _place(row, group, GROUPS), mask=known, other=0)
    if NESTED is None:
        if code.dtype == tl.uint8:
            return (code.to(tl.int32) << 23).to(tl.float32, bitcast=True)
        else:
            return code.to(tl.float32)
    else:
        return _second(code, supers, table, offset, row, group, GROUPS, known, NESTED)


@triton.jit
def paired(pointer, first, group, N, GROUPS, BLOCK_N: tl.constexpr):
    """Return the numbers (BLOCK_N,), of 16 or 8 bits, of the rows from ``first``, a multiple of 16, on in ``group``.

    Two are had of a read: the compiler brings reads of 32 bits through shared memory ahead of a loop's turn, and none
    smaller; two of 8 bits are read with the two beside them. Rows that lie side by side are one lane's in a matrix
    operand. 0 past the last tile and the last group.
    """
    WIDTH: tl.constexpr = pointer.dtype.element_ty.primitive_bitwidth
    pair = first // 2 + tl.arange(0, BLOCK_N // 2)
    known = (pair // 32 < tl.cdiv(N, 64)) & (group < GROUPS)
    place = ((pair // 32 * GROUPS + group) * 32 + pair % 32) // (16 // WIDTH)
    both = tl.load(pointer.to(tl.pointer_type(tl.int32), bitcast=True) + place, mask=known, other=0)
    if WIDTH == 16:
        apart = tl.join(both.to(tl.int16), (both >> 16).to(tl.int16))
    else:
        both = both >> (pair % 2 * 16)
        apart = tl.join(both.to(tl.int8), (both >> 8).to(tl.int8))
    apart = apart.reshape(BLOCK_N // 16, 8, 2)
    return apart.permute(0, 2, 1).reshape(BLOCK_N).to(pointer.dtype.element_ty, bitcast=True)


@triton.jit
def group_zeros(zeros, supers, row, group, GROUPS, known, NESTED: tl.constexpr):
    """Return the zeros (len(group), len(row)) float32; see :func:`group_scales`."""
    code = tl.load(zeros + _place(row, group, GROUPS), mask=known, other=0.0)
    if NESTED is None:
        return code.to(tl.float32)
    else:
        return _second(code, supers, supers, supers, row, group, GROUPS, known, NESTED)


@triton.jit
def _second(code, supers, table, offset, row, group, GROUPS, known, NESTED: tl.constexpr):
    SIZE: tl.constexpr = NESTED[0]
    if NESTED[1]:
        value = tl.load(table + code.to(tl.int32), mask=known, other=0.0)
    else:
        value = code.to(tl.float32)
    if SIZE == 0:
        second = tl.load(supers + tl.zeros((1, 1), tl.int32)).to(tl.float32)
    else:
        place = (row[None, :] * GROUPS + group[:, None]) // SIZE
        second = tl.load(supers + place, mask=known & (place >= 0), other=1.0).to(tl.float32)
    value = value / second if NESTED[3] else value * second
    if NESTED[2]:
        value += tl.load(offset + tl.zeros((1, 1), tl.int32))
    return tl.where(known, value, 0.0)
