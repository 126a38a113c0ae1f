"""Chooses the grid of every group, then rounds to nearest: AWQ's clipping search, by the layer's own statistics.

Lin et al. 2023, "AWQ", and ``_search_best_clip`` of autoawq 0.2.9 (awq/quantize/quantizer.py) shrink a group's range to
the share of its width, of 20 from 1 down to 0.5, that changes the output on sampled inputs least. Here:

1. both ends of the range shrink on their own;
2. what an output changes by is exact and costs no forward pass: e H e^T (:func:`qhub_awq.rounding.cost`);
3. afterwards the groups of a row are gone through in turn, each takes the grid that suits the errors of all others:
   the error of a row is e_g H_gg e_g^T + 2 e_g (sum of H_gh e_h) + what does not depend on group g.

Every weight is rounded to the nearest of its group's levels; none makes up for the rounding of another.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from qhub.errors import LayoutError
from qhub.layouts import Affine, Layout
from qhub_awq.rounding import Levels, block_diagonal, cost, prepared

__all__ = ["levels_of", "quantize", "refine", "search_grids"]

# Shares of a range's lower and upper end that are tried: each end keeps 100 to 65 % of its distance from zero.
_RANGES = tuple((1 - 0.05 * lower, 1 - 0.05 * upper) for lower in range(8) for upper in range(8))
# What the sweeps try: factors of the scale and steps of the zero, wide ones first.
_SWEEPS: Sequence[tuple[Sequence[float], Sequence[int]]] = (
    ((0.8, 0.84, 0.88, 0.92, 0.96, 1.0, 1.04, 1.08, 1.12), (0, -1, 1)),
    ((0.94, 0.97, 1.0, 1.03, 1.06), (0, -1, 1)),
    ((0.97, 0.99, 1.0, 1.01, 1.03), (0, -1, 1)),
)
# How often a scale is fitted to the codes it leads to, per group and sweep.
_FITS = 2
# Weights handled at a time: temporaries of 2 MB on a CPU, whose caches they stay near; a GPU, which small pieces leave
# idle, takes 256 MB, and in a sweep as many candidates of a group together as fit in that.
_CPU_CHUNK, _GPU_CHUNK = 1 << 19, 1 << 26


def quantize(weight: Tensor, layout: Layout, statistics: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the parts of ``layout`` for ``weight`` (N, K), on the grids that change the layer's outputs least.

    ``statistics``: ``hessian`` (K, K). Raises :class:`LayoutError` when K is no multiple of the group size, or without
    statistics.
    """
    assert isinstance(layout, Affine)
    n, k = weight.shape
    group = layout.grid.cols
    if k % group:
        raise LayoutError(f"{k} input features do not make up groups of {group}")
    if "hessian" not in statistics:
        raise LayoutError("AWQ quantizes by the statistics 'hessian' of a layer's inputs; none were given")
    hessian = prepared(statistics["hessian"])
    levels = levels_of(layout)
    scales = torch.empty(n, k // group, dtype=torch.float16, device=weight.device)
    zeros = torch.empty(n, k // group, device=weight.device)
    for rows in _pieces(n, k, weight.device):
        groups = weight[rows].float().unflatten(-1, (-1, group))
        scale, zero = refine(groups, hessian, levels, *search_grids(groups, hessian, levels))
        scales[rows], zeros[rows] = scale.squeeze(-1).half(), zero.squeeze(-1)
    parts = {"scales": scales}
    if layout.zero == "value":
        parts["zeros"] = zeros.to(torch.uint8)
    elif layout.zero == "offset":
        # As ``WQLinear_GEMVFast.from_linear`` of autoawq 0.2.9 does: the product is rounded once.
        parts["zeros"] = -(scales.float() * zeros).half()
    return parts | layout.nearest(weight, parts)


def levels_of(layout: Affine) -> Levels:
    """Return the levels that the groups of ``layout`` have."""
    return Levels(2**layout.bits - 1, int(layout.zero_point) if layout.zero == "constant" else None)


def search_grids(
    w: Tensor, hessian: Tensor, levels: Levels, ranges: Sequence[tuple[float, float]] = _RANGES
) -> tuple[Tensor, Tensor]:
    """Return scales and zeros (N, G, 1) for ``w`` (N, G, group), each group's chosen as if it were alone.

    ``ranges``: shares of the lower and the upper end to try; where the zero is fixed, those alike only.
    """
    by_group, blocks = w.transpose(0, 1).contiguous(), block_diagonal(hessian, w.shape[-1])
    low, high = by_group.amin(-1, keepdim=True).clamp_max(0), by_group.amax(-1, keepdim=True).clamp_min(0)
    best: Tensor | None = None
    for lower, upper in ranges:
        if levels.zero is not None and lower != upper:
            continue
        scale, zero = levels.spanning(low * lower, high * upper)
        found = cost(levels.error(by_group, scale, zero), blocks)
        if best is None:
            best, scales, zeros = found, scale, zero
            continue
        better = found < best
        best = torch.where(better, found, best)
        scales, zeros = torch.where(better, scale, scales), torch.where(better, zero, zeros)
    return scales.transpose(0, 1).contiguous(), zeros.transpose(0, 1).contiguous()


def refine(w: Tensor, hessian: Tensor, levels: Levels, scales: Tensor, zeros: Tensor) -> tuple[Tensor, Tensor]:
    """Return better scales and zeros (N, G, 1) for ``w`` (N, G, group): every group's in view of all others' errors.

    A change is taken over only where it lowers the row's cost, so no row ends worse than it began.
    """
    n, count, group = w.shape
    scales, zeros = scales.clone(), zeros.clone()
    errors = levels.error(w, scales, zeros)
    for factors, steps in _SWEEPS:
        around = _candidates(factors, steps if levels.zero is None else (0,), w.device)
        for index in range(count):
            columns = slice(index * group, (index + 1) * group)
            own = hessian[columns, columns]
            pull = errors.reshape(n, -1) @ hessian[:, columns] - errors[:, index] @ own
            choice = _Choice(w[:, index], own, pull, levels, scales[:, index], zeros[:, index])
            choice.try_around(*around)
            for _ in range(_FITS):
                choice.try_fitted()
            scales[:, index], zeros[:, index], errors[:, index] = choice.scale, choice.zero, choice.error
    return scales, zeros


def _candidates(factors: Sequence[float], steps: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return every pair of a factor of the scale and a step of the zero, (pairs, 1, 1) float32 each."""
    pairs = torch.tensor([(factor, step) for step in steps for factor in factors], device=device)
    return pairs[:, 0, None, None], pairs[:, 1, None, None]


class _Choice:
    """Keeps the best grid found so far for one group of every row.

    ``w`` (N, group); ``own``: the group's block of the Hessian; ``pull`` (N, group): the other groups' errors times
    their blocks.
    """

    def __init__(self, w: Tensor, own: Tensor, pull: Tensor, levels: Levels, scale: Tensor, zero: Tensor) -> None:
        self.w, self.own, self.pull, self.levels = w, own, pull, levels
        self.scale, self.zero = scale, zero
        self.error = levels.error(w, scale, zero)
        self.best = self._cost(self.error)

    def _cost(self, error: Tensor) -> Tensor:
        return ((error @ self.own).add_(self.pull, alpha=2).mul_(error)).sum(-1, keepdim=True)

    def _take(self, scale: Tensor, zero: Tensor) -> None:
        """Take ``scale`` and ``zero`` over where they cost less: (N, 1), or (candidates, N, 1) of which the first of
        the cheapest counts."""
        scale = self.levels.stored(scale)
        error = self.levels.error(self.w, scale, zero)
        found = self._cost(error)
        if scale.ndim > self.scale.ndim:
            first = found.argmin(0, keepdim=True)
            found, scale, zero = (value.gather(0, first)[0] for value in (found, scale, zero))
            error = error.gather(0, first.expand(-1, *error.shape[1:]))[0]
        better = found < self.best
        self.best = torch.where(better, found, self.best)
        self.scale, self.zero = torch.where(better, scale, self.scale), torch.where(better, zero, self.zero)
        self.error = torch.where(better, error, self.error)

    def try_around(self, factors: Tensor, steps: Tensor) -> None:
        """Try multiples of the scale with zeros around the present one: (candidates, 1, 1) each."""
        scale, zero = self.scale, self.zero
        at_once = _candidates_at_once(self.w)
        for some, moves in zip(factors.split(at_once), steps.split(at_once), strict=True):
            if at_once == 1:
                some, moves = some[0], moves[0]
            self._take(scale * some, (zero + moves).clamp(0, self.levels.top))

    def try_fitted(self) -> None:
        """Try the scale with the least cost for the present codes: (w H v - pull v) / (v H v) with v = code - zero."""
        steps = (self.w + self.error) / self.scale
        weighted = steps @ self.own
        curvature = (steps * weighted).sum(-1, keepdim=True)
        slope = (self.w * weighted - self.pull * steps).sum(-1, keepdim=True)
        scale = slope / torch.where(curvature > 0, curvature, torch.ones_like(curvature))
        # A group of zeros has no such scale, and one much smaller belongs to other codes.
        self._take(torch.where(scale > self.scale * 0.5, scale, self.scale), self.zero)


def _candidates_at_once(w: Tensor) -> int:
    return 1 if w.device.type == "cpu" else max(1, _GPU_CHUNK // w.numel())


def _pieces(n: int, k: int, device: torch.device) -> Iterator[slice]:
    step = max(1, (_CPU_CHUNK if device.type == "cpu" else _GPU_CHUNK) // k)
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))
