"""Products of one weight, ready to run: one row by :mod:`vector`, tiles by :mod:`product`."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from qhub.layouts import Layout, Parts
from qhub_triton.eightbit.product import multiply
from qhub_triton.eightbit.rounded import PIECE, Rounder
from qhub_triton.eightbit.scheme import Scheme, own_scales, scheme_of
from qhub_triton.eightbit.space import Plan, Space
from qhub_triton.eightbit.vector import multiply_row
from qhub_triton.launch import Launch

__all__ = ["Row", "RowProduct", "Tile", "TileProduct", "index_of"]


class Row(NamedTuple):
    """Says how :class:`RowProduct` cuts the weight: ``bn`` rows to a program, ``bk`` columns at a time, ``fold`` of
    them summed by a thread at once."""

    bn: int
    bk: int
    warps: int
    fold: int = 16
    ahead: int = 0
    chain: bool = False


class Tile(NamedTuple):
    """Says how :class:`TileProduct` cuts the product: ``bn`` rows of the weight by ``bm`` of the input, ``bk`` columns
    at a time, ``split`` programs along K; ``stages`` tiles on their way at once. ``band``, ``imprecise``: see
    :func:`qhub_triton.eightbit.product.multiply`; ``pdl``: the product is launched before the rounding has ended."""

    bn: int
    bm: int
    bk: int
    split: int
    stages: int
    warps: int
    band: int = 16
    pdl: bool = False
    imprecise: int = 128
    ahead: int = 0
    chain: bool = False
    each: int = 16


def index_of(x: Tensor) -> int:
    """Return the number of the GPU that ``x`` is on; -1 for none."""
    return x.device.index if x.device.type != "cpu" else -1


class _Product:
    """Holds a weight's tensors. ``parts`` are kept, not their addresses: those may change."""

    def __init__(self, layout: Layout, parts: Parts) -> None:
        self.scheme: Scheme = scheme_of(layout)
        self.n, self.k = layout.out_features, layout.in_features
        self.weight, self.own = parts["qweight"], own_scales(parts)
        self.stored = parts["input_scale"] if self.scheme.scale == 1 else None
        self.launches: dict[bool, Launch] = {}


class RowProduct(_Product):
    """Computes ``x @ W.T + bias`` for one row x (1, K), in one kernel."""

    def __init__(self, layout: Layout, parts: Parts, config: Row) -> None:
        super().__init__(layout, parts)
        self.config = config
        self.grid = (-(-self.n // config.bn), 1, 1)

    def _launch(self, biased: bool) -> Launch:
        scheme, config = self.scheme, self.config
        constants = {
            "UNIT": scheme.unit, "KIND": scheme.kind, "SCALE": scheme.scale, "TOP": scheme.top,
            "LARGEST": scheme.largest, "SHIFT": scheme.shift, "LIMIT": scheme.limit, "POWERS": scheme.powers,
            "THRESHOLD": scheme.threshold, "GROUP": scheme.group, "BLOCKS": scheme.blocks, "BIAS": biased,
            "EXPONENTS": self.own.dtype == torch.uint8, "EVEN": self.k % config.bk == 0, "BN": config.bn,
            "BK": config.bk, "FOLD": config.fold, "AHEAD": config.ahead, "CHAIN": config.chain,
        }  # fmt: skip
        options = {"num_warps": config.warps}
        return Launch(multiply_row, constants, {**options, "launch_pdl": True} if config.chain else options)

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return (1, N) in x's dtype."""
        launch = self.launches.get(bias is not None)
        if launch is None:
            launch = self.launches[bias is not None] = self._launch(bias is not None)
        out = torch.empty(1, self.n, dtype=x.dtype, device=x.device)
        launch(
            self.grid, index_of(x), self.weight, x, out, self.own, self.own if self.stored is None else self.stored,
            out if bias is None else bias, self.n, self.k, self.scheme.rows, self.scheme.cols, self.scheme.across,
        )  # fmt: skip
        return out


class TileProduct(_Product):
    """Computes ``x @ W.T + bias`` for x (M, K): one kernel rounds, one multiplies."""

    def __init__(self, layout: Layout, parts: Parts, config: Tile) -> None:
        super().__init__(layout, parts)
        self.config = config
        self.rounder = Rounder(self.scheme, self.k, config.pdl, config.chain, config.each)
        self.outliers = self.scheme.threshold > 0
        self.plans: dict[int, tuple[Plan, int]] = {}

    def _launch(self, biased: bool) -> Launch:
        scheme, config = self.scheme, self.config
        pieces = triton.next_power_of_2(-(-self.k // PIECE)) if self.outliers else 1
        constants = {
            "UNIT": scheme.unit, "GROUP": scheme.group, "BLOCKS": scheme.blocks, "OUTLIERS": self.outliers,
            "BIAS": biased, "EXPONENTS": self.own.dtype == torch.uint8, "EVEN": self.k % config.bk == 0, "PIECE": PIECE,
            "PIECES": pieces, "BN": config.bn, "BM": config.bm, "BK": config.bk, "SPLIT": config.split,
            "IMPRECISE": config.imprecise, "BAND": config.band, "PDL": config.pdl,
            "AHEAD": config.ahead, "CHAIN": config.chain,
        }  # fmt: skip
        options = {"num_warps": config.warps, "num_stages": config.stages}
        return Launch(multiply, constants, {**options, "launch_pdl": True} if config.pdl else options)

    def _plan(self, m: int) -> tuple[Plan, int]:
        config, plan = self.config, Plan()
        tiles = -(-self.n // config.bn) * -(-m // config.bm)
        self.rounder.plan(plan, m, tiles if config.split > 1 else 0)
        if config.split > 1:
            plan.add("work", tiles * config.split * config.bn * config.bm, torch.float32)
        if len(self.plans) > 256:
            self.plans.clear()
        self.plans[m] = (plan, tiles)
        return self.plans[m]

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return (M, N) in x's dtype."""
        m, split = x.shape[0], self.config.split
        plan, tiles = self.plans.get(m) or self._plan(m)
        launch = self.launches.get(bias is not None)
        if launch is None:
            launch = self.launches[bias is not None] = self._launch(bias is not None)
        device = index_of(x)
        space = Space(plan, x.device)
        self.rounder(x, self.stored, space, tiles if split > 1 else 0, device)
        out = torch.empty(m, self.n, dtype=x.dtype, device=x.device)
        codes, steps = space.at("codes", launch, device), space.at("steps", launch, device)
        flags = pieces = out if not self.outliers else None
        if self.outliers:
            flags, pieces = space.at("flags", launch, device), space.at("pieces", launch, device)
        work = space.at("work", launch, device) if split > 1 else out
        launch(
            (tiles, split, 1), device, self.weight, codes, out, self.own, steps, out if bias is None else bias, x,
            flags, pieces, work, space.at("counters", launch, device), m, self.n, self.k, self.scheme.rows,
            self.scheme.cols, self.scheme.across,
        )  # fmt: skip
        return out
