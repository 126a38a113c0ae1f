"""What every thread runs: the product of its rows of W with a few rows of x, and the decoding of its rows of W."""

from __future__ import annotations

from functools import cache
from typing import Any

from numba import float32

from qhub_cpu.compiled import body, device, seal
from qhub_cpu.variants import BF16, F16, F32, NONE, Variant
from qhub_cpu.vectors import (
    add,
    call_count,
    codes8,
    fma,
    high_half,
    load_u8,
    load_vector,
    pick,
    stack_memory,
    store_bf16,
    store_f32,
    store_u8,
    store_vector,
    store_vector_bf16,
    store_vector_f16,
    total,
    zero_vector,
    zip_high,
    zip_low,
)
from qhub_cpu.weights import group_values, number, quantity, table_vector, tail, weights16, word
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
    X,
    X_ROW,
    ZEROS,
    K,
    M,
    N,
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
def pair(address, values, scale, zero, v):
    """Return 32 weights in the order in which the input is laid out."""
    if v.paired:
        codes = codes8(address)
        return pick(values, codes), pick(values, high_half(codes))
    return weights16(address, values, scale, zero, v), weights16(address + 2 * v.bits, values, scale, zero, v)


@device
def dot1(block, row, x, table, memory, v):
    """Return row ``row`` of W times one row of x."""
    codes = word(block, CODES) + row * word(block, ROW_BYTES)
    k, group = word(block, K), word(block, GROUP)
    index = row // word(block, GROUP_ROWS) * word(block, GROUPS)
    a, b = zero_vector(), zero_vector()
    start = 0
    while start < k:
        stop = min(start + group, k)
        scale, zero = quantity(block, SCALES, index, v.scales), quantity(block, ZEROS, index, v.zeros)
        values = group_values(table, scale, zero, v)
        column = start
        while column + 32 <= stop:
            first, second = pair(codes + column * v.bits // 8, values, scale, zero, v)
            a = fma(first, load_vector(x + 4 * column), a)
            b = fma(second, load_vector(x + 4 * column + 64), b)
            column += 32
        if v.paired == 0 and column + 16 <= stop:
            w = weights16(codes + column * v.bits // 8, values, scale, zero, v)
            a = fma(w, load_vector(x + 4 * column), a)
            column += 16
        if column < stop:
            # The input is zero beyond the last column, so that what is decoded there does not count.
            at = column * v.bits // 8
            short = tail(codes + at, word(block, ROW_BYTES) - at, memory)
            if v.paired:
                first, second = pair(short, values, scale, zero, v)
                a = fma(first, load_vector(x + 4 * column), a)
                b = fma(second, load_vector(x + 4 * column + 64), b)
            else:
                a = fma(weights16(short, values, scale, zero, v), load_vector(x + 4 * column), a)
        start = stop
        index += 1
    return total(add(a, b))


@device
def dot4(block, row, x, gap, table, memory, v):
    """Return row ``row`` of W times four rows of x, ``gap`` bytes apart."""
    codes = word(block, CODES) + row * word(block, ROW_BYTES)
    k, group = word(block, K), word(block, GROUP)
    index = row // word(block, GROUP_ROWS) * word(block, GROUPS)
    a, b, c, d = zero_vector(), zero_vector(), zero_vector(), zero_vector()
    start = 0
    while start < k:
        stop = min(start + group, k)
        scale, zero = quantity(block, SCALES, index, v.scales), quantity(block, ZEROS, index, v.zeros)
        values = group_values(table, scale, zero, v)
        column = start
        while column < stop:
            at = column * v.bits // 8
            wide = v.paired == 1 or column + 32 <= stop
            address = codes + at
            if column + (32 if wide else 16) > stop:
                address = tail(address, word(block, ROW_BYTES) - at, memory)
            here = x + 4 * column
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
        for row in range(start, stop):
            i = 0
            while i + 4 <= m:
                p, q, r, s = dot4(block, row, x + i * gap, gap, table, memory, v)
                emit(block, i, row, p)
                emit(block, i + 1, row, q)
                emit(block, i + 2, row, r)
                emit(block, i + 3, row, s)
                i += 4
            while i < m:
                emit(block, i, row, dot1(block, row, x + i * gap, table, memory, v))
                i += 1

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
    """Return the compiled body that writes a thread's rows of W as float type ``kind``, row 0 at the output's address."""
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
            index = row // word(block, GROUP_ROWS) * word(block, GROUPS)
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
