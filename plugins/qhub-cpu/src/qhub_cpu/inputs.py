"""Lays the input of a product out: float32, rows padded with zeros to whole vectors, columns in the order the weights come.

Also rounds inputs to int8 steps where the layout says so: LLM.int8() (Dettmers et al. 2022, eq. 8) with the conventions of
:func:`qhub.kernels.reference.linear_int8`. A rounded entry is kept as the float ``code * step`` that it stands for, so that the
product is the one of any other layout.
"""

from __future__ import annotations

import numpy as np
from numba import float32

from qhub_cpu.compiled import device
from qhub_cpu.vectors import load_f32, load_u8, store_f32, store_u8
from qhub_cpu.weights import number

__all__ = ["lay_out", "padded", "round_int8"]


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
    """Write ``m`` rows of ``k`` numbers of float type ``kind`` at ``x`` to ``target`` as float32, ``row`` floats apart."""
    for i in range(m):
        first = target + 4 * row * i
        for column in range(k):
            store_f32(first + 4 * place_of(column, paired), number(x, kind, i * k + column))
        for column in range(k, row):
            store_f32(first + 4 * place_of(column, paired), float32(0.0))


@device
def round_int8(rows, m, row, threshold, columns):
    """Round ``m`` laid-out rows in place to absmax/127 steps each, columns that reach ``threshold`` left as they are.

    ``threshold``: 0 rounds all. ``columns``: address of ``row`` bytes to work in. Entries of a left column count as zero
    for the absmax where they reach the threshold themselves, and count where they do not.
    """
    for column in range(row):
        store_u8(columns + column, 0)
    if threshold > 0:
        for i in range(m):
            for column in range(row):
                if abs(load_f32(rows + 4 * (i * row + column))) >= threshold:
                    store_u8(columns + column, 1)
    for i in range(m):
        first = rows + 4 * row * i
        absmax = float32(0.0)
        for column in range(row):
            magnitude = abs(load_f32(first + 4 * column))
            if threshold <= 0 or magnitude < threshold:
                absmax = max(absmax, magnitude)
        step = absmax / float32(127.0) if absmax > 0 else float32(1.0) / float32(127.0)
        for column in range(row):
            if load_u8(columns + column) == 0:
                value = load_f32(first + 4 * column)
                store_f32(first + 4 * column, float32(np.rint(value / step)) * step)
