"""Looks pairs of 4-bit codes up in shared memory, where every lane of a warp has a table of its own.

A table of 16 numbers is one of 256 pairs of them. Held 32 times, so that a lane's copy lies in its own bank of shared
memory (32 KiB in all), 32 lanes read 32 different pairs at once, without conflicts: that is 15 instructions for eight
weights, on three units of a processor, where :mod:`qhub_triton.tiled.registers` takes 27 on one. And an instruction
with one operand and one result is moved by the compiler to where words are in the order of a matrix operand; what has
several results is not, and takes instructions to bring them into it. A program must first write its tables, which is
worth it where reading weights, and not multiplying, takes the time. For NVIDIA's GPUs only.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["PAIRS", "in_banks", "write_banks"]

# Where the pairs begin, in int32, in what :func:`qhub_triton.tiled.arguments.bytes_of` returns.
_PAIRS = 8
PAIRS: tl.constexpr = tl.constexpr(_PAIRS)


@triton.constexpr_function
def _writing(threads):
    """Return the instructions by which ``threads`` write all copies of the 256 pairs that $1 points to; $0: nothing.

    The memory is static, and declared for all of the kernel: what reads it without having written it is an error of the
    assembler's. The compiler's own memory begins behind it.
    """
    code = ".shared .align 16 .b8 qhub_banks[32768]; { .reg .b32 t, a, v, e; .reg .b64 p; "
    code += "mov.u32 t, %tid.x; mov.u32 a, qhub_banks; mad.lo.u32 a, t, 16, a; "
    # A thread writes 16 bytes at a time, four lanes' copies of one pair: eight threads write all of it.
    code += "shr.u32 e, t, 3; mul.wide.u32 p, e, 4; add.u64 p, p, $1; "
    for step in range(2048 // threads):
        code += f"ld.global.nc.b32 v, [p + {step * threads // 2}]; "
        code += f"st.shared.v4.b32 [a + {step * threads * 16}], {{v, v, v, v}}; "
    return code + "bar.sync 0; mov.u32 $0, 0; }"


@triton.constexpr_function
def _reading(place):
    """Return the instructions: $0 the pair at ``place`` of the two words $1.

    Codes are moved to the second four bits of their words; a sum of products with two bytes then is the pair's place:
    128 bytes hold the copies of one.
    """
    shift = ("shl.b32 t, $1, 4;", "mov.b32 t, $1;", "shr.b32 t, $1, 4;", "shr.b32 t, $1, 8;")[place]
    code = f"{{ .reg .b32 t, a, l; {shift} and.b32 t, t, 0x00F000F0; "
    code += "mov.u32 l, %tid.x; and.b32 l, l, 31; mov.u32 a, qhub_banks; mad.lo.u32 a, l, 4, a; "
    return code + "dp2a.lo.u32.u32 t, t, 0x8008, a; ld.shared.b32 $0, [t]; }"


@triton.jit
def write_banks(table):
    """Write the tables of a program's lanes, for all its threads, once.

    ``table``: of :func:`qhub_triton.tiled.arguments.bytes_of`.
    """
    pairs = (table + PAIRS).to(tl.int64)
    threads: tl.constexpr = tl.extra.cuda.num_threads()
    tl.inline_asm_elementwise(_writing(threads), "=r,l", [pairs], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def in_banks(words, PLACE: tl.constexpr, DTYPE: tl.constexpr):
    """Return the numbers at PLACE of int16 ``words``, of any shape, in DTYPE; after :func:`write_banks`."""
    # The dtypes are written out: the compiler takes no constants of the caller's here.
    if DTYPE == tl.float16:
        return tl.inline_asm_elementwise(_reading(PLACE), "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2)
    else:
        return tl.inline_asm_elementwise(_reading(PLACE), "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2)
