"""LLVM code for numba: the types of vectors with 16 lanes, and how an operation becomes a function numba compiles.

The code that LLVM makes of such vectors suits the processor: one AVX-512 register, two of AVX2, four of NEON.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.extending import intrinsic, register_model

__all__ = [
    "F16",
    "F32",
    "FLOATS",
    "I8",
    "I16",
    "I32",
    "I64",
    "INTS",
    "LANES",
    "constants",
    "floats",
    "function",
    "ints",
    "make",
    "near_bf16",
    "scalar",
    "shuffle",
    "splat_int",
]

LANES = 16

F16, F32, I8, I16, I32, I64 = ir.HalfType(), ir.FloatType(), *(ir.IntType(bits) for bits in (8, 16, 32, 64))
FLOATS, INTS = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)


class _Vector(types.Type):
    def __init__(self, name: str, llvm: Any) -> None:
        self.llvm = llvm
        super().__init__(name)


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: _Vector) -> None:
        super().__init__(manager, kind, kind.llvm)


# What numba calls a vector of 16 float32 or int32, and a float32.
floats, ints = _Vector("qhub_floats", FLOATS), _Vector("qhub_ints", INTS)
scalar = types.float32


def make(result: Any, arguments: tuple[Any, ...], build: Callable) -> Any:
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


def constants(values: Iterable[int]) -> Any:
    """Return a constant vector of int32."""
    lanes = [ir.Constant(I32, value) for value in values]
    return ir.Constant(ir.VectorType(I32, len(lanes)), lanes)


def shuffle(builder: Any, value: Any, order: Iterable[int], second: Any = None) -> Any:
    """Return lanes of the vector ``value`` in ``order``; places beyond its length are those of ``second``."""
    other = ir.Constant(value.type, ir.Undefined) if second is None else second
    return builder.shuffle_vector(value, other, constants(order))


def function(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    """Return LLVM's own function ``name``, declared in the module at hand."""
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, arguments), name)


def splat_int(value: int) -> Any:
    """Return the constant vector of one int32 in all lanes."""
    return constants([value] * LANES)


def near_bf16(builder: Any, value: Any, kind: Any, splat: Callable) -> Any:
    """Return bits the upper 16 of which are the bfloat16 nearest to ``value``; ties to even."""
    bits = builder.bitcast(value, kind)
    odd = builder.and_(builder.lshr(bits, splat(16)), splat(1))
    return builder.add(builder.add(bits, splat(0x7FFF)), odd)
