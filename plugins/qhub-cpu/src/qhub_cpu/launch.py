"""The entry point that Python calls: fills in an argument block, lays the input out, and starts the threads."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import float32

from qhub_cpu.compiled import entry, seal
from qhub_cpu.inputs import lay_out, padded, round_int8
from qhub_cpu.memory import call_body, call_fork, load_f32, load_word, stack_memory, store_word, word
from qhub_cpu.variants import F32
from qhub_cpu.words import (
    BIAS,
    BIAS_KIND,
    BLOCK_BYTES,
    CODES,
    COUNT,
    FIRST,
    LAST,
    OUT,
    OUT_KIND,
    PAIRED,
    ROUNDS,
    SCALES,
    TABLE,
    THREAD,
    THRESHOLD,
    WORDS,
    X_ROW,
    ZEROS,
    K,
    M,
    X,
)

__all__ = ["launcher", "rounder"]


@cache
def launcher() -> Any:
    """Return the compiled entry point.

    Its arguments are whole numbers: ``plan``: address of a block (:mod:`qhub_cpu.words`); ``body``: of the code;
    ``fork``, ``thread``, ``count``: of OpenMP's functions, 0 to run on this thread alone; ``threads``: how many;
    ``first``, ``last``: rows of W; ``m``, ``x``, ``x_kind``: rows, address and float type of the input, address 0 for
    none; ``out`` … ``bias_kind``: addresses and float types; ``codes``, ``table``: addresses; ``s0`` … ``z3``:
    addresses of scales and zeros with their companions, 0 for none.
    """
    key = seal()

    @entry
    def launch(
        plan, body, fork, thread, count, threads, first, last, m, x, x_kind, out, out_kind, bias, bias_kind,
        codes, table, s0, s1, s2, s3, z0, z1, z2, z3,
    ):  # fmt: skip
        _ = key
        block = stack_memory(BLOCK_BYTES)
        for place in range(WORDS):
            store_word(block + 8 * place, load_word(plan + 8 * place))
        store_word(block + 8 * FIRST, first)
        store_word(block + 8 * LAST, last)
        store_word(block + 8 * M, m)
        store_word(block + 8 * OUT, out)
        store_word(block + 8 * OUT_KIND, out_kind)
        store_word(block + 8 * BIAS, bias)
        store_word(block + 8 * BIAS_KIND, bias_kind)
        store_word(block + 8 * CODES, codes)
        store_word(block + 8 * TABLE, table)
        store_word(block + 8 * SCALES, s0)
        store_word(block + 8 * SCALES + 8, s1)
        store_word(block + 8 * SCALES + 16, s2)
        store_word(block + 8 * SCALES + 24, s3)
        store_word(block + 8 * ZEROS, z0)
        store_word(block + 8 * ZEROS + 8, z1)
        store_word(block + 8 * ZEROS + 16, z2)
        store_word(block + 8 * ZEROS + 24, z3)
        k = word(block, K)
        paired, rounds = word(block, PAIRED), word(block, ROUNDS)
        row = padded(k)
        as_it_is = x == 0 or (x_kind == F32 and paired == 0 and rounds == 0 and k % 16 == 0)
        # Behind the rows, a byte a column for round_int8.
        laid = np.empty(0 if as_it_is else m * row + row // 4, np.float32)
        if as_it_is:
            store_word(block + 8 * X, x)
            store_word(block + 8 * X_ROW, k)
        else:
            lay_out(x, x_kind, m, k, row, paired, laid.ctypes.data)
            if rounds:
                threshold = load_f32(block + 8 * THRESHOLD)
                round_int8(laid.ctypes.data, m, row, threshold, laid.ctypes.data + 4 * m * row)
            store_word(block + 8 * X, laid.ctypes.data)
            store_word(block + 8 * X_ROW, row)
        if fork == 0:
            store_word(block + 8 * THREAD, 0)
            call_body(body, block)
        else:
            store_word(block + 8 * THREAD, thread)
            store_word(block + 8 * COUNT, count)
            call_fork(fork, body, block, threads)
        # The input's memory must outlive the threads.
        return laid.size

    return launch


@cache
def rounder() -> Any:
    """Return the compiled rounding of rows of x to int8 steps, for products that torch does.

    Arguments: address and float type of x, its rows M and columns K, the address of M x K floats to write, the
    threshold, and the address of K bytes to work in.
    """
    key = seal()

    @entry
    def round_rows(x, kind, m, k, target, threshold, columns):
        _ = key
        lay_out(x, kind, m, k, k, 0, target)
        round_int8(target, m, k, float32(threshold), columns)

    return round_rows
