"""The grouped product with one fused weight: its arguments gathered once, a launch for each way of cutting the work."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from qhub.layouts import Float8, Lookup, Parts
from qhub.layouts.base import Layout
from qhub.layouts.tiled import Tiled
from qhub_triton.grouped.few import grouped_few
from qhub_triton.grouped.many import grouped_many
from qhub_triton.grouped.routing import Routes
from qhub_triton.launch import Launch, native
from qhub_triton.tiled.arguments import constants_of, many_constants, size_of, tensors_of
from qhub_triton.tiled.plans import Many, Size, within

__all__ = ["Product", "block_of", "many_plan", "refusal"]

# Rows of a tile up to which every weight goes straight to the registers of the matrix units.
FEW = 8
# Rows of a tile beyond that: from the first to the last, in powers of two.
_LEAST, _MOST = 16, 128


def refusal(layout: Layout, dtype: torch.dtype) -> str | None:
    """Return why there is no grouped product with experts on ``layout`` for inputs of ``dtype``; None when there is."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"grouped products take bfloat16 and float16 inputs, not {dtype}"
    if not isinstance(layout, Tiled):
        return f"grouped products read codes in tiles, these lie as {layout.kind}"
    if layout.transforms:
        return f"the inputs of each expert are transformed in its own way: {[t.kind for t in layout.transforms]}"
    if isinstance(layout.of, Float8) and layout.of.format not in ("e4m3fn", "e5m2"):
        return f"grouped products widen E4M3 and E5M2, not {layout.of.format}"
    nested = layout.scale_tensors().get("scales")
    if isinstance(layout.of, Lookup) and nested is not None and nested.dtype != "uint8":
        return f"grouped products read no second-level scales of {nested.dtype} codes"
    return None


def block_of(pairs: int, experts: int, most: int = _MOST) -> int:
    """Return how many rows a tile should have where ``pairs`` fall on ``experts``; ``most``: that products take."""
    each = pairs / experts
    if pairs <= FEW or each <= FEW / 2:
        return FEW
    return int(min(most, max(_LEAST, triton.next_power_of_2(int(each)))))


def few_plan(columns: int, blocks: int) -> tuple[int, int, int, int]:
    """Return how a program for few rows works: its warps, its height in 16 columns of y, the blocks that a warp reads
    at a time, and how many such reads are under way. ``columns``: of all tiles together; ``blocks``: of a row."""
    warps = 4 if columns >= 10_000 or blocks < 8 else 8
    return warps, 1, min(2, -(-blocks // warps)), 1


def many_plan(size: Size, rows: int) -> Many:
    """Return how a program for tiles of ``rows`` rows, more than FEW, works; of fewer where shared memory is full."""
    wide = rows == _MOST
    asked = Many(8 if wide else 4, 128 if wide else 64, rows, 1, 4 if rows <= 64 else 3)
    chosen = within(asked, size)
    assert isinstance(chosen, Many)
    return chosen


class Product:
    """Multiplies rows with the experts' matrices, (E, N, K) in tiles. ``parts``: with one leading dimension, E.

    ``most``: the most rows of a tile, a power of two: a narrow code fills a block with many columns of the input.
    """

    def __init__(self, layout: Tiled, parts: Parts, dtype: torch.dtype) -> None:
        self.layout, self.dtype = layout, dtype
        self.n, self.k, self.blocks = layout.out_features, layout.in_features, layout.blocks
        words = self.source = parts["qweight"]
        self.experts = words.shape[0]
        self.device = words.device
        self.index = -1 if self.device.type != "cuda" else self.device.index or 0
        self.native = native(self.device)
        own = {name: part.contiguous() for name, part in parts.items()}
        self.tensors = tensors_of(layout, own, dtype)
        size = {name: own[name][0].numel() if name in own else 0 for name in ("scales_super", "zeros_super")}
        self.strides = (words[0].numel(), own["scales"][0].numel(), size["scales_super"], size["zeros_super"])
        self.constants = constants_of(layout, parts)
        self.many_constants = many_constants(layout, parts)
        self.size = size_of(layout, self.device)
        self.most = _MOST
        while self.most > _LEAST and many_plan(self.size, self.most).block_m < self.most:
            self.most //= 2
        self.launches: dict[Any, tuple[Launch, int]] = {}

    def __call__(self, x: Tensor, routes: Routes, per: int, bias: Tensor | None = None) -> Tensor:
        """Return y (S, N): row i is the routes' pair at place i, times its expert's matrix, plus ``bias`` (E, N).

        ``per``: pairs that share a row of x, (S / per, K) in the order of the tokens; 0: x (S, K) is ordered as y.
        Rows of pairs without an expert are not written. Raises ValueError where tiles have more rows than ``most``.
        """
        x = x.contiguous()
        y = torch.empty(routes.position.shape[0], self.n, dtype=x.dtype, device=x.device)
        aligned = x.data_ptr() % 16 == 0 and (bias is None or bias.data_ptr() % 16 == 0)
        key: tuple[Any, ...] = (
            routes.block,
            routes.single,
            routes.block <= FEW and routes.tiles,
            per,
            bias is not None,
            aligned,
            routes.experts.dtype,
        )
        key += (routes.starts.data_ptr() % 16 == 0, routes.ends.data_ptr() % 16 == 0)
        found = self.launches.get(key)
        if found is None:
            found = self.launches[key] = self._launch(routes, per, bias is not None)
        launch, height = found
        launch(
            (-(-self.n // height), routes.tiles, 1), self.index, x, *self.tensors,
            self.tensors[0] if bias is None else bias, y, routes.order, routes.experts, routes.starts, routes.ends,
            self.experts, self.n, self.k, self.blocks, self.layout.groups, self.k, *self.strides,
        )  # fmt: skip
        return y

    def _launch(self, routes: Routes, per: int, biased: bool) -> tuple[Launch, int]:
        constants = {**self.constants, "HAS_BIAS": biased, "NATIVE": self.native, "PER": per, "SINGLE": routes.single}
        if routes.block <= FEW:
            warps, tall, ahead, stages = few_plan(self.n * routes.tiles, self.blocks)
            constants |= {"WARPS": warps, "TALL": tall, "AHEAD": ahead, "STAGES": stages}
            return Launch(grouped_few, constants, {"num_warps": warps, "num_stages": 1}), 16 * tall
        if routes.block > self.most:
            raise ValueError(f"tiles of {routes.block} rows: shared memory holds the inputs of {self.most}")
        chosen = many_plan(self.size, routes.block)
        constants |= {**self.many_constants, "STAGES": chosen.stages}
        constants |= {"BLOCK_N": chosen.block_n, "BLOCK_M": chosen.block_m}
        return Launch(grouped_many, constants, {"num_warps": chosen.warps}), chosen.block_n
