"""Instructions that widen two words at once in fewer steps than ``tiled/`` takes: bfloat16 on Hopper only.

Programs for many rows wait for the widening of costlier weights, not for memory: each instruction saved is seen.
"""

from __future__ import annotations

import triton

from qhub_triton.tiled.operands import in_two_parts, masked

__all__ = ["float8_scaled", "folds", "less_zero", "lookup_kinds", "lookup_pair", "scales_pairs"]


@triton.constexpr_function
def folds(kind, bits, half, zero, whole):
    """Return whether zeros, or the factor between exponents' biases, are folded into numbers far below their scales:
    see :func:`less_zero` and :func:`float8_scaled`."""
    if half or 8 % bits:
        return False
    return kind >= 2 or (kind == 0 and zero == 1 and whole)


@triton.constexpr_function
def less_zero(bits, place, rounds):
    """Return the instructions for the weights at ``place`` of two words $1: masked, they are subnormal numbers as in
    :func:`qhub_triton.tiled.operands.subnormal`; $2 is less their zeros, $3 (and $4, what it lost, where it ``rounds``)
    their scales."""
    code = masked(bits, place) + "add.rn.bf16x2 t, t, $2; "
    return code + (in_two_parts(3) if rounds else "mul.rn.bf16x2 $0, t, $3; }")


@triton.constexpr_function
def float8_scaled(place, exponent, rounds):
    """Return the instructions for the float8 at ``place`` of two words $1, its exponent of ``exponent`` bits, moved
    into bfloat16 as it is (2^n too small) and times $2 (and $3, what that lost, where it ``rounds``)."""
    magnitude = 0x7F00 >> (8 - exponent)
    code = "{ .reg .b32 s, t, u; "
    if place == 0:
        code += f"shl.b32 s, $1, 8; shl.b32 t, $1, {exponent}; "
    else:
        code += f"mov.b32 s, $1; shr.b32 t, $1, {8 - exponent}; "
    code += f"and.b32 t, t, {magnitude << 16 | magnitude:#x}; lop3.b32 t, s, 0x80008000, t, 0xEA; "
    return code + (in_two_parts(2) if rounds else "mul.rn.bf16x2 $0, t, $2; }")


@triton.constexpr_function
def scales_pairs(half, run, late):
    """Return whether a lookup multiplies by scales too: in bfloat16, where both places of a pair share theirs."""
    return not half and run % 2 == 0 and not late


@triton.constexpr_function
def lookup_pair(place, scales):
    """Return the instructions: $0 and $1 the numbers at ``place`` and the next of two words $2, ``place`` even; $3 to
    $18 the table's bytes, each word of them twice (:mod:`qhub_triton.tiled.registers`).

    A byte of each word holds both places' codes. ``scales``: 1 to multiply by $19, 2 by it and by $20, what it lost.
    """
    code = "{ .reg .b32 a, m, h, p, q, l, u; "
    code += f"prmt.b32 a, $2, 0, {'0x4431' if place else '0x4420'}; and.b32 m, a, 0x7777; "
    code += "shr.b32 h, a, 1; lop3.b32 h, h, 0x4444, 0x3210, 0xEA; "
    for table, name in ((("$3", "$5", "$7", "$9"), "l"), (("$11", "$13", "$15", "$17"), "u")):
        code += f"prmt.b32 p, {table[0]}, {table[1]}, m; prmt.b32 q, {table[2]}, {table[3]}, m; "
        code += f"prmt.b32 {name}, p, q, h; "
    if not scales:
        return code + "prmt.b32 $0, l, u, 0x6240; prmt.b32 $1, l, u, 0x7351; }"
    code += "prmt.b32 a, l, u, 0x6240; prmt.b32 m, l, u, 0x7351; "
    if scales == 1:
        return code + "mul.rn.bf16x2 $0, a, $19; mul.rn.bf16x2 $1, m, $19; }"
    code += "mul.rn.bf16x2 p, a, $20; mul.rn.bf16x2 q, m, $20; "
    # No result may take the place of something that is still to be read.
    return code + "fma.rn.bf16x2 p, a, $19, p; fma.rn.bf16x2 $1, m, $19, q; mov.b32 $0, p; }"


@triton.constexpr_function
def lookup_kinds(scales):
    """Return what operands :func:`lookup_pair` has; results that are written before all is read are marked so."""
    return ",".join((["=&r"] if scales else ["=r"]) * 2 + ["r"] * (17 + scales))
