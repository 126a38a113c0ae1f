"""Arithmetic of 16 float32 lanes for numba."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from qhub_cpu.llvm import (
    F16,
    F32,
    FLOATS,
    I32,
    INTS,
    LANES,
    floats,
    function,
    make,
    near_bf16,
    scalar,
    shuffle,
    splat_int,
)

__all__ = [
    "add",
    "broadcast",
    "fma",
    "lanes",
    "mul",
    "round_bf16",
    "round_f16",
    "sub",
    "total",
    "zero_vector",
    "zip_high",
    "zip_low",
]


def _splat(builder: Any, value: Any) -> Any:
    one = builder.insert_element(ir.Constant(FLOATS, ir.Undefined), value, ir.Constant(I32, 0))
    return shuffle(builder, one, [0] * LANES)


def _half_and_back(builder: Any, value: Any) -> Any:
    return builder.fpext(builder.fptrunc(value, ir.VectorType(F16, LANES)), FLOATS)


def _bf16_and_back(builder: Any, value: Any) -> Any:
    bits = builder.and_(near_bf16(builder, value, INTS, splat_int), splat_int(-65536))
    return builder.bitcast(bits, FLOATS)


def _total(context: Any, builder: Any, values: Any) -> Any:
    reduce = function(builder, "llvm.vector.reduce.fadd.v16f32", F32, F32, FLOATS)
    # Any order of the sum will do, but it is the same one in each run: the order is fixed when the code is made.
    return builder.call(reduce, [ir.Constant(F32, 0.0), values[0]], fastmath=("reassoc",))


def _fma(context: Any, builder: Any, values: Any) -> Any:
    return builder.call(function(builder, "llvm.fma.v16f32", FLOATS, FLOATS, FLOATS, FLOATS), values)


_two = (floats, floats)
zero_vector = make(floats, (), lambda c, b, v: ir.Constant(FLOATS, [ir.Constant(F32, 0.0)] * LANES))
broadcast = make(floats, (scalar,), lambda c, b, v: _splat(b, v[0]))
add = make(floats, _two, lambda c, b, v: b.fadd(v[0], v[1]))
sub = make(floats, _two, lambda c, b, v: b.fsub(v[0], v[1]))
mul = make(floats, _two, lambda c, b, v: b.fmul(v[0], v[1]))
fma = make(floats, (floats, floats, floats), _fma)
total = make(scalar, (floats,), _total)
round_bf16 = make(floats, (floats,), lambda c, b, v: _bf16_and_back(b, v[0]))
round_f16 = make(floats, (floats,), lambda c, b, v: _half_and_back(b, v[0]))
# Even and odd columns of 32, put in order again: columns 0 to 15, columns 16 to 31.
zip_low = make(floats, _two, lambda c, b, v: shuffle(b, v[0], [i // 2 + LANES * (i % 2) for i in range(16)], v[1]))
zip_high = make(floats, _two, lambda c, b, v: shuffle(b, v[0], [8 + i // 2 + LANES * (i % 2) for i in range(16)], v[1]))


def _lanes(typing: Any, modulus: Any) -> Any:
    """Return the vector 0, 1, 2, ... counted modulo ``modulus`` (a constant)."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        count = modulus.literal_value
        return ir.Constant(FLOATS, [ir.Constant(F32, float(lane % count)) for lane in range(LANES)])

    if isinstance(modulus, types.IntegerLiteral):
        return floats(modulus), code
    return None


lanes: Any = intrinsic(_lanes)
