"""What threads do to turn codes into weights: read scales, make the values of a group, pick them by code.

Formulas: :meth:`qhub.layouts.Affine.decode`, :meth:`qhub.layouts.Lookup.decode` and
:meth:`qhub.layouts.nested.Nested.values`, with their roundings. The fields of a :class:`~qhub_cpu.variants.Variant`
``v`` are constants by the time LLVM sees them.
"""

from __future__ import annotations

from numba import float32

from qhub_cpu.codes import codes1, codes2, codes3, codes4, codes5, codes6, codes7, codes8, pick, signed8, to_float
from qhub_cpu.compiled import device
from qhub_cpu.memory import load_bf16, load_f16, load_f32, load_i8, load_u8, load_vector, store_f32, store_u8, word
from qhub_cpu.variants import BF16, CONSTANT, F16, F32, I8, LOOKUP, NONE, VALUE
from qhub_cpu.vectors import add, broadcast, lanes, mul, round_bf16, round_f16, sub

__all__ = ["group_values", "number", "quantity", "table_vector", "tail", "weights16"]


@device
def number(address, kind, index):
    """Return entry ``index`` of an array of numbers stored as ``kind``."""
    if kind == F32:
        return load_f32(address + 4 * index)
    if kind == BF16:
        return load_bf16(address + 2 * index)
    if kind == F16:
        return load_f16(address + 2 * index)
    return float32(load_i8(address + index)) if kind == I8 else float32(load_u8(address + index))


@device
def quantity(block, place, index, numbers):
    """Return scale or zero ``index``, 0 if there are none; ``place``: the first of its words."""
    if numbers.kind == NONE:
        return float32(0.0)
    address = word(block, place)
    if numbers.table:
        value = load_f32(word(block, place + 2) + 4 * load_u8(address + index))
    else:
        value = number(address, numbers.kind, index)
    if numbers.super_kind != NONE:
        second = number(word(block, place + 1), numbers.super_kind, index >> word(block, place + 4))
        value = value / second if numbers.divide else value * second
    if numbers.offset:
        value = value + load_f32(word(block, place + 3))
    return value


@device
def rounded(value, v):
    """Return the vector rounded to the float type of the formula."""
    if v.rounding == BF16:
        return round_bf16(value)
    return round_f16(value) if v.rounding == F16 else value


@device
def near_zero(zero, v):
    """Return the zero in the float type of the formula."""
    value = broadcast(zero)
    return rounded(value, v) if v.zeros.kind != v.rounding else value


@device
def weighed(q, scale, zero, v):
    """Return the weights that the codes ``q`` (as floats) stand for."""
    s = broadcast(scale)
    if v.mode == CONSTANT:
        w = rounded(mul(rounded(sub(q, broadcast(float32(v.zero_point))), v), s), v)
    elif v.mode == VALUE:
        w = rounded(mul(rounded(sub(q, near_zero(zero, v)), v), s), v)
    else:
        code = sub(q, broadcast(float32(v.zero_point))) if v.zero_point != 0.0 else q
        w = rounded(add(rounded(mul(code, s), v), near_zero(zero, v)), v)
    return rounded(mul(w, broadcast(float32(v.unit))), v) if v.unit != 1.0 else w


@device
def group_values(table, scale, zero, v):
    """Return what each code stands for in one group, for codes of up to 4 bits; lanes beyond the last code repeat."""
    if v.bits > 4:
        return table
    if v.mode == LOOKUP:
        return mul(table, broadcast(scale))
    if v.bits == 1:
        return weighed(lanes(2), scale, zero, v)
    if v.bits == 2:
        return weighed(lanes(4), scale, zero, v)
    if v.bits == 3:
        return weighed(lanes(8), scale, zero, v)
    return weighed(lanes(16), scale, zero, v)


@device
def weights16(address, values, scale, zero, v):
    """Return 16 weights in the order of their columns; ``values``: of :func:`group_values`."""
    if v.bits == 1:
        return pick(values, codes1(address))
    if v.bits == 2:
        return pick(values, codes2(address))
    if v.bits == 3:
        return pick(values, codes3(address))
    if v.bits == 4:
        return pick(values, codes4(address))
    if v.signed:
        return weighed(to_float(signed8(address), 0), scale, zero, v)
    if v.bits == 5:
        return weighed(to_float(codes5(address), 5), scale, zero, v)
    if v.bits == 6:
        return weighed(to_float(codes6(address), 6), scale, zero, v)
    if v.bits == 7:
        return weighed(to_float(codes7(address), 7), scale, zero, v)
    return weighed(to_float(codes8(address), 8), scale, zero, v)


@device
def tail(address, count, memory):
    """Copy ``count`` bytes to the 16 at ``memory`` and return it: a whole vector may then be read from there."""
    for index in range(16):
        store_u8(memory + index, load_u8(address + index) if index < count else 0)
    return memory


@device
def table_vector(address, entries, memory):
    """Return the value table as a vector; ``entries``: 2 to 16, a power of two; ``memory``: 64 bytes to work in."""
    for index in range(16):
        store_f32(memory + 4 * index, load_f32(address + 4 * (index & (entries - 1))))
    return load_vector(memory)
