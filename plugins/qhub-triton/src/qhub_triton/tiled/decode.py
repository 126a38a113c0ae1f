"""Codes of a tile of 16-bit words to numbers: one shift and one masking for two weights.

A code q of up to 7 bits, put below the exponent of 128 in bfloat16 (0x4300) or of 1024 in float16 (0x6400), is the
number 128 + q or 1024 + q: no conversion is needed, only that constant taken off, here or after the product (Kim et al.
2022, "Who says elephants can't run", section 3.1, for float16). On other hardware, and in triton's interpreter, the
codes are converted one by one.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["E4M3", "E5M2", "INTEGER", "TABLE", "field", "float8", "numbers", "offset_of", "ones"]

INTEGER: tl.constexpr = tl.constexpr(0)
TABLE: tl.constexpr = tl.constexpr(1)
E4M3: tl.constexpr = tl.constexpr(2)
E5M2: tl.constexpr = tl.constexpr(3)


@triton.constexpr_function
def offset_of(kind, bits, half, native):
    """Return what :func:`numbers` adds to each weight."""
    if kind != 0 or not native:
        return 0
    return 1024 if half else 128


@triton.constexpr_function
def field(bits, place, half, high):
    """Return the instructions that put the codes at ``place`` of two words below an exponent."""
    mask = (1 << bits) - 1
    shift = bits * place
    if high is not None:
        mask, shift = 15, shift + 4 * high
    magic = 0x64006400 if half else 0x43004300
    return f"{{ .reg .b32 t; shr.b32 t, $1, {shift}; lop3.b32 $0, t, {mask << 16 | mask:#x}, {magic:#x}, 0xEA; }}"


@triton.constexpr_function
def float8(place, half, exponent):
    """Return the instructions that widen the float8 at ``place`` of two words; its exponent has ``exponent`` bits.

    Sign and magnitude are moved to the places of the 16-bit format; the difference of the biases is a factor 2^n.
    """
    if half:
        move, factor = exponent - 5 + 8, 15 - 2 ** (exponent - 1) + 1
        scale = (15 + factor) << 10
    else:
        move, factor = exponent, 127 - 2 ** (exponent - 1) + 1
        scale = (127 + factor) << 7
    kind = "f16x2" if half else "bf16x2"
    left = "shl.b32 s, $1, 8;" if place == 0 else "mov.b32 s, $1;"
    # s: the byte in the upper half of each word. Magnitude bits go right from there.
    right = 8 - move
    magnitude = (0x7F00 >> right) & 0xFFFF
    return (
        f"{{ .reg .b32 s, t, u; {left} shr.b32 t, s, {right}; and.b32 t, t, {magnitude << 16 | magnitude:#x};"
        f" lop3.b32 u, s, 0x80008000, t, 0xEA; mov.b32 t, {scale << 16 | scale:#x}; mul.rn.{kind} $0, u, t; }}"
    )


@triton.jit
def numbers(
    words, table, PLACE: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr, DTYPE: tl.constexpr,
    NATIVE: tl.constexpr, HIGH: tl.constexpr = None,
):  # fmt: skip
    """Return the numbers at PLACE of int16 ``words``, of any shape, in DTYPE; plus :func:`offset_of`.

    HIGH: 1 or 0 for the upper or lower half of 8-bit codes, None for whole codes. ``table``: 2**BITS float32.
    """
    HALF: tl.constexpr = DTYPE == tl.float16
    if NATIVE and KIND == INTEGER:
        return _pairs(words, field(BITS, PLACE, HALF, HIGH), HALF)
    elif NATIVE and KIND == E4M3:
        return _pairs(words, float8(PLACE, HALF, 4), HALF)
    elif NATIVE and KIND == E5M2:
        return _pairs(words, float8(PLACE, HALF, 5), HALF)
    code = (words.to(tl.int32) >> (BITS * PLACE)) & ((1 << BITS) - 1)
    if HIGH is not None:
        code = (code >> (4 * HIGH)) & 15
    if KIND == INTEGER:
        return code.to(tl.float32).to(DTYPE)
    elif KIND == TABLE:
        return tl.load(table + code).to(DTYPE)
    elif KIND == E4M3:
        return _widened(code, 4).to(DTYPE)
    else:
        return _widened(code, 5).to(DTYPE)


@triton.jit
def ones(WARPS: tl.constexpr, ROWS: tl.constexpr, DTYPE: tl.constexpr):
    """Return ones (WARPS, ROWS, 32) in DTYPE.

    Joined from halves, as the words are: the compiler then gives both operands of a product the same order.
    """
    half = tl.full((WARPS, ROWS // 2, 32), 1.0, tl.float32).to(DTYPE)
    return tl.join(half, half).permute(0, 3, 1, 2).reshape(WARPS, ROWS, 32)


@triton.jit
def _pairs(words, CODE: tl.constexpr, HALF: tl.constexpr):
    """Run CODE on pairs of int16 ``words``, giving pairs of 16-bit floats."""
    if HALF:
        return tl.inline_asm_elementwise(CODE, "=r,r", args=[words], dtype=tl.float16, is_pure=True, pack=2)
    else:
        return tl.inline_asm_elementwise(CODE, "=r,r", args=[words], dtype=tl.bfloat16, is_pure=True, pack=2)


@triton.jit
def _widened(code, EXPONENT: tl.constexpr):
    """Return the float8 with EXPONENT exponent bits whose bits ``code`` (int32) holds, in float32."""
    moved = ((code & 0x80) << 24) | ((code & 0x7F) << (16 + EXPONENT))
    # The biases differ by 2^n; a float32 holds every product.
    return moved.to(tl.float32, bitcast=True) * (2.0 ** (127 - 2 ** (EXPONENT - 1) + 1))
