"""What is known of a weight once and for all, from its layout and its parts' dtypes: code and argument block."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from qhub.layouts import Affine, Lookup, Nested, Parts
from qhub_cpu import words
from qhub_cpu.variants import BF16, CONSTANT, F16, F32, I8, LOOKUP, OFFSET, U8, VALUE, Numbers, Variant

__all__ = ["FLOAT_KINDS", "Plan", "plan_of"]

FLOAT_KINDS = {torch.float32: F32, torch.bfloat16: BF16, torch.float16: F16}
_KINDS = {**FLOAT_KINDS, torch.uint8: U8, torch.int8: I8}
_ONE = torch.ones(1, dtype=torch.float32)
_MODES = {"constant": CONSTANT, "value": VALUE, "offset": OFFSET}


@dataclass
class Plan:
    """Is the answer for one layout and the dtypes of its tensors.

    ``variant``: what to compile for. ``block``: the argument block (WORDS,) int64, unchanging words filled in;
    ``address``: of its memory. ``tensors``: (place, name, dtype) of the parts whose addresses the entry point takes;
    ``fixed``: what it takes in the other places. ``bodies``: addresses of compiled code by float type (None: of the
    product), filled by :mod:`qhub_cpu.linear`.
    """

    variant: Variant
    block: np.ndarray
    address: int
    tensors: tuple[tuple[int, str, torch.dtype], ...]
    fixed: tuple[int, ...]
    bodies: dict[int | None, int] = field(default_factory=dict)

    def addresses(self, parts: Parts) -> list[int] | None:
        """Return what the entry point takes, for parts of the dtypes of the plan and contiguous; None for others."""
        taken = list(self.fixed)
        for place, name, dtype in self.tensors:
            part = parts[name]
            if part.dtype is not dtype or not part.is_contiguous():
                return None
            taken[place] = part.data_ptr()
        return taken


class _Known(NamedTuple):
    layout: weakref.ref
    plans: dict[tuple[torch.dtype, ...], Plan]


# By identity: hashing a layout takes as long as a small product. An entry goes when its layout does.
_known: dict[int, _Known] = {}


def plan_of(layout: Affine | Lookup, parts: Parts) -> tuple[Plan, list[int], Parts]:
    """Return the plan for ``layout`` and ``parts``, the addresses it asks for, and the tensors that lie there.

    These are ``parts`` themselves, or contiguous copies, which the caller keeps until the product is done.
    """
    key = id(layout)
    known = _known.get(key)
    if known is None or known.layout() is not layout:
        known = _known[key] = _Known(weakref.ref(layout, lambda _: _known.pop(key, None)), {})
    for plan in known.plans.values():
        taken = plan.addresses(parts)
        if taken is not None:
            return plan, taken, parts
    parts = {name: part.contiguous() for name, part in parts.items()}
    dtypes = tuple(part.dtype for part in parts.values())
    if dtypes not in known.plans:
        known.plans[dtypes] = _plan(layout, parts)
    taken = known.plans[dtypes].addresses(parts)
    assert taken is not None
    return known.plans[dtypes], taken, parts


def _plan(layout: Affine | Lookup, parts: Parts) -> Plan:
    grid, k = layout.grid, layout.in_features
    paired = int(layout.bits == 4 and (grid.cols % 32 == 0 or grid.cols >= k))
    scales, scale_names = _numbers("scales", layout.scales_nested, parts)
    zeros = Numbers()
    zero_names: tuple[str | int, ...] = (0, 0, 0, 0)
    mode, rounding, signed, zero_point, unit = LOOKUP, F32, 0, 0.0, 1.0
    if isinstance(layout, Affine):
        mode, signed, zero_point, unit = _MODES[layout.zero], int(layout.signed), float(layout.zero_point), layout.unit
        if layout.zero != "constant":
            zeros, zero_names = _numbers("zeros", layout.zeros_nested, parts)
        if layout.math == "scales" and layout.scales_nested is None:
            rounding = FLOAT_KINDS[parts["scales"].dtype]
    variant = Variant(layout.bits, signed, paired, mode, rounding, zero_point, float(unit), scales, zeros)
    block = np.zeros(words.WORDS, np.int64)
    block[words.N], block[words.K] = layout.out_features, k
    block[words.ROW_BYTES] = parts["qweight"].shape[-1]
    block[words.GROUP_ROWS], block[words.GROUP], block[words.GROUPS] = grid.rows, grid.cols, -(-k // grid.cols)
    block[words.PAIRED] = paired
    if isinstance(layout, Lookup):
        block[words.TABLE_ENTRIES] = 2**layout.bits
    block[words.ROUNDS] = layout.activation.kind == "int8"
    block.view(np.float32)[2 * words.THRESHOLD] = layout.activation.threshold
    block[words.SCALES + 4] = _shift(layout.scales_nested)
    block[words.ZEROS + 4] = _shift(layout.zeros_nested if isinstance(layout, Affine) else None)
    sources = ("qweight", "table" if isinstance(layout, Lookup) else 0, *scale_names, *zero_names)
    tensors = tuple((place, name, parts[name].dtype) for place, name in enumerate(sources) if isinstance(name, str))
    fixed = tuple(source if isinstance(source, int) else 0 for source in sources)
    return Plan(variant, block, block.ctypes.data, tensors, fixed)


def _shift(nested: Nested | None) -> int:
    # 63: every index becomes the one second-level scale of the matrix.
    return 63 if nested is None or not nested.group else nested.group.bit_length() - 1


def _numbers(name: str, nested: Nested | None, parts: Parts) -> tuple[Numbers, tuple[str | int, ...]]:
    dtype = parts[name].dtype
    if nested is None and dtype not in _KINDS:
        # Powers of two in E8M0: looked up like nested ones, under a second level that is 1.
        numbers = Numbers(kind=U8, table=1, super_kind=F32, divide=0, offset=0)
        return numbers, (name, _ONE.data_ptr(), _float8_values(dtype).data_ptr(), 0)
    if nested is None:
        return Numbers(_KINDS[dtype]), (name, 0, 0, 0)
    # A float8 code is one of 256 values: it is looked up like any other code.
    float8 = dtype not in _KINDS
    numbers = Numbers(
        kind=U8 if float8 else _KINDS[dtype],
        table=int(nested.table or float8),
        super_kind=_KINDS[parts[f"{name}_super"].dtype],
        divide=int(nested.divide),
        offset=int(nested.offset),
    )
    table: str | int = f"{name}_table" if nested.table else 0
    if float8:
        table = _float8_values(dtype).data_ptr()
    return numbers, (name, f"{name}_super", table, f"{name}_offset" if nested.offset else 0)


@cache
def _float8_values(dtype: torch.dtype) -> Tensor:
    """Return what the 256 codes of a float8 dtype stand for, in float32."""
    return torch.arange(256, dtype=torch.uint8).view(dtype).float()
