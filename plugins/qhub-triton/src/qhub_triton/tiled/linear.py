"""The product with a weight in tiles: what a kernel needs is gathered once per weight, the plan chosen by rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qhub.layouts import Layout, Parts
from qhub.layouts.tiled import Tiled
from qhub.layouts.transforms import transform_input, transform_output
from qhub_triton.launch import Launch, native, overlaps, stream_of
from qhub_triton.tiled.arguments import constants_of, many_constants, size_of, tensors_of
from qhub_triton.tiled.counters import SIZE, counters, prepare
from qhub_triton.tiled.few import few
from qhub_triton.tiled.many import many
from qhub_triton.tiled.plans import Few, Many, Plan, Tile, Wide, plan, plan_of, within
from qhub_triton.tiled.trials import candidates, named, probed
from qhub_triton.wide.launching import WideLaunch
from qhub_triton.wide.tiles import HEIGHT

__all__ = ["bind", "linear", "probes", "tunables"]

Run = Launch | WideLaunch
_OVERLAPS = {False: 0, "": 0, True: 1, "early": 1, "late": 2}

if TYPE_CHECKING:
    from qhub.kernels import Problem


def tunables(problem: Problem, parts: Parts, m: int) -> dict[str, dict[str, Any]]:
    """Return the plans worth measuring for ``m`` rows of input, by name."""
    layout = problem.layout
    assert isinstance(layout, Tiled)
    return named(candidates(size_of(layout, parts["qweight"].device), m))


def probes(problem: Problem, parts: Parts) -> list[int | tuple[int, dict[str, Any]]]:
    """Return the rows of input at which each way of cutting the work that the rule may choose is compared."""
    layout = problem.layout
    assert isinstance(layout, Tiled)
    # A row each for the two kernels and the two block sizes.
    return probed(size_of(layout, parts["qweight"].device), (1, 3, 20, 70, 130))


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
    """Holds one weight's arguments, and a launch for each plan it has met. ``wide``: of :class:`Size`."""

    def __init__(
        self, layout: Tiled, parts: Parts, dtype: torch.dtype, chosen: Plan | None, wide: tuple[Tile, ...] = ()
    ) -> None:
        self.layout, self.parts, self.dtype, self.chosen = layout, parts, dtype, chosen
        self.n, self.k = layout.out_features, layout.in_features
        self.blocks, self.groups = layout.blocks, layout.groups
        self.device = parts["qweight"].device
        self.index = -1
        if self.device.type == "cuda":
            self.index = self.device.index or 0
            prepare(self.device)
        self.size = replace(size_of(layout, self.device), wide=wide)
        self.tensors = tensors_of(layout, parts, dtype)
        self.constants = constants_of(layout, parts)
        self.overlaps = self.index >= 0 and overlaps(self.device)
        self.launches: dict[tuple[int, bool, bool, bool], tuple[Plan, Run]] = {}
        self.wides: dict[tuple[Wide, bool], WideLaunch] = {}

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        layout = self.layout
        if layout.transforms:
            x = transform_input(x, layout, self.parts).to(self.dtype).contiguous()
        m = x.shape[0]
        aligned = x.data_ptr() % 16 == 0 and (bias is None or bias.data_ptr() % 16 == 0)
        # What a graph replays is steady: no kernel in it writes the weights that the next one reads too early.
        overlap = self.overlaps and torch.cuda.is_current_stream_capturing()
        key = (m if m <= 16 else self._alike(m), bias is not None, aligned, overlap)
        found = self.launches.get(key)
        if found is None:
            found = self.launches[key] = self._launch(m, *key[1:])
        y = self._run(*found, x, bias)
        if layout.transforms:
            y = transform_output(y, layout, self.parts).to(self.dtype)
        return y

    def _alike(self, m: int) -> int:
        """Return a number above 16 that ``m`` has in common with those whose launch it shares: all up to a power of
        two, or up to a tile more, with which the rounds that programs for many rows need may change."""
        return 64 + -(-m // 128) if m > 128 and self.size.wide else 16 + (m - 1).bit_length()

    def _run(self, chosen: Plan, run: Run, x: Tensor, bias: Tensor | None) -> Tensor:
        m = x.shape[0]
        y = torch.empty(m, self.n, dtype=x.dtype, device=x.device)
        tensors = self.tensors
        if isinstance(run, WideLaunch):
            assert isinstance(chosen, Wide)
            run(x, bias, y, *self._shares(run.tiles(m), chosen.split, HEIGHT * chosen.rows))
        elif isinstance(chosen, Few):
            grid = (-(-self.n // (16 * chosen.tall)), -(-m // chosen.block_m), 1)
            run(
                grid, self.index, x, *tensors, tensors[0] if bias is None else bias, y,
                m, self.n, self.k, self.blocks, self.groups, self.k, self.n,
            )  # fmt: skip
        else:
            assert isinstance(chosen, Many)
            tiles = -(-self.n // chosen.block_n) * -(-m // chosen.block_m)
            shares, counters = self._shares(tiles, chosen.split, chosen.block_n * chosen.block_m)
            run(
                (tiles * chosen.split, 1, 1), self.index, x, *tensors, tensors[0] if bias is None else bias, y,
                shares, counters, m, self.n, self.k, self.blocks, self.groups, self.k, self.n,
                -(-self.blocks // chosen.split),
            )  # fmt: skip
        return y

    def _launch(self, m: int, biased: bool, aligned: bool, overlap: bool) -> tuple[Plan, Run]:
        # Launches are kept for all m up to a power of two, at most.
        most = m if m <= 16 else 1 << (m - 1).bit_length()
        chosen = within(self.chosen or plan(self.size, m), self.size)
        if isinstance(chosen, Wide):
            if -(-self.n // HEIGHT) * -(-most // chosen.rows) * 2 > SIZE:
                chosen = replace(chosen, split=1)
            if aligned:
                return chosen, self._wide(chosen, biased)
            chosen = plan(replace(self.size, wide=()), m)
        if isinstance(chosen, Many) and -(-self.n // chosen.block_n) * -(-most // chosen.block_m) > SIZE:
            chosen = replace(chosen, split=1)
        return chosen, self._compiled(chosen, biased, overlap)

    def _compiled(self, chosen: Plan, biased: bool, overlaps: bool) -> Launch:
        assert not isinstance(chosen, Wide)
        overlap = _OVERLAPS[chosen.overlap] if overlaps else 0
        constants = {**self.constants, "HAS_BIAS": biased, "NATIVE": native(self.device), "OVERLAP": overlap}
        options = {"num_warps": chosen.warps, **({"launch_pdl": True} if overlap else {})}
        if isinstance(chosen, Few):
            constants |= {
                "WARPS": chosen.warps, "TALL": chosen.tall, "AHEAD": chosen.ahead,
                "TURNS": chosen.turns(self.blocks), "BLOCK_M": chosen.block_m,
            }  # fmt: skip
            return Launch(few, constants, {**options, "num_stages": 1})
        constants |= many_constants(self.layout, self.parts)
        constants |= {
            "SPLIT": chosen.split, "STAGES": chosen.stages, "BLOCK_N": chosen.block_n, "BLOCK_M": chosen.block_m,
            "BANKS": chosen.banks,
        }  # fmt: skip
        if chosen.registers and native(self.device):
            options["maxnreg"] = chosen.registers
        return Launch(many, constants, options)

    def _wide(self, chosen: Wide, biased: bool) -> WideLaunch:
        found = self.wides.get((chosen, biased))
        if found is None:
            whole = many_constants(self.layout, self.parts)["WHOLE"]
            constants = {**self.constants, "WHOLE": whole, "HAS_BIAS": biased}
            found = WideLaunch(self.layout, self.tensors, constants, self.dtype, chosen)
            self.wides[chosen, biased] = found
        return found

    def _shares(self, tiles: int, split: int, size: int) -> tuple[Tensor, Tensor]:
        """Return memory for the parts of a sum, and the counters of the current stream."""
        if split == 1:
            return self.tensors[0], self.tensors[0]
        shares = torch.empty(tiles * split * size, dtype=torch.float32, device=self.device)
        stream = stream_of(self.index) if self.index >= 0 else 0
        return shares, counters(self.device, stream)
