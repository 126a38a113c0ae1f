"""Says the numbers of one layout in another's words, without changing one of them: ``qhub convert``, per matrix.

Scales are spread to single weights and gathered again on the other grid; codes move by whole numbers where zeros do.
What cannot be said exactly is refused with the reason. Nothing is fitted here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qhub.errors import LossError
from qhub.layouts.affine import Affine
from qhub.layouts.base import Layout, Parts
from qhub.layouts.blocks import Blocks
from qhub.layouts.codebook import Codebook
from qhub.layouts.float8 import Float8
from qhub.layouts.grid import Grid
from qhub.layouts.lookup import Lookup
from qhub.layouts.nested import Nested, scale_values
from qhub.layouts.packing import pack
from qhub.layouts.stacked import Stacked

__all__ = ["exact_weight", "translate"]

# The first that holds the numbers is taken: the smaller ones before float32.
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def exact_weight(layout: Layout, parts: Parts) -> Tensor:
    """Return the dense weight (N, K) that the numbers stand for, in float32.

    A layout whose method defines its formula in 16 bits is computed in 32 here: two checkpoints with the same codes,
    scales and zeros are equal by this, whatever their libraries round to.
    """
    if isinstance(layout, Affine) and layout.math != "float32":
        layout = dataclasses.replace(layout, math="float32")
    return layout.dequantize(parts)


def translate(layout: Layout, parts: Parts, target: Layout) -> dict[str, Tensor]:
    """Return the parts of ``target`` that stand for the very weights of ``parts``, one unbatched matrix.

    Raises :class:`LossError` with the reason where ``target`` has no such parts. Every result was compared:
    :func:`exact_weight` of both is equal.
    """
    layout, parts = layout.plain(parts)
    if isinstance(layout, Stacked):
        return _bands(layout, parts, target)
    if isinstance(target, Blocks):
        core = target.of_plain(layout, parts)
        if core is None:
            raise LossError(f"{target.record.name} blocks cannot hold these numbers ({_words(layout)})")
    else:
        core = _core(layout, parts, target)
    made = core | _surroundings(layout, parts, target)
    target.validate(made)
    wanted, found = exact_weight(layout, parts), exact_weight(target, made)
    if not torch.equal(wanted, found):
        worst = float((wanted - found).abs().max() / wanted.abs().max().clamp_min(1e-30))
        raise LossError(f"weights would differ by up to {worst:.1e} of the largest")
    return made


def _bands(layout: Stacked, parts: Parts, target: Layout) -> dict[str, Tensor]:
    rows = [(translate(band, own, target.with_rows(band.out_features)), band) for band, own in layout.each(parts)]
    joined = target.with_rows(rows[0][1].out_features).concat_rows(
        [made for made, _ in rows], [target.with_rows(band.out_features) for _, band in rows]
    )
    if joined is None or joined[0] != target:
        raise LossError("matrices with settings of their own are fused here, which the target holds as one")
    return joined[1]


def _surroundings(layout: Layout, parts: Parts, target: Layout) -> dict[str, Tensor]:
    """Return the parts of transforms and of the activation scheme."""
    if layout.transforms != target.transforms:
        steps = ", ".join(f"{t.kind} ({t.side})" for t in layout.transforms) or "none"
        wanted = ", ".join(f"{t.kind} ({t.side})" for t in target.transforms) or "none"
        raise LossError(f"what surrounds the matrix differs: transforms {steps}, the target has {wanted}")
    made = {}
    specs = target.part_specs()
    for transform in target.transforms:
        for name in transform.part_specs(target):
            made[name] = _held(parts[name], specs[name].dtypes, name)
    for name in target.activation.part_specs():
        if name not in parts:
            raise LossError(f"the target rounds inputs with a stored scale ({name}), which the source does not have")
        made[name] = parts[name].float()
    return made


def _core(layout: Layout, parts: Parts, target: Layout) -> dict[str, Tensor]:
    """Return the parts of the stored matrix."""
    if isinstance(layout, Affine) and isinstance(target, Affine):
        return _affine(layout, parts, target)
    if isinstance(layout, Float8) and isinstance(target, Float8) and layout.format == target.format:
        return {"qweight": parts["qweight"], **_scales(layout, parts, target)}
    if isinstance(target, Lookup) and isinstance(layout, Lookup | Affine):
        return _lookup(layout, parts, target)
    if isinstance(layout, Codebook) and _same_core(layout, target):
        return {name: parts[name] for name in layout.core_specs()}
    raise LossError(f"{_words(layout)} cannot be said as {_words(target)}")


def _affine(layout: Affine, parts: Parts, target: Affine) -> dict[str, Tensor]:
    size = layout.out_features, layout.in_features
    codes = layout.codes(parts).float()
    if (
        layout.grid == target.grid
        and layout.zero == target.zero
        and (layout.signed, layout.unit)
        == (
            target.signed,
            target.unit,
        )
    ):
        same = _unchanged(layout, parts, target)
        if same is not None:
            return same
    scales, zeros = layout.scales_and_zeros(parts)
    scale = layout.grid.expand(scales.float() * layout.unit, *size)
    if layout.zero == "offset":
        offset = layout.grid.expand(zeros.float() * layout.unit, *size)  # type: ignore[union-attr]
        if target.zero != "offset":
            raise LossError("weights are code times scale plus an offset, the target wants whole zeros")
        return _packed(target, codes - layout.zero_point + target.zero_point, scale, offset)
    zero: Tensor | float = layout.zero_point if zeros is None else layout.grid.expand(zeros.float(), *size)
    if target.zero == "constant":
        return _packed(target, codes - zero + target.zero_point, scale, None)
    if target.zero == "offset":
        return _packed(target, codes + target.zero_point, scale, -torch.as_tensor(zero) * scale)
    by = _shift(codes, target)
    return _packed(target, codes + by, scale, torch.as_tensor(zero, dtype=torch.float32).expand(size) + by)


def _unchanged(layout: Affine, parts: Parts, target: Affine) -> dict[str, Tensor] | None:
    """Return the parts as they are, codes in the target's width, where grids and zeros are said alike; None where a
    tensor would change its kind."""
    if layout.zero_point != target.zero_point or layout.scale_tensors() != target.scale_tensors():
        return None
    specs = target.core_specs()
    made = {name: parts[name] for name in layout.core_specs() if name != "qweight"}
    if set(made) | {"qweight"} != set(specs) or any(made[name].dtype not in specs[name].dtypes for name in made):
        return None
    return {**made, "qweight": _codes(target, layout.codes(parts).float())}


def _shift(codes: Tensor, target: Affine) -> float:
    """Return the whole number that brings ``codes`` into the target's range; 0 where they lie there already."""
    low, high = target.code_range
    least, most = float(codes.min()), float(codes.max())
    if low <= least and most <= high:
        return 0.0
    # Signed bytes become unsigned ones, and the other way: the middle of one range is that of the other.
    return 128.0 if low == 0 else -128.0


def _packed(target: Affine, codes: Tensor, scale: Tensor, zeros: Tensor | None) -> dict[str, Tensor]:
    """Return the target's parts for codes, scales and zeros (or offsets) of each single weight (N, K)."""
    made = {"qweight": _codes(target, codes)}
    made |= _stored("scales", scale / target.unit, target, target.scales_nested)
    if target.zero == "constant":
        return made
    assert zeros is not None
    if target.zero == "offset":
        zeros = zeros / target.unit
    return made | _stored("zeros", zeros, target, target.zeros_nested)


def _codes(target: Affine, codes: Tensor) -> Tensor:
    low, high = target.code_range
    if not torch.equal(codes, codes.round()):
        raise LossError("the zeros are fractions, the target wants whole ones")
    if float(codes.min()) < low or float(codes.max()) > high:
        raise LossError(
            f"codes lie between {int(codes.min())} and {int(codes.max())}, the target's between {low} and {high}"
        )
    return target.pack_codes(codes)


def _lookup(layout: Lookup | Affine, parts: Parts, target: Lookup) -> dict[str, Tensor]:
    if isinstance(layout, Lookup):
        codes, table = layout.codes(parts), parts["table"]
    else:
        if layout.zero != "constant" or layout.signed:
            raise LossError("each group has a zero of its own, which a table of values does not have")
        codes = layout.codes(parts)
        table = (torch.arange(2**layout.bits, dtype=torch.float32) - layout.zero_point) * layout.unit
    if layout.bits > target.bits:
        raise LossError(f"a table of {2**layout.bits} values does not go into one of {2**target.bits}")
    table = torch.nn.functional.pad(table, (0, 2**target.bits - table.shape[0]))
    return {"qweight": pack(codes, target.bits), "table": table, **_scales(layout, parts, target)}


def _scales(layout: Any, parts: Parts, target: Any) -> dict[str, Tensor]:
    """Return the target's scales where source and target have nothing but scales."""
    nested = target.scale_tensors()["scales"]
    if layout.grid == target.grid and layout.scale_tensors()["scales"] == nested:
        names = [name for name in layout.core_specs() if name.startswith("scales")]
        specs = target.core_specs()
        if all(parts[name].dtype in specs[name].dtypes for name in names):
            return {name: parts[name] for name in names}
    values = scale_values("scales", layout.scale_shape, layout.scale_tensors()["scales"], parts).float()
    return _stored("scales", layout.grid.expand(values, layout.out_features, layout.in_features), target, nested)


def _stored(name: str, values: Tensor, target: Any, nested: Nested | None) -> dict[str, Tensor]:
    """Return the target's tensors for the scale (or zero) ``values`` of each single weight (N, K)."""
    gathered = _gathered(values, target.grid, name)
    if nested is None:
        return {name: _held(gathered, target.core_specs()[name].dtypes, name)}
    empty = {
        part: torch.zeros(spec.shape, dtype=spec.dtypes[0])
        for part, spec in target.core_specs().items()
        if part.startswith(name)
    }
    made = nested.codes(name, gathered, empty, refit=True)
    if not torch.equal(nested.values(name, gathered.shape, {**empty, **made}), gathered):
        raise LossError(f"the target keeps {name} in {nested.bits} bits, which these are not made of")
    return {**empty, **made}


def _gathered(values: Tensor, grid: Grid, name: str) -> Tensor:
    """Return one value for each group of ``grid`` from ``values`` (N, K) of single weights."""
    groups, dims = grid.split(values), grid.member_dims
    if grid.fits(*values.shape):
        most, least = groups.amax(dims), groups.amin(dims)
    else:
        inside = grid.split(torch.ones_like(values)) > 0
        most = groups.masked_fill(~inside, -torch.inf).amax(dims)
        least = groups.masked_fill(~inside, torch.inf).amin(dims)
    if not torch.equal(most, least):
        raise LossError(f"{name} differ within the target's groups ({grid.kind} of {grid.rows}x{grid.cols})")
    return most


def _held(values: Tensor, dtypes: tuple[torch.dtype, ...], name: str) -> Tensor:
    """Return ``values`` in the first of ``dtypes`` that holds every one of them; their own, if it is allowed."""
    if values.dtype in dtypes and values.dtype != torch.float32:
        return values
    ordered = [d for d in dtypes if not d.is_floating_point] + [d for d in _FLOATS if d in dtypes]
    ordered += [d for d in dtypes if d not in ordered]
    for dtype in ordered:
        if dtype == values.dtype or torch.equal(_there_and_back(values, dtype), values):
            return values.to(dtype)
    names = "/".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    raise LossError(f"{name} are not numbers of the target's dtype ({names})")


def _there_and_back(values: Tensor, dtype: torch.dtype) -> Tensor:
    if not dtype.is_floating_point:
        limits = torch.iinfo(dtype)
        values = values.clamp(limits.min, limits.max)
    return values.to(dtype).to(values.dtype)


def _same_core(layout: Layout, target: Layout) -> bool:
    return dataclasses.replace(target, transforms=layout.transforms, activation=layout.activation) == layout


def _words(layout: Layout) -> str:
    described: Mapping[str, Any] = layout.describe()
    words = [layout.kind]
    words += [f"{name} {described[name]}" for name in ("bits", "format", "nbits", "zero") if name in described]
    grid = described.get("grid")
    if isinstance(grid, Grid):
        words.append(f"groups {grid.kind} {grid.rows}x{grid.cols}")
    return " ".join(words)
