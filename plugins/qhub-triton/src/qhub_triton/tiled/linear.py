"""The product with a weight in tiles: what a kernel needs is gathered once per weight, the plan chosen by rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qhub.layouts import Float8, Layout, Nested, Parts
from qhub.layouts.tiled import Tiled
from qhub.layouts.transforms import transform_input, transform_output
from qhub_triton.launch import Launch, native, overlaps, processors, stream_of
from qhub_triton.tiled import decode
from qhub_triton.tiled.counters import SIZE, counters, prepare
from qhub_triton.tiled.few import few
from qhub_triton.tiled.many import many
from qhub_triton.tiled.plans import Few, Many, candidates, config_of, plan, plan_of, within

__all__ = ["bind", "linear", "tunables"]

if TYPE_CHECKING:
    from qhub.kernels import Problem


def tunables(problem: Problem, parts: Parts, m: int) -> dict[str, dict[str, Any]]:
    """Return the plans worth measuring for ``m`` rows of input, by name."""
    layout = problem.layout
    assert isinstance(layout, Tiled)
    count = processors(parts["qweight"].device)
    found = [config_of(one) for one in candidates(layout.out_features, layout.blocks, m, count)]
    return {"-".join(str(value) for value in one.values()): one for one in found}


def linear(
    x: Tensor, layout: Layout, parts: Parts, bias: Tensor | None = None, config: dict[str, Any] | None = None
) -> Tensor:
    """Return ``x @ W.T + bias`` for x (M, K) contiguous, in x's dtype; ``config``: a plan, None for the rule's."""
    return bind(layout, parts, x.dtype, config)(x, bias)


def bind(
    layout: Layout, parts: Parts, dtype: torch.dtype, config: dict[str, Any] | None = None
) -> Callable[[Tensor, Tensor | None], Tensor]:
    """Return what computes ``x @ W.T + bias`` for x (M, K) contiguous of ``dtype``, bias (N,) of ``dtype`` or None."""
    assert isinstance(layout, Tiled)
    return Product(layout, parts, dtype, None if config is None else plan_of(config))


class Product:
    """Holds one weight's arguments, and a launch for each plan it has met."""

    def __init__(self, layout: Tiled, parts: Parts, dtype: torch.dtype, chosen: Few | Many | None) -> None:
        self.layout, self.parts, self.dtype, self.chosen = layout, parts, dtype, chosen
        self.n, self.k = layout.out_features, layout.in_features
        self.blocks, self.groups = layout.blocks, layout.groups
        self.device = parts["qweight"].device
        self.index = -1
        if self.device.type == "cuda":
            self.index = self.device.index or 0
            prepare(self.device)
        self.processors = processors(self.device)
        self.tensors = _tensors(layout, parts, dtype)
        self.constants = _constants(layout, parts)
        self.overlaps = self.index >= 0 and overlaps(self.device)
        self.launches: dict[tuple[int, bool, bool, bool], tuple[Few | Many, Launch]] = {}

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        layout = self.layout
        if layout.transforms:
            x = transform_input(x, layout, self.parts).to(self.dtype).contiguous()
        m = x.shape[0]
        aligned = x.data_ptr() % 16 == 0 and (bias is None or bias.data_ptr() % 16 == 0)
        # What a graph replays is steady: no kernel in it writes the weights that the next one reads too early.
        overlap = self.overlaps and torch.cuda.is_current_stream_capturing()
        key = (m if m <= 16 else 16 + (m - 1).bit_length(), bias is not None, aligned, overlap)
        found = self.launches.get(key)
        if found is None:
            found = self.launches[key] = self._launch(m, bias is not None, overlap)
        chosen, launch = found
        y = torch.empty(m, self.n, dtype=x.dtype, device=x.device)
        tensors = self.tensors
        if isinstance(chosen, Few):
            grid = (-(-self.n // (16 * chosen.tall)), -(-m // chosen.block_m), 1)
            launch(
                grid, self.index, x, *tensors, tensors[0] if bias is None else bias, y,
                m, self.n, self.k, self.blocks, self.groups, self.k, self.n,
            )  # fmt: skip
        else:
            tiles = -(-self.n // chosen.block_n) * -(-m // chosen.block_m)
            shares, counters = self._shares(tiles, chosen)
            launch(
                (tiles * chosen.split, 1, 1), self.index, x, *tensors, tensors[0] if bias is None else bias, y,
                shares, counters, m, self.n, self.k, self.blocks, self.groups, self.k, self.n,
                -(-self.blocks // chosen.split),
            )  # fmt: skip
        if layout.transforms:
            y = transform_output(y, layout, self.parts).to(self.dtype)
        return y

    def _launch(self, m: int, biased: bool, overlap: bool) -> tuple[Few | Many, Launch]:
        chosen = within(self.chosen or plan(self.n, self.blocks, m, self.processors), self.blocks)
        overlap = overlap and chosen.overlap
        if isinstance(chosen, Many) and -(-self.n // chosen.block_n) * -(-m // chosen.block_m) > SIZE:
            chosen = replace(chosen, split=1)
        constants = {**self.constants, "HAS_BIAS": biased, "NATIVE": native(self.device), "OVERLAP": overlap}
        options = {"num_warps": chosen.warps, **({"launch_pdl": True} if overlap else {})}
        if isinstance(chosen, Few):
            constants |= {
                "WARPS": chosen.warps, "TALL": chosen.tall, "AHEAD": chosen.ahead,
                "TURNS": chosen.turns(self.blocks), "BLOCK_M": chosen.block_m,
            }  # fmt: skip
            return chosen, Launch(few, constants, {**options, "num_stages": 1})
        constants |= {
            "WHOLE": self.layout.of.__dict__.get("zero") != "offset" and _whole(self.parts), "SPLIT": chosen.split,
            "STAGES": chosen.stages, "BLOCK_N": chosen.block_n, "BLOCK_M": chosen.block_m, "EARLY": chosen.early,
        }  # fmt: skip
        return chosen, Launch(many, constants, options)

    def _shares(self, tiles: int, chosen: Many) -> tuple[Tensor, Tensor]:
        """Return memory for the parts of a sum, and the counters of the current stream."""
        if chosen.split == 1:
            return self.tensors[0], self.tensors[0]
        size = tiles * chosen.split * chosen.block_n * chosen.block_m
        shares = torch.empty(size, dtype=torch.float32, device=self.device)
        stream = stream_of(self.index) if self.index >= 0 else 0
        return shares, counters(self.device, stream)


def _whole(parts: Parts) -> bool:
    return "zeros" in parts and not parts["zeros"].is_floating_point()


def bytes_of(table: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``table`` (16,) float32 in 16 bits of ``dtype``, as 8 int32: four low bytes each, then four high bytes."""
    apart = table.to(dtype).view(torch.uint8).reshape(4, 4, 2)
    return torch.cat([apart[..., 0], apart[..., 1]]).contiguous().view(torch.int32).reshape(8)


def _tensors(layout: Tiled, parts: Parts, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return words, scales, zeros, table, second-level scales and their table and offset, second-level zeros."""
    none = parts["qweight"]
    scales = parts["scales"]
    if scales.dtype == torch.float8_e8m0fnu:
        scales = scales.view(torch.uint8)
    table = parts.get("table", none)
    if table is not none and layout.bits == 4 and native(none.device):
        table = bytes_of(table, dtype)
    parts = {**parts, "table": table}
    names = ("zeros", "table", "scales_super", "scales_table", "scales_offset", "zeros_super")
    return (parts["qweight"], scales, *(parts.get(name, none) for name in names))


def _constants(layout: Tiled, parts: Parts) -> dict[str, Any]:
    """Return the compile-time values that the layout decides."""
    of: Any = layout.of
    kind = decode.INTEGER
    if isinstance(of, Float8):
        kind = {"e4m3fn": decode.E4M3, "e5m2": decode.E5M2}[of.format]
    elif "table" in parts:
        kind = decode.TABLE
    zero_point = float(getattr(of, "zero_point", 0.0)) + (128.0 if getattr(of, "signed", False) else 0.0)
    per_block = layout.per_word * 32
    group = layout.group_size if layout.groups > 1 else layout.blocks * per_block
    zero = {"constant": 0, "value": 1, "offset": 2}[getattr(of, "zero", "constant")]
    return {
        "BITS": layout.bits, "KIND": kind.value, "GROUP": group, "ZERO": zero, "ZERO_POINT": zero_point,
        "UNIT": float(getattr(of, "unit", 1.0)), "NESTED": _nested(layout.scale_tensors().get("scales")),
        "ZERO_NESTED": _nested(layout.scale_tensors().get("zeros")),
    }  # fmt: skip


def _nested(nested: Nested | None) -> tuple[int, bool, bool, bool] | None:
    if nested is None:
        return None
    return nested.group, nested.table, nested.offset, nested.divide
