"""What every thread runs: the product of its rows of W with a few rows of x, and the decoding of its rows of W."""

from __future__ import annotations

from functools import cache
from typing import Any

from qhub_cpu.codes import codes8, high_half, pick
from qhub_cpu.compiled import body, device, seal
from qhub_cpu.memory import (
    call_count,
    load_u8,
    load_vector,
    stack_memory,
    store_bf16,
    store_f32,
    store_u8,
    store_vector,
    store_vector_bf16,
    store_vector_f16,
    word,
)
from qhub_cpu.variants import BF16, F32, NONE, Variant
from qhub_cpu.vectors import add, fma, total, zero_vector, zip_high, zip_low
from qhub_cpu.weights import group_values, number, quantity, table_vector, tail, weights16
from qhub_cpu.words import (
    BIAS,
    BIAS_KIND,
    CODES,
    COUNT,
    FIRST,
    GROUP,
    GROUP_ROWS,
    GROUPS,
    LAST,
    OUT,
    OUT_KIND,
    ROW_BYTES,
    SCALES,
    TABLE,
    TABLE_ENTRIES,
    THREAD,
    X_ROW,
    ZEROS,
    K,
    M,
    N,
    X,
)

__all__ = ["decoder", "product"]


@device
def share(block):
    """Return the rows [start, stop) that are this thread's."""
    first, count = word(block, FIRST), word(block, LAST) - word(block, FIRST)
    if word(block, THREAD) == 0:
        return first, first + count
    thread, threads = call_count(word(block, THREAD)), call_count(word(block, COUNT))
    return first + count * thread // threads, first + count * (thread + 1) // threads


@device
def first_scale(block, row):
    """Return the place of a row's first scale."""
    height = word(block, GROUP_ROWS)
    # Divisions take as long as several vectors of weights.
    return (row if height == 1 else row // height) * word(block, GROUPS)


@device
def pair(address, values, scale, zero, v):
    """Return 32 weights in the order in which the input is laid out."""
    if v.paired:
        codes = codes8(address)
        return pick(values, codes), pick(values, high_half(codes))
    return weights16(address, values, scale, zero, v), weights16(address + 2 * v.bits, values, scale, zero, v)


@device
def reach(codes, column, stop, block, memory, v):
    """Return where the codes of a group's last columns can be read as a whole vector, in place or from a copy."""
    at = column * v.bits // 8
    if column + (32 if v.paired else 16) <= stop:
        return codes + at
    # The input is zero beyond the last column, so that what is decoded there does not count.
    return tail(codes + at, word(block, ROW_BYTES) - at, memory)


@device
def dot_pair(block, row, other, x, table, memory, v):
    """Return rows ``row`` and ``other`` of W times one row of x: two, because they share the loads of x."""
    codes = word(block, CODES) + row * word(block, ROW_BYTES)
    gap = (other - row) * word(block, ROW_BYTES)
    index, step = first_scale(block, row), first_scale(block, other) - first_scale(block, row)
    k, group = word(block, K), word(block, GROUP)
    a, b, c, d = zero_vector(), zero_vector(), zero_vector(), zero_vector()
    start = 0
    while start < k:
        stop = min(start + group, k)
        scale, zero = quantity(block, SCALES, index, v.scales), quantity(block, ZEROS, index, v.zeros)
        values = group_values(table, scale, zero, v)
        scale2, zero2 = quantity(block, SCALES, index + step, v.scales), quantity(block, ZEROS, index + step, v.zeros)
        values2 = group_values(table, scale2, zero2, v)
        column = start
        while column + 32 <= stop:
            address = codes + column * v.bits // 8
            left, right = load_vector(x + 4 * column), load_vector(x + 4 * column + 64)
            first, second = pair(address, values, scale, zero, v)
            a, b = fma(first, left, a), fma(second, right, b)
            first, second = pair(address + gap, values2, scale2, zero2, v)
            c, d = fma(first, left, c), fma(second, right, d)
            column += 32
        while column < stop:
            left = load_vector(x + 4 * column)
            address = reach(codes, column, stop, block, memory, v)
            if v.paired:
                right = load_vector(x + 4 * column + 64)
                first, second = pair(address, values, scale, zero, v)
                a, b = fma(first, left, a), fma(second, right, b)
                first, second = pair(reach(codes + gap, column, stop, block, memory, v), values2, scale2, zero2, v)
                c, d = fma(first, left, c), fma(second, right, d)
                column += 32
            else:
                a = fma(weights16(address, values, scale, zero, v), left, a)
                address = reach(codes + gap, column, stop, block, memory, v)
                c = fma(weights16(address, values2, scale2, zero2, v), left, c)
                column += 16
        start = stop
        index += 1
    return total(add(a, b)), total(add(c, d))


@device
def dot_four(block, row, x, gap, table, memory, v):
    """Return row ``row`` of W times four rows of x, ``gap`` bytes apart: four, because they share what is decoded."""
    codes = word(block, CODES) + row * word(block, ROW_BYTES)
    k, group = word(block, K), word(block, GROUP)
    index = first_scale(block, row)
    a, b, c, d = zero_vector(), zero_vector(), zero_vector(), zero_vector()
    start = 0
    while start < k:
        stop = min(start + group, k)
        scale, zero = quantity(block, SCALES, index, v.scales), quantity(block, ZEROS, index, v.zeros)
        values = group_values(table, scale, zero, v)
        column = start
        while column < stop:
            here = x + 4 * column
            wide = v.paired == 1 or column + 32 <= stop
            whole = column + 32 <= stop
            address = codes + column * v.bits // 8 if whole else reach(codes, column, stop, block, memory, v)
            if wide:
                first, second = pair(address, values, scale, zero, v)
                a = fma(second, load_vector(here + 64), fma(first, load_vector(here), a))
                b = fma(second, load_vector(here + gap + 64), fma(first, load_vector(here + gap), b))
                c = fma(second, load_vector(here + 2 * gap + 64), fma(first, load_vector(here + 2 * gap), c))
                d = fma(second, load_vector(here + 3 * gap + 64), fma(first, load_vector(here + 3 * gap), d))
                column += 32
            else:
                first = weights16(address, values, scale, zero, v)
                a = fma(first, load_vector(here), a)
                b = fma(first, load_vector(here + gap), b)
                c = fma(first, load_vector(here + 2 * gap), c)
                d = fma(first, load_vector(here + 3 * gap), d)
                column += 16
        start = stop
        index += 1
    return total(a), total(b), total(c), total(d)


@device
def emit(block, m, row, value):
    """Store one output, the bias added."""
    if word(block, BIAS_KIND) != NONE:
        value = value + number(word(block, BIAS), word(block, BIAS_KIND), row)
    index = m * word(block, N) + row
    if word(block, OUT_KIND) == BF16:
        store_bf16(word(block, OUT) + 2 * index, value)
    else:
        store_f32(word(block, OUT) + 4 * index, value)


@cache
def product(v: Variant) -> Any:
    """Return the compiled body that writes ``y = x @ W.T + bias`` for a thread's rows of W."""
    key = seal()

    @body
    def multiply(block):
        _ = key  # Read, so that code kept on disk is told from that of other sources.
        start, stop = share(block)
        memory = stack_memory(64)
        table = zero_vector()
        if word(block, TABLE) != 0:
            table = table_vector(word(block, TABLE), word(block, TABLE_ENTRIES), memory)
        m, x, gap = word(block, M), word(block, X), 4 * word(block, X_ROW)
        fours = m - m % 4
        for row in range(start, stop, 2):
            # An odd last row is its own partner.
            other = min(row + 1, stop - 1)
            for one in range(row, other + 1):
                for i in range(0, fours, 4):
                    p, q, r, s = dot_four(block, one, x + i * gap, gap, table, memory, v)
                    emit(block, i, one, p)
                    emit(block, i + 1, one, q)
                    emit(block, i + 2, one, r)
                    emit(block, i + 3, one, s)
            for i in range(fours, m):
                p, q = dot_pair(block, row, other, x + i * gap, table, memory, v)
                emit(block, i, row, p)
                emit(block, i, other, q)

    return multiply


@device
def write16(address, w, kind):
    """Store 16 weights as float type ``kind``."""
    if kind == F32:
        store_vector(address, w)
    elif kind == BF16:
        store_vector_bf16(address, w)
    else:
        store_vector_f16(address, w)


@cache
def decoder(v: Variant, kind: int) -> Any:
    """Return the compiled body that writes a thread's rows of W as type ``kind``, row 0 at the output's address."""
    key = seal()
    size = 4 if kind == F32 else 2

    @body
    def decode(block):
        _ = key
        start, stop = share(block)
        memory = stack_memory(64)
        short = stack_memory(64)
        table = zero_vector()
        if word(block, TABLE) != 0:
            table = table_vector(word(block, TABLE), word(block, TABLE_ENTRIES), memory)
        k, group = word(block, K), word(block, GROUP)
        for row in range(start, stop):
            codes = word(block, CODES) + row * word(block, ROW_BYTES)
            out = word(block, OUT) + row * k * size
            index = first_scale(block, row)
            begin = 0
            while begin < k:
                end = min(begin + group, k)
                scale, zero = quantity(block, SCALES, index, v.scales), quantity(block, ZEROS, index, v.zeros)
                values = group_values(table, scale, zero, v)
                column = begin
                while column + 32 <= end:
                    first, second = pair(codes + column * v.bits // 8, values, scale, zero, v)
                    if v.paired:
                        first, second = zip_low(first, second), zip_high(first, second)
                    write16(out + column * size, first, kind)
                    write16(out + column * size + 16 * size, second, kind)
                    column += 32
                while column < end:
                    at = column * v.bits // 8
                    address = codes + at
                    whole = column + 16 <= end
                    if not whole:
                        address = tail(address, word(block, ROW_BYTES) - at, memory)
                    w = weights16(address, values, scale, zero, v)
                    if whole:
                        write16(out + column * size, w, kind)
                    else:
                        write16(short, w, kind)
                        for byte in range((end - column) * size):
                            store_u8(out + column * size + byte, load_u8(short + byte))
                    column += 16
                begin = end
                index += 1

    return decode
