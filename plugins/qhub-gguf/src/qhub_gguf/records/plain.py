"""Tells what scalar records hold in the words of the core's layouts, and the other way where that is exact."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qhub.layouts import Activation, Affine, Grid, Layout, Lookup, Parts
from qhub.layouts.packing import pack, unpack

if TYPE_CHECKING:
    from qhub_gguf.records.scalar import ScalarRecord

__all__ = ["from_plain", "to_plain"]

# Tables of other formats are such fractions of whole numbers: E2M1 counts in halves.
_FACTORS = (1, 2, 4, 8)


def plain_layout(record: ScalarRecord, n: int, k: int) -> Affine | Lookup:
    """Return the core's layout whose tensors are the fields of ``record``."""
    grid, nested = Grid.along_k(record.group), record.nested
    if record.table:
        return Lookup(out_features=n, in_features=k, bits=record.bits, grid=grid, scales_nested=nested.get("scales"))
    return Affine(
        out_features=n,
        in_features=k,
        bits=record.bits,
        grid=grid,
        zero="offset" if len(record.halves) > 1 else "constant",
        zero_point=0.0 if record.bits == 8 else float(-record.low),
        signed=record.bits == 8,
        scales_nested=nested.get("scales"),
        zeros_nested=nested.get("zeros"),
    )


def to_plain(record: ScalarRecord, n: int, k: int, blocks: Tensor) -> tuple[Layout, dict[str, Tensor]]:
    """Return layout and parts with the weights of ``blocks`` (..., N, K/count*size)."""
    data = blocks.unflatten(-1, (k // record.count, record.size))
    layout = plain_layout(record, n, k)
    specs, batch = layout.core_specs(), blocks.shape[:-2]
    parts = {name: part.reshape(*batch, *specs[name].shape) for name, part in record.plain_scales(data).items()}
    codes = record.codes(data).flatten(-2)
    if isinstance(layout, Affine):
        parts["qweight"] = codes.view(torch.int8) if layout.signed else layout.pack_codes(codes)
    else:
        table = torch.tensor(record.table, dtype=torch.float32, device=blocks.device)
        parts |= {"qweight": pack(codes, layout.bits), "table": table / record.table_unit}
    return layout, parts


def from_plain(record: ScalarRecord, layout: Layout, parts: Parts) -> Tensor | None:
    """Return blocks (..., N, K/count*size) whose weights are exactly the stored matrix of ``layout``, or None."""
    n, k = layout.out_features, layout.in_features
    if k % record.count or not isinstance(layout, Affine | Lookup):
        return None
    if isinstance(layout, Affine):
        # A formula that is defined in 16 bits means the same numbers.
        layout = dataclasses.replace(layout, math="float32")
    own = plain_layout(record, n, k)
    same = dataclasses.replace(layout, transforms=(), activation=Activation()) == own
    for values, steps, offsets in _readings(layout, parts, record.group):
        if not _holds(record, values) or (offsets is not None and len(record.halves) < 2):
            continue
        shape = (*values.shape[:-1], k // record.count, record.size)
        data = torch.zeros(shape, dtype=torch.uint8, device=values.device)
        if same:
            record.put_plain_scales(data, _by_record(parts, shape[:-1]))
        elif not record.free_steps:
            return None
        else:
            inner = (k // record.count, record.count // record.group)
            record.put_steps(
                data, steps.unflatten(-1, inner), None if offsets is None else offsets.unflatten(-1, inner)
            )
        record.put(data, values.unflatten(-1, (k // record.count, record.count)))
        # Whatever the formula of the layout rounds, only equal weights pass.
        if torch.equal(record.decode(data).flatten(-2), layout.decode(parts)):
            return data.flatten(-2)
    return None


def _by_record(parts: Parts, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Return the scale tensors of ``parts`` with the entries of each record on an axis of their own."""
    scales = {name: part for name, part in parts.items() if name.startswith(("scales", "zeros"))}
    # A second-level scale of the whole matrix is none of a record's.
    return {n: part.reshape(*shape, -1) for n, part in scales.items() if part.numel() >= math.prod(shape)}


def _holds(record: ScalarRecord, values: Tensor) -> bool:
    low, high = (int(end) for end in torch.aminmax(values))
    if low < record.low or high > record.high:
        return False
    return not record.table or bool((record.rounded(values.float()) == values).all())


def _readings(layout: Affine | Lookup, parts: Parts, group: int) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Yield whole values (..., N, K) int16, steps and offsets (..., N, K/group) that may make up the stored matrix."""
    if isinstance(layout, Lookup):
        steps = _each_group(layout, layout.scales(parts), group)
        table = parts["table"]
        for factor in _FACTORS:
            whole = table * factor
            if steps is not None and bool(((whole == whole.round()) & (whole.abs() <= 128)).all()):
                codes = unpack(parts["qweight"], layout.bits, layout.in_features)
                yield (
                    whole.to(torch.int16).index_select(0, codes.flatten().int()).reshape(codes.shape),
                    steps / factor,
                    None,
                )
                return
        return
    scales, zeros = layout.scales_and_zeros(parts)
    steps = _each_group(layout, scales.float() * layout.unit, group)
    if steps is None:
        return
    codes = layout.codes(parts).to(torch.int16)
    if zeros is None:
        zero = torch.full_like(steps, layout.zero_point)
    else:
        given = _each_group(layout, zeros.float(), group)
        assert given is not None
        zero = given
    if layout.zero == "offset":
        yield codes, steps, zero * layout.unit
        return
    yield codes, steps, -zero * steps
    if bool((zero == zero.round()).all()):
        whole = codes - zero.to(torch.int16).repeat_interleave(group, dim=-1)
        yield whole, steps, None
        yield -whole, -steps, None


def _each_group(layout: Affine | Lookup, scales: Tensor, group: int) -> Tensor | None:
    """Return the scale (..., N, K/group) of each run of ``group`` weights; None where a run has several."""
    grid, n, k = layout.grid, layout.out_features, layout.in_features
    if grid.kind == "block" and (grid.cols % group == 0 or grid.cols >= k):
        spread = scales.repeat_interleave(-(-grid.cols // group), dim=-1)[..., : k // group]
        return spread.repeat_interleave(grid.rows, dim=-2)[..., :n, :] if grid.rows > 1 else spread
    if grid.kind == "flat" and grid.cols % group == 0:
        runs = scales.repeat_interleave(grid.cols // group, dim=-1)[..., : n * k // group]
        return runs.reshape(*scales.shape[:-1], n, k // group)
    return None
