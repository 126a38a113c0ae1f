"""Codes for numba: reading 16 of them, turning them into floats, looking them up in a table of 16 values.

Only the lookup names instructions, because no general form of it becomes a permutation.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from qhub_cpu.llvm import (
    F32,
    FLOATS,
    I8,
    I16,
    I32,
    I64,
    INTS,
    LANES,
    constants,
    floats,
    function,
    ints,
    make,
    shuffle,
    splat_int,
)

__all__ = [
    "codes1",
    "codes2",
    "codes3",
    "codes4",
    "codes5",
    "codes6",
    "codes7",
    "codes8",
    "high_half",
    "pick",
    "signed8",
    "to_float",
]


def _codes(bits: int) -> Any:
    """Return an intrinsic that reads 16 codes of ``bits`` bits, 2 * bits bytes; what is above them in a lane is noise.

    A lane takes the two bytes that its code lies in and shifts them: the bit string of :mod:`qhub.layouts.packing`.
    """
    size = 2 * bits

    def build(context: Any, builder: Any, values: Any) -> Any:
        if bits == 8:
            raw = builder.load(builder.inttoptr(values[0], ir.VectorType(I8, 16).as_pointer()))
            raw.align = 1
            return builder.zext(raw, INTS)
        if bits in (1, 2, 4):
            # 1, 2 and 4 bytes: whole words, every lane of which shifts for itself.
            word = I32 if bits > 1 else I16
            count = 2 if bits == 4 else 1
            raw = builder.load(builder.inttoptr(values[0], ir.VectorType(word, count).as_pointer()))
            raw.align = 1
            wide = builder.zext(raw, ir.VectorType(I32, count)) if bits == 1 else raw
            per_word = LANES // count
            spread = shuffle(builder, wide, [lane // per_word for lane in range(LANES)])
            return builder.lshr(spread, constants([bits * (lane % per_word) for lane in range(LANES)]))
        raw = builder.load(builder.inttoptr(values[0], ir.VectorType(I8, size).as_pointer()))
        raw.align = 1
        first = [bits * lane // 8 for lane in range(LANES)]
        window = [min(start + offset, size - 1) for start in first for offset in (0, 1)]
        words = builder.bitcast(shuffle(builder, raw, window), ir.VectorType(I16, LANES))
        return builder.lshr(builder.zext(words, INTS), constants([bits * lane % 8 for lane in range(LANES)]))

    return make(ints, (types.intp,), build)


codes1, codes2, codes3, codes4, codes5, codes6, codes7, codes8 = (_codes(bits) for bits in range(1, 9))


def _signed8(context: Any, builder: Any, values: Any) -> Any:
    raw = builder.load(builder.inttoptr(values[0], ir.VectorType(I8, LANES).as_pointer()))
    raw.align = 1
    return builder.sext(raw, INTS)


signed8 = make(ints, (types.intp,), _signed8)
# Codes of 4 bits read as 16 bytes: the low half is the even columns, this is the odd ones.
high_half = make(ints, (ints,), lambda c, b, v: b.lshr(v[0], splat_int(4)))


def _to_float(typing: Any, codes: Any, bits: Any) -> Any:
    """Return the codes of ``bits`` bits (a constant; 0: signed, of any width) as floats."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        value = values[0]
        if 0 < bits.literal_value < 8:
            value = builder.and_(value, splat_int(2**bits.literal_value - 1))
        return builder.sitofp(value, FLOATS)

    if isinstance(bits, types.IntegerLiteral):
        return floats(codes, bits), code
    return None


to_float: Any = intrinsic(_to_float)


def _pick(context: Any, builder: Any, values: Any) -> Any:
    """Return table[index & 15] for 16 lanes, by whatever instruction the processor has for it."""
    table, index = values
    features = context.codegen().magic_tuple()[2].split(",")
    if "+avx512f" in features:
        return builder.call(function(builder, "llvm.x86.avx512.permvar.sf.512", FLOATS, FLOATS, INTS), [table, index])
    if "+avx2" in features:
        return _pick_avx2(builder, table, index)
    memory = cgutils.alloca_once(builder, FLOATS)
    builder.store(table, memory)
    first = builder.bitcast(memory, F32.as_pointer())
    result = ir.Constant(FLOATS, ir.Undefined)
    for lane in range(LANES):
        place = builder.and_(builder.extract_element(index, ir.Constant(I32, lane)), ir.Constant(I32, 15))
        value = builder.load(builder.gep(first, [builder.zext(place, I64)]))
        result = builder.insert_element(result, value, ir.Constant(I32, lane))
    return result


def _pick_avx2(builder: Any, table: Any, index: Any) -> Any:
    """Return the lookup as two permutations of 8 entries for each half, of which bit 3 of the index chooses."""
    half_f, half_i = ir.VectorType(F32, 8), ir.VectorType(I32, 8)
    permute = function(builder, "llvm.x86.avx2.permps", half_f, half_f, half_i)
    small, large = shuffle(builder, table, range(8)), shuffle(builder, table, range(8, 16))
    halves = []
    for start in (0, 8):
        places = shuffle(builder, index, range(start, start + 8))
        top = builder.shl(places, constants([28] * 8))
        chosen = builder.icmp_signed("<", top, constants([0] * 8))
        halves.append(
            builder.select(chosen, builder.call(permute, [large, places]), builder.call(permute, [small, places]))
        )
    return shuffle(builder, halves[0], range(16), halves[1])


pick = make(floats, (floats, ints), _pick)
