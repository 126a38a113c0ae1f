"""Products of one weight, ready to run: one row by :mod:`vector`, tiles by :mod:`product`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qhub.layouts import Layout, Parts
from qhub_triton.eightbit.product import multiply
from qhub_triton.eightbit.rounded import Rounder
from qhub_triton.eightbit.scheme import Scheme, own_scales, scheme_of
from qhub_triton.eightbit.space import Plan, Space
from qhub_triton.eightbit.vector import multiply_row
from qhub_triton.launch import Launch

__all__ = ["Row", "RowProduct", "Tile", "TileProduct"]


# Columns with outliers that are multiplied at a time.
_OUTLIERS = 16


class Row(NamedTuple):
    """Says how :class:`RowProduct` cuts the weight: ``bn`` rows to a program, ``bk`` columns at a time, ``fold`` of
    them summed by a thread at once."""

    bn: int
    bk: int
    warps: int
    fold: int = 8
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


class _Product:
    """Holds a weight's tensors. ``parts`` are kept, not their addresses: those may change."""

    def __init__(self, layout: Layout, parts: Parts) -> None:
        self.scheme: Scheme = scheme_of(layout)
        self.n, self.k = layout.out_features, layout.in_features
        self.weight, self.own = parts["qweight"], own_scales(parts)
        self.stored = parts["input_scale"] if self.scheme.scale == 1 else None
        self.device = self.weight.device
        self.index = -1 if self.device.type == "cpu" else self.device.index or 0
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
            "BK": config.bk, "FOLD": config.fold, "CHAIN": config.chain,
        }  # fmt: skip
        options = {"num_warps": config.warps}
        return Launch(multiply_row, constants, {**options, "launch_pdl": True} if config.chain else options)

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return (1, N) in x's dtype."""
        launch = self.launches.get(bias is not None)
        if launch is None:
            launch = self.launches[bias is not None] = self._launch(bias is not None)
        out = torch.empty(1, self.n, dtype=x.dtype, device=self.device)
        launch(
            self.grid, self.index, self.weight, x, out, self.own, self.own if self.stored is None else self.stored,
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
        constants = {
            "UNIT": scheme.unit, "GROUP": scheme.group, "BLOCKS": scheme.blocks,
            "FLAT": scheme.rows % config.bn == 0, "OUTLIERS": _OUTLIERS if self.outliers else 0, "BIAS": biased,
            "EXPONENTS": self.own.dtype == torch.uint8, "EVEN": self.k % config.bk == 0, "BN": config.bn,
            "BM": config.bm, "BK": config.bk, "SPLIT": config.split,
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
        m, split, device = x.shape[0], self.config.split, self.index
        plan, tiles = self.plans.get(m) or self._plan(m)
        launch = self.launches.get(bias is not None)
        if launch is None:
            launch = self.launches[bias is not None] = self._launch(bias is not None)
        space = Space(plan, self.device)
        outliers = None
        if self.outliers:
            outliers = (space.tensor("flags"), space.tensor("columns"), space.tensor("outliers"))
        warm = not self.outliers and launch.fast is not None and self.rounder.warm(m)
        # Addresses once all is compiled, tensors before.
        at = space.address if warm else space.tensor
        codes, steps, counters = at("codes"), at("steps"), at("counters")
        self.rounder(x, self.stored, codes, steps, counters, tiles if split > 1 else 0, device, outliers)
        out = torch.empty(m, self.n, dtype=x.dtype, device=self.device)
        columns, number = (out, out) if outliers is None else outliers[1:]
        launch(
            (tiles, split, 1), device, self.weight, codes, out, self.own, steps, out if bias is None else bias, x,
            columns, number, at("work") if split > 1 else out, counters, m, self.n, self.k, self.scheme.rows,
            self.scheme.cols, self.scheme.across,
        )  # fmt: skip
        return out
