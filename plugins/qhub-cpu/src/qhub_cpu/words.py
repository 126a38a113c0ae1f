"""The argument block: 64-bit words through which Python, the entry point and the threads of one product talk.

Words are whole numbers or addresses. What never changes from call to call is filled in when a layer is met
(:mod:`qhub_cpu.plans`), the rest by the entry point, in a copy of its own (:mod:`qhub_cpu.launch`).
"""

from __future__ import annotations

__all__ = [
    "BIAS",
    "BIAS_KIND",
    "BLOCK_BYTES",
    "CODES",
    "COUNT",
    "FIRST",
    "GROUP",
    "GROUPS",
    "GROUP_ROWS",
    "LAST",
    "OUT",
    "OUT_KIND",
    "PAIRED",
    "ROUNDS",
    "ROW_BYTES",
    "SCALES",
    "TABLE",
    "TABLE_ENTRIES",
    "THREAD",
    "THRESHOLD",
    "WORDS",
    "X_ROW",
    "ZEROS",
    "K",
    "M",
    "N",
    "X",
]  # fmt: skip

# Shape: N rows of K weights, M rows of input; rows [FIRST, LAST) are this call's. A row of codes takes ROW_BYTES.
N, K, M, FIRST, LAST, ROW_BYTES = range(6)
# A scale is shared by GROUP_ROWS x GROUP weights; a row of groups has GROUPS of them.
GROUP_ROWS, GROUP, GROUPS = range(6, 9)
# The input, laid out: address, and how many floats its rows are apart. The output and the bias: address, float type.
X, X_ROW, OUT, OUT_KIND, BIAS, BIAS_KIND = range(9, 15)
# Whether the input's columns are paired (see inputs.py), and rounded to int8 up to a threshold (a float32).
PAIRED, ROUNDS, THRESHOLD = range(15, 18)
# The weight: addresses of codes and of the value table, and how many entries that has.
CODES, TABLE, TABLE_ENTRIES = range(18, 21)
# Scales and zeros, five words each: addresses of the numbers, of their second level, table and offset; and the shift
# by which an index becomes one of the second level.
SCALES, ZEROS = 21, 26
# Addresses of OpenMP's thread number and thread count; 0 outside of a parallel region.
THREAD, COUNT = range(31, 33)
WORDS = 40
BLOCK_BYTES = 8 * WORDS
