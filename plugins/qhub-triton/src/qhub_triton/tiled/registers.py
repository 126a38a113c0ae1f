"""Looks codes of 4 bits up in a table of 16 numbers that lies in registers: no memory is read for a weight.

A byte permutation picks four bytes out of eight by four codes of 3 bits. Two of them and a third by the codes'
highest bits are a table of 16 bytes; one such table holds the lower bytes of the numbers, one the upper. That is 27
instructions for eight weights; a load for each weight would keep the load units as busy as the weights' own arrival
does. For NVIDIA's GPUs only; elsewhere the table is read from memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["by_instructions", "entries", "looked_up", "lookup", "lookup_kinds"]


@triton.constexpr_function
def lookup():
    """Return the instructions: $0 to $3 the numbers at places 0 to 3 of the two words $4, $5 to $20 the table's bytes,
    each word of them twice."""
    lower, upper = ("$5", "$7", "$9", "$11"), ("$13", "$15", "$17", "$19")
    code = "{ .reg .b32 a, b, m, h, p, q, l0, h0, l1, h1; "
    for odd in (0, 1):
        # Codes of the first and the second word side by side: places 0 and 2, then 1 and 3.
        if odd:
            code += "shr.b32 a, $4, 4; shr.b32 b, $4, 16; lop3.b32 a, a, b, 0x0F0F, 0xE4; "
        else:
            code += "shr.b32 b, $4, 12; lop3.b32 a, $4, b, 0x0F0F, 0xE4; "
        code += "and.b32 m, a, 0x7777; shr.b32 h, a, 1; lop3.b32 h, h, 0x4444, 0x3210, 0xEA; "
        for table, name in ((lower, "l"), (upper, "h")):
            code += f"prmt.b32 p, {table[0]}, {table[1]}, m; prmt.b32 q, {table[2]}, {table[3]}, m; "
            code += f"prmt.b32 {name}{odd}, p, q, h; "
    # Last, so that no result may take the place of something that is still to be read.
    for place in range(4):
        code += f"prmt.b32 ${place}, l{place % 2}, h{place % 2}, {'0x7362' if place > 1 else '0x5140'}; "
    return code + "}"


@triton.constexpr_function
def lookup_kinds():
    return ",".join(["=r"] * 4 + ["r"] * 17)


@triton.constexpr_function
def by_instructions(kind, bits, native):
    """Return whether such codes are looked up by instructions, here or in :mod:`qhub_triton.tiled.banks`, not by
    :func:`qhub_triton.tiled.decode.numbers`."""
    return native and kind == 1 and bits == 4


@triton.jit
def entries(table, KIND: tl.constexpr, BITS: tl.constexpr, NATIVE: tl.constexpr):
    """Return the bytes of a table for :func:`looked_up`; read once, before any loop.

    ``table``: 8 int32 as :func:`qhub_triton.tiled.arguments.bytes_of` makes them.
    """
    read = ()
    if by_instructions(KIND, BITS, NATIVE):
        for i in tl.static_range(8):
            # Tensors of one number: the compiler moves orders of elements past them, and not past scalars.
            read = read + (tl.load(table + i + tl.zeros((1, 1), tl.int32)),)
    return read


@triton.jit
def looked_up(words, table, DTYPE: tl.constexpr):
    """Return the numbers at places 0, 1, 2 and 3 of int16 ``words``, four tensors of its shape in DTYPE.

    ``table``: of :func:`entries`.
    """
    args = [words, table[0], table[1], table[2], table[3], table[4], table[5], table[6], table[7]]
    # The dtypes are written out: the compiler takes no constants of the caller's here.
    if DTYPE == tl.float16:
        return tl.inline_asm_elementwise(
            lookup(), lookup_kinds(), args, (tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=2
        )
    else:
        return tl.inline_asm_elementwise(
            lookup(), lookup_kinds(), args, (tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=2
        )
