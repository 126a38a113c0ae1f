"""Memory by address for numba: numbers, vectors, words of an argument block, and functions to call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from qhub_cpu.llvm import (
    F16,
    F32,
    FLOATS,
    I8,
    I16,
    I32,
    I64,
    INTS,
    LANES,
    floats,
    make,
    near_bf16,
    scalar,
    splat_int,
)

__all__ = [
    "call_body",
    "call_count",
    "call_fork",
    "load_bf16",
    "load_f16",
    "load_f32",
    "load_i8",
    "load_i32",
    "load_u8",
    "load_vector",
    "load_word",
    "stack_memory",
    "store_bf16",
    "store_f32",
    "store_u8",
    "store_vector",
    "store_vector_bf16",
    "store_vector_f16",
    "store_word",
    "word",
]


def _loader(kind: Any, widen: Callable, result: Any, align: int) -> Any:
    def build(context: Any, builder: Any, values: Any) -> Any:
        loaded = builder.load(builder.inttoptr(values[0], kind.as_pointer()))
        loaded.align = align
        return widen(builder, loaded)

    return make(result, (types.intp,), build)


def _storer(kind: Any, narrow: Callable, argument: Any, align: int) -> Any:
    def build(context: Any, builder: Any, values: Any) -> None:
        stored = builder.store(narrow(builder, values[1]), builder.inttoptr(values[0], kind.as_pointer()))
        stored.align = align

    return make(types.void, (types.intp, argument), build)


def _same(builder: Any, value: Any) -> Any:
    return value


def _widen_bf16(builder: Any, value: Any) -> Any:
    return builder.bitcast(builder.shl(builder.zext(value, I32), ir.Constant(I32, 16)), F32)


def _narrow_bf16(builder: Any, value: Any) -> Any:
    # A NaN of bfloat16 inputs, or of infinities, has a lower half of zeros: rounding leaves it a NaN.
    return builder.trunc(builder.lshr(near_bf16(builder, value, I32, _int), _int(16)), I16)


def _int(value: int) -> Any:
    return ir.Constant(I32, value)


def _narrow_vector_bf16(builder: Any, value: Any) -> Any:
    bits = builder.lshr(near_bf16(builder, value, INTS, splat_int), splat_int(16))
    return builder.trunc(bits, ir.VectorType(I16, LANES))


load_word = _loader(I64, _same, types.int64, 8)
load_f32 = _loader(F32, _same, scalar, 4)
load_bf16 = _loader(I16, _widen_bf16, scalar, 2)
load_f16 = _loader(F16, lambda b, v: b.fpext(v, F32), scalar, 2)
load_u8 = _loader(I8, lambda b, v: b.zext(v, I64), types.int64, 1)
load_i8 = _loader(I8, lambda b, v: b.sext(v, I64), types.int64, 1)
load_i32 = _loader(I32, lambda b, v: b.sext(v, I64), types.int64, 4)
load_vector = _loader(FLOATS, _same, floats, 4)
store_word = _storer(I64, _same, types.int64, 8)
store_f32 = _storer(F32, _same, scalar, 4)
store_bf16 = _storer(I16, _narrow_bf16, scalar, 2)
store_u8 = _storer(I8, lambda b, v: b.trunc(v, I8), types.int64, 1)
store_vector = _storer(FLOATS, _same, floats, 4)
store_vector_bf16 = _storer(ir.VectorType(I16, LANES), _narrow_vector_bf16, floats, 2)
store_vector_f16 = _storer(ir.VectorType(F16, LANES), lambda b, v: b.fptrunc(v, ir.VectorType(F16, LANES)), floats, 2)


def _word(context: Any, builder: Any, values: Any) -> Any:
    loaded = builder.load(builder.gep(builder.inttoptr(values[0], I64.as_pointer()), [values[1]]))
    loaded.align = 8
    return loaded


# Word ``place`` of an argument block; no device function, which would be compiled once for each place.
word = make(types.int64, (types.intp, types.int64), _word)


def _stack_memory(typing: Any, size: Any) -> Any:
    """Return the address of ``size`` bytes (a constant) that live until the function returns."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        memory = cgutils.alloca_once(builder, ir.ArrayType(I64, -(-size.literal_value // 8)))
        return builder.ptrtoint(memory, I64)

    if isinstance(size, types.IntegerLiteral):
        return types.intp(size), code
    return None


stack_memory: Any = intrinsic(_stack_memory)


def _call_count(context: Any, builder: Any, values: Any) -> Any:
    function = builder.inttoptr(values[0], ir.FunctionType(I32, []).as_pointer())
    return builder.sext(builder.call(function, []), I64)


def _call_fork(context: Any, builder: Any, values: Any) -> None:
    pointer = I8.as_pointer()
    fork = builder.inttoptr(values[0], ir.FunctionType(ir.VoidType(), [pointer, pointer, I32, I32]).as_pointer())
    body, data = (builder.inttoptr(value, pointer) for value in values[1:3])
    builder.call(fork, [body, data, builder.trunc(values[3], I32), ir.Constant(I32, 0)])


def _call_body(context: Any, builder: Any, values: Any) -> None:
    body = builder.inttoptr(values[0], ir.FunctionType(ir.VoidType(), [I64]).as_pointer())
    builder.call(body, [values[1]])


# body(block), by address.
call_body = make(types.void, (types.intp, types.intp), _call_body)
# omp_get_thread_num and omp_get_num_threads, by address.
call_count = make(types.int64, (types.intp,), _call_count)
# GOMP_parallel(body, data, threads, 0), by address.
call_fork = make(types.void, (types.intp, types.intp, types.intp, types.intp), _call_fork)
