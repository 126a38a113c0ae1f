"""Lays the input of a product out: float32, rows padded to whole vectors, columns in the order the weights come.

Also rounds inputs to int8 where the layout says so: LLM.int8() (Dettmers et al. 2022, eq. 8) with the conventions of
:func:`qhub.kernels.reference.linear_int8`. Where the weights are no int8 matrix, a rounded entry is kept as the float
``code * step`` that it stands for, so that the product is the one of any other layout.
"""

from __future__ import annotations

import numpy as np
from numba import float32, int64

from qhub_cpu.compiled import device
from qhub_cpu.memory import load_f32, load_u8, store_f32, store_u8
from qhub_cpu.variants import F32
from qhub_cpu.weights import number

__all__ = ["int8_codes", "lay_out", "padded", "round_int8"]


@device
def padded(count):
    """Return ``count`` floats rounded up to whole pairs of vectors."""
    return (count + 31) & ~31


@device
def place_of(column, paired):
    """Return where ``column`` lies in a row: paired codes yield 16 even columns of 32, then the 16 odd ones."""
    if paired:
        return (column & ~31) + ((column & 1) << 4) + ((column & 31) >> 1)
    return column


@device
def lay_out(x, kind, m, k, row, paired, target):
    """Write ``m`` rows of ``k`` numbers of float type ``kind`` at ``x`` to ``target`` as float32, ``row`` floats
    apart."""
    for i in range(m):
        first = target + 4 * row * i
        for column in range(k):
            store_f32(first + 4 * place_of(column, paired), number(x, kind, i * k + column))
        for column in range(k, row):
            store_f32(first + 4 * place_of(column, paired), float32(0.0))


@device
def mark_outliers(x, kind, m, k, threshold, columns):
    """Set the bytes at ``columns`` to 1 for columns that reach ``threshold`` in some row, else to 0; return how many
    do.

    A threshold of 0 marks none.
    """
    for column in range(k):
        store_u8(columns + column, 0)
    if threshold <= 0:
        return 0
    for i in range(m):
        for column in range(k):
            if abs(number(x, kind, i * k + column)) >= threshold:
                store_u8(columns + column, 1)
    count = 0
    for column in range(k):
        count += load_u8(columns + column)
    return count


@device
def int8_step(x, kind, first, k, threshold):
    """Return the step of the row that begins at entry ``first``: absmax/127 of its entries below ``threshold``.

    1/127 where all are 0; NaN where one is not finite, and so will the outputs be. Small entries of an outlier column
    count, though they are not rounded: so it is in the reference.
    """
    absmax = float32(0.0)
    for column in range(k):
        magnitude = abs(number(x, kind, first + column))
        if threshold <= 0 or not magnitude >= threshold:
            if not magnitude < np.inf:
                return float32(np.nan)
            absmax = max(absmax, magnitude)
    return (absmax if absmax > 0 else float32(1.0)) / float32(127.0)


@device
def round_int8(rows, m, k, threshold, columns):
    """Round ``m`` rows of ``k`` float32 in place to steps of their own, outlier columns left as they are.

    ``columns``: address of ``k`` bytes to work in. Steps do not depend on the order of the columns, nor on padding
    with zeros.
    """
    mark_outliers(rows, F32, m, k, threshold, columns)
    for i in range(m):
        step = int8_step(rows, F32, i * k, k, threshold)
        for column in range(k):
            if load_u8(columns + column) == 0:
                place = rows + 4 * (i * k + column)
                store_f32(place, float32(np.rint(load_f32(place) / step)) * step)


@device
def int8_codes(x, kind, m, k, threshold, columns, codes, steps):
    """Write the int8 codes of ``m`` rows, 0 in outlier columns, and their steps; return how many columns those are."""
    count = mark_outliers(x, kind, m, k, threshold, columns)
    for i in range(m):
        step = int8_step(x, kind, i * k, k, threshold)
        store_f32(steps + 4 * i, step)
        for column in range(k):
            index = i * k + column
            value = np.rint(number(x, kind, index) / step)
            # Only a number within int8 may become an integer; NaN is none.
            rounds = load_u8(columns + column) == 0 and abs(value) <= 127
            store_u8(codes + index, int64(value) if rounds else int64(0))
    return count
