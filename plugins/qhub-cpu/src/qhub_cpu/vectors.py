"""Vectors of 16 float32 or int32 lanes for numba, and plain loads and stores by address.

The code that LLVM makes of them suits the processor: one AVX-512 register, two of AVX2, four of NEON. Only the table
lookup names instructions, because no general form of it becomes a permutation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.extending import intrinsic, register_model

__all__ = [
    "LANES",
    "add",
    "broadcast",
    "call_body",
    "call_count",
    "call_fork",
    "codes1",
    "codes2",
    "codes3",
    "codes4",
    "codes5",
    "codes6",
    "codes7",
    "codes8",
    "div",
    "fma",
    "high_half",
    "lanes",
    "load_bf16",
    "load_f16",
    "load_f32",
    "load_i8",
    "load_i32",
    "load_u8",
    "load_vector",
    "load_word",
    "mul",
    "pick",
    "round_bf16",
    "round_f16",
    "signed8",
    "stack_memory",
    "store_bf16",
    "store_f32",
    "store_u8",
    "store_vector",
    "store_vector_bf16",
    "store_vector_f16",
    "store_word",
    "sub",
    "to_float",
    "total",
    "word",
    "zero_vector",
    "zip_high",
    "zip_low",
]  # fmt: skip

LANES = 16

_F16, _F32, _I8, _I16, _I32, _I64 = ir.HalfType(), ir.FloatType(), *(ir.IntType(bits) for bits in (8, 16, 32, 64))
_VF, _VI = ir.VectorType(_F32, LANES), ir.VectorType(_I32, LANES)


class _Vector(types.Type):
    def __init__(self, name: str, llvm: Any) -> None:
        self.llvm = llvm
        super().__init__(name)


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: _Vector) -> None:
        super().__init__(manager, kind, kind.llvm)


_floats, _ints = _Vector("qhub_floats", _VF), _Vector("qhub_ints", _VI)
_scalar = types.float32


def _make(result: Any, arguments: tuple[Any, ...], build: Callable) -> Any:
    """Return an intrinsic of ``arguments`` whose code ``build(context, builder, values)`` makes."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        made = build(context, builder, values)
        return context.get_dummy_value() if result is types.void else made

    count = len(arguments)
    if count == 0:
        return intrinsic(lambda typing: (result(), code))
    if count == 1:
        return intrinsic(lambda typing, a: (result(*arguments), code))
    if count == 2:
        return intrinsic(lambda typing, a, b: (result(*arguments), code))
    if count == 3:
        return intrinsic(lambda typing, a, b, c: (result(*arguments), code))
    return intrinsic(lambda typing, a, b, c, d: (result(*arguments), code))


def _ints_of(values: Any, kind: Any = _I32) -> Any:
    values = list(values)
    return ir.Constant(ir.VectorType(kind, len(values)), [ir.Constant(kind, value) for value in values])


def _shuffle(builder: Any, value: Any, order: Any, second: Any = None) -> Any:
    return builder.shuffle_vector(
        value, second if second is not None else ir.Constant(value.type, ir.Undefined), _ints_of(order)
    )


def _function(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, arguments), name)


# -- memory ------------------------------------------------------------------------------------------------------------


def _loader(kind: Any, widen: Callable, result: Any, align: int) -> Any:
    def build(context: Any, builder: Any, values: Any) -> Any:
        loaded = builder.load(builder.inttoptr(values[0], kind.as_pointer()))
        loaded.align = align
        return widen(builder, loaded)

    return _make(result, (types.intp,), build)


def _storer(kind: Any, narrow: Callable, argument: Any, align: int) -> Any:
    def build(context: Any, builder: Any, values: Any) -> None:
        stored = builder.store(narrow(builder, values[1]), builder.inttoptr(values[0], kind.as_pointer()))
        stored.align = align

    return _make(types.void, (types.intp, argument), build)


def _same(builder: Any, value: Any) -> Any:
    return value


def _widen_bf16(builder: Any, value: Any) -> Any:
    return builder.bitcast(builder.shl(builder.zext(value, _I32), ir.Constant(_I32, 16)), _F32)


def _near_bf16(builder: Any, value: Any, kind: Any, splat: Callable) -> Any:
    """Return bits the upper 16 of which are the bfloat16 nearest to ``value``, which is no NaN; ties to even."""
    bits = builder.bitcast(value, kind)
    odd = builder.and_(builder.lshr(bits, splat(16)), splat(1))
    return builder.add(builder.add(bits, splat(0x7FFF)), odd)


def _narrow_bf16(builder: Any, value: Any) -> Any:
    bits = builder.lshr(_near_bf16(builder, value, _I32, _int), _int(16))
    # An output may be NaN where the input is; rounding its bits could make infinity of it.
    return builder.trunc(builder.select(builder.fcmp_unordered("uno", value, value), _int(0x7FC0), bits), _I16)


def _int(value: int) -> Any:
    return ir.Constant(_I32, value)


def _splat_int(value: int) -> Any:
    return _ints_of([value] * LANES)


def _narrow_vector_bf16(builder: Any, value: Any) -> Any:
    bits = builder.lshr(_near_bf16(builder, value, _VI, _splat_int), _splat_int(16))
    return builder.trunc(bits, ir.VectorType(_I16, LANES))


load_word = _loader(_I64, _same, types.int64, 8)
load_f32 = _loader(_F32, _same, _scalar, 4)
load_bf16 = _loader(_I16, _widen_bf16, _scalar, 2)
load_f16 = _loader(_F16, lambda b, v: b.fpext(v, _F32), _scalar, 2)
load_u8 = _loader(_I8, lambda b, v: b.zext(v, _I64), types.int64, 1)
load_i8 = _loader(_I8, lambda b, v: b.sext(v, _I64), types.int64, 1)
load_i32 = _loader(_I32, lambda b, v: b.sext(v, _I64), types.int64, 4)
load_vector = _loader(_VF, _same, _floats, 4)
store_word = _storer(_I64, _same, types.int64, 8)
store_f32 = _storer(_F32, _same, _scalar, 4)
store_bf16 = _storer(_I16, _narrow_bf16, _scalar, 2)
store_u8 = _storer(_I8, lambda b, v: b.trunc(v, _I8), types.int64, 1)
store_vector = _storer(_VF, _same, _floats, 4)
store_vector_bf16 = _storer(ir.VectorType(_I16, LANES), _narrow_vector_bf16, _floats, 2)
store_vector_f16 = _storer(
    ir.VectorType(_F16, LANES), lambda b, v: b.fptrunc(v, ir.VectorType(_F16, LANES)), _floats, 2
)


def _word(context: Any, builder: Any, values: Any) -> Any:
    loaded = builder.load(builder.gep(builder.inttoptr(values[0], _I64.as_pointer()), [values[1]]))
    loaded.align = 8
    return loaded


# Word ``place`` of an argument block; no device function, which would be compiled once for each place.
word = _make(types.int64, (types.intp, types.int64), _word)


@intrinsic
def stack_memory(typing: Any, size: Any) -> Any:
    """Return the address of ``size`` bytes (a constant) that live until the function returns."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        memory = cgutils.alloca_once(builder, ir.ArrayType(_I64, -(-size.literal_value // 8)))
        return builder.ptrtoint(memory, _I64)

    if isinstance(size, types.IntegerLiteral):
        return types.intp(size), code
    return None


# -- arithmetic --------------------------------------------------------------------------------------------------------


def _splat(builder: Any, value: Any) -> Any:
    one = builder.insert_element(ir.Constant(_VF, ir.Undefined), value, ir.Constant(_I32, 0))
    return _shuffle(builder, one, [0] * LANES)


def _half_and_back(builder: Any, value: Any) -> Any:
    return builder.fpext(builder.fptrunc(value, ir.VectorType(_F16, LANES)), _VF)


def _bf16_and_back(builder: Any, value: Any) -> Any:
    bits = builder.and_(_near_bf16(builder, value, _VI, _splat_int), _splat_int(-65536))
    return builder.bitcast(bits, _VF)


def _total(context: Any, builder: Any, values: Any) -> Any:
    reduce = _function(builder, "llvm.vector.reduce.fadd.v16f32", _F32, _F32, _VF)
    # Any order of the sum will do, but it is the same one in each run: the order is fixed when the code is made.
    return builder.call(reduce, [ir.Constant(_F32, 0.0), values[0]], fastmath=("reassoc",))


def _fma(context: Any, builder: Any, values: Any) -> Any:
    return builder.call(_function(builder, "llvm.fma.v16f32", _VF, _VF, _VF, _VF), values)


_two = (_floats, _floats)
zero_vector = _make(_floats, (), lambda c, b, v: ir.Constant(_VF, [ir.Constant(_F32, 0.0)] * LANES))
broadcast = _make(_floats, (_scalar,), lambda c, b, v: _splat(b, v[0]))
add = _make(_floats, _two, lambda c, b, v: b.fadd(v[0], v[1]))
sub = _make(_floats, _two, lambda c, b, v: b.fsub(v[0], v[1]))
mul = _make(_floats, _two, lambda c, b, v: b.fmul(v[0], v[1]))
div = _make(_floats, _two, lambda c, b, v: b.fdiv(v[0], v[1]))
fma = _make(_floats, (_floats, _floats, _floats), _fma)
total = _make(_scalar, (_floats,), _total)
round_bf16 = _make(_floats, (_floats,), lambda c, b, v: _bf16_and_back(b, v[0]))
round_f16 = _make(_floats, (_floats,), lambda c, b, v: _half_and_back(b, v[0]))
# Even and odd columns of 32, put in order again: columns 0 to 15, columns 16 to 31.
zip_low = _make(_floats, _two, lambda c, b, v: _shuffle(b, v[0], [i // 2 + LANES * (i % 2) for i in range(16)], v[1]))
zip_high = _make(
    _floats, _two, lambda c, b, v: _shuffle(b, v[0], [8 + i // 2 + LANES * (i % 2) for i in range(16)], v[1])
)


@intrinsic
def lanes(typing: Any, modulus: Any) -> Any:
    """Return the vector 0, 1, 2, ... counted modulo ``modulus`` (a constant)."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        count = modulus.literal_value
        return ir.Constant(_VF, [ir.Constant(_F32, float(lane % count)) for lane in range(LANES)])

    if isinstance(modulus, types.IntegerLiteral):
        return _floats(modulus), code
    return None


# -- codes -------------------------------------------------------------------------------------------------------------


def _codes(bits: int) -> Any:
    """Return an intrinsic that reads 16 codes of ``bits`` bits, 2 * bits bytes; what is above them in a lane is noise.

    A lane takes the two bytes that its code lies in and shifts them: the bit string of :mod:`qhub.layouts.packing`.
    """
    size = 2 * bits

    def build(context: Any, builder: Any, values: Any) -> Any:
        if bits == 8:
            raw = builder.load(builder.inttoptr(values[0], ir.VectorType(_I8, 16).as_pointer()))
            raw.align = 1
            return builder.zext(raw, _VI)
        if bits in (1, 2, 4):
            # 1, 2 and 4 bytes: whole words, every lane of which shifts for itself.
            word = _I32 if bits > 1 else _I16
            count = 2 if bits == 4 else 1
            raw = builder.load(builder.inttoptr(values[0], ir.VectorType(word, count).as_pointer()))
            raw.align = 1
            wide = builder.zext(raw, ir.VectorType(_I32, count)) if bits == 1 else raw
            per_word = LANES // count
            spread = _shuffle(builder, wide, [lane // per_word for lane in range(LANES)])
            return builder.lshr(spread, _ints_of([bits * (lane % per_word) for lane in range(LANES)]))
        raw = builder.load(builder.inttoptr(values[0], ir.VectorType(_I8, size).as_pointer()))
        raw.align = 1
        first = [bits * lane // 8 for lane in range(LANES)]
        window = [min(start + offset, size - 1) for start in first for offset in (0, 1)]
        words = builder.bitcast(_shuffle(builder, raw, window), ir.VectorType(_I16, LANES))
        return builder.lshr(builder.zext(words, _VI), _ints_of([bits * lane % 8 for lane in range(LANES)]))

    return _make(_ints, (types.intp,), build)


codes1, codes2, codes3, codes4, codes5, codes6, codes7, codes8 = (_codes(bits) for bits in range(1, 9))


def _signed8(context: Any, builder: Any, values: Any) -> Any:
    raw = builder.load(builder.inttoptr(values[0], ir.VectorType(_I8, LANES).as_pointer()))
    raw.align = 1
    return builder.sext(raw, _VI)


signed8 = _make(_ints, (types.intp,), _signed8)
# Codes of 4 bits read as 16 bytes: the low half is the even columns, this is the odd ones.
high_half = _make(_ints, (_ints,), lambda c, b, v: b.lshr(v[0], _splat_int(4)))


@intrinsic
def to_float(typing: Any, codes: Any, bits: Any) -> Any:
    """Return the codes of ``bits`` bits (a constant; 0: signed, of any width) as floats."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        value = values[0]
        if 0 < bits.literal_value < 8:
            value = builder.and_(value, _splat_int(2**bits.literal_value - 1))
        return builder.sitofp(value, _VF)

    if isinstance(bits, types.IntegerLiteral):
        return _floats(codes, bits), code
    return None


def _pick(context: Any, builder: Any, values: Any) -> Any:
    """Return table[index & 15] for 16 lanes, by whatever instruction the processor has for it."""
    table, index = values
    features = context.codegen().magic_tuple()[2].split(",")
    if "+avx512f" in features:
        return builder.call(_function(builder, "llvm.x86.avx512.permvar.sf.512", _VF, _VF, _VI), [table, index])
    if "+avx2" in features:
        return _pick_avx2(builder, table, index)
    memory = cgutils.alloca_once(builder, _VF)
    builder.store(table, memory)
    first = builder.bitcast(memory, _F32.as_pointer())
    result = ir.Constant(_VF, ir.Undefined)
    for lane in range(LANES):
        place = builder.and_(builder.extract_element(index, ir.Constant(_I32, lane)), ir.Constant(_I32, 15))
        value = builder.load(builder.gep(first, [builder.zext(place, _I64)]))
        result = builder.insert_element(result, value, ir.Constant(_I32, lane))
    return result


def _pick_avx2(builder: Any, table: Any, index: Any) -> Any:
    """Return the lookup as two permutations of 8 entries for each half, of which bit 3 of the index chooses."""
    half_f, half_i = ir.VectorType(_F32, 8), ir.VectorType(_I32, 8)
    permute = _function(builder, "llvm.x86.avx2.permps", half_f, half_f, half_i)
    small, large = _shuffle(builder, table, range(8)), _shuffle(builder, table, range(8, 16))
    halves = []
    for start in (0, 8):
        places = _shuffle(builder, index, range(start, start + 8))
        top = builder.shl(places, _ints_of([28] * 8))
        chosen = builder.icmp_signed("<", top, _ints_of([0] * 8))
        halves.append(
            builder.select(chosen, builder.call(permute, [large, places]), builder.call(permute, [small, places]))
        )
    return _shuffle(builder, halves[0], range(16), halves[1])


pick = _make(_floats, (_floats, _ints), _pick)


# -- calls by address --------------------------------------------------------------------------------------------------


def _call_count(context: Any, builder: Any, values: Any) -> Any:
    function = builder.inttoptr(values[0], ir.FunctionType(_I32, []).as_pointer())
    return builder.sext(builder.call(function, []), _I64)


def _call_fork(context: Any, builder: Any, values: Any) -> None:
    pointer = _I8.as_pointer()
    fork = builder.inttoptr(values[0], ir.FunctionType(ir.VoidType(), [pointer, pointer, _I32, _I32]).as_pointer())
    body, data = (builder.inttoptr(value, pointer) for value in values[1:3])
    builder.call(fork, [body, data, builder.trunc(values[3], _I32), ir.Constant(_I32, 0)])


def _call_body(context: Any, builder: Any, values: Any) -> None:
    body = builder.inttoptr(values[0], ir.FunctionType(ir.VoidType(), [_I64]).as_pointer())
    builder.call(body, [values[1]])


# body(block), by address.
call_body = _make(types.void, (types.intp, types.intp), _call_body)
# omp_get_thread_num and omp_get_num_threads, by address.
call_count = _make(types.int64, (types.intp,), _call_count)
# GOMP_parallel(body, data, threads, 0), by address.
call_fork = _make(types.void, (types.intp, types.intp, types.intp, types.intp), _call_fork)
