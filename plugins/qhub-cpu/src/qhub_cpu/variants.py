"""What code is compiled for: all of a layout and its tensors' dtypes that would else be asked per group of weights."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["BF16", "CONSTANT", "F16", "F32", "I8", "LOOKUP", "NONE", "OFFSET", "U8", "VALUE", "Numbers", "Variant"]

# How a number is stored.
NONE, F32, BF16, F16, U8, I8 = range(-1, 5)

# The formula: table * scale; scale * (q - constant); scale * (q - zero); scale * q + zero.
LOOKUP, CONSTANT, VALUE, OFFSET = range(4)


class Numbers(NamedTuple):
    """Says how the scales or the zeros are stored; see :class:`qhub.layouts.Nested`.

    ``kind``: of the numbers or codes; NONE: there are none. ``table``: codes index a table. ``super_kind``: of the
    second-level scales; NONE without. ``divide``: these divide. ``offset``: one float is added.
    """

    kind: int = NONE
    table: int = 0
    super_kind: int = NONE
    divide: int = 0
    offset: int = 0


class Variant(NamedTuple):
    """Is a set of compile-time constants.

    ``bits``, ``signed``: of the codes. ``paired``: 4-bit codes are read as 16 bytes, which are 16 even and 16 odd
    columns; the input is laid out likewise. ``mode``: the formula. ``rounding``: the float type it is rounded to after
    each step, F32 for none. ``zero_point``, ``unit``: as in :class:`qhub.layouts.Affine`.
    """

    bits: int
    signed: int
    paired: int
    mode: int
    rounding: int
    zero_point: float
    unit: float
    scales: Numbers
    zeros: Numbers
