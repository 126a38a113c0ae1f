"""Searches the input scales of layers that share an input: AWQ's scale search, without a forward pass.

Lin et al. 2023, "AWQ", section 3.2: weights are multiplied by s column by column, the input is divided by it, and
s = mean|x|^a is searched over a. autoawq 0.2.9 (``_compute_best_scale``, awq/quantize/quantizer.py) divides by
mean|w|^(1-a), w relative to its group's largest, takes 20 values of a from 0, and compares outputs. Here:

1. what the outputs change by is the sum of e H e^T over rows, e = Q(w s) / s - w, with H from the inputs: exact;
2. Q clips (a coarse form of :mod:`qhub_awq.clipping`), as what is stored later does;
3. beside every second one of autoawq's, the scales of :mod:`qhub_awq.noise` are candidates, in part;
4. only ratios within a group of columns matter, so each group takes the candidate that suits it.

Tied columns get one scale; groups joined by a tie decide together. s = 1 is always a candidate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from qhub.layouts import Affine, Layout
from qhub_awq.clipping import levels_of, search_grids
from qhub_awq.noise import least_noise
from qhub_awq.rounding import Levels, block_diagonal, cost, prepared

__all__ = ["candidates", "joined", "scaled_errors", "search_scales"]

# Rows that are looked at, evenly spaced over all matrices. On blocks of a 26 M parameter language model the change of
# outputs on other data, after clipping, is 0.982 of that with s = 1 with the best candidate for whole layers, 0.987
# where groups decide by 256 rows (too few: noise picks), 0.980 by 1024 and 0.980 by all.
_ROWS = 1024
# There autoawq's family alone reaches 0.992.
_EXPONENTS = tuple(step / 10 for step in range(1, 10))
# Larger powers and whole steps do worse there (0.99 to 1.00 at a power of 24): clipping cuts what they spare.
_POWERS = (4.0, 8.0)
_PARTS = (0.25, 0.5, 0.75)
# A coarse clipping search, both ends alike: with each end on its own the choices are no better.
_RANGES = tuple((kept, kept) for kept in (1.0, 0.9, 0.8, 0.7))
_SMALLEST = 1e-4


def search_scales(
    weights: Mapping[str, Tensor], layouts: Mapping[str, Layout], statistics: Mapping[str, Tensor], tied: Tensor | None
) -> Tensor | None:
    """Return s (K,) float32 for the layers of ``layouts``; None where 1 is best.

    ``weights``: (N_i, K) by name; ``statistics``: ``hessian`` (K, K), ``mean_abs`` (K,), ``tokens``; ``tied``: (K,)
    int64 or None. Layers whose input was never seen get no scales.
    """
    layout = next(iter(layouts.values()))
    assert isinstance(layout, Affine)
    if int(statistics["tokens"]) == 0:
        return None
    w = _sample([weights[name] for name in layouts]).unflatten(-1, (-1, layout.grid.cols))
    hessian, levels = prepared(statistics["hessian"]), levels_of(layout)
    owner = joined(tied, w.shape[1], w.shape[2], w.device)
    best = torch.full((w.shape[1],), torch.inf, device=w.device)
    chosen = torch.ones(w.shape[1:], device=w.device)
    for s in candidates(w, hessian, statistics["mean_abs"].float(), tied):
        costs = _costs_by_group(w, hessian, s, levels)
        costs = torch.zeros_like(costs).index_add_(0, owner, costs)[owner]
        better = costs < best
        best, chosen = torch.where(better, costs, best), torch.where(better.unsqueeze(-1), s, chosen)
    chosen = _normalised(chosen, owner)
    ones = torch.ones_like(chosen)
    # Groups decided for themselves; together, with what their errors have in common, they must still do better than 1.
    if not bool(_cost_of_all(w, hessian, chosen, levels) < _cost_of_all(w, hessian, ones, levels)):
        return None
    return chosen.flatten()


def candidates(w: Tensor, hessian: Tensor, mean_abs: Tensor, tied: Tensor | None) -> Iterator[Tensor]:
    """Yield scales (G, group) to try for ``w`` (N, G, group), 1 first; ties are kept."""
    yield torch.ones(w.shape[1:], device=w.device)
    # The weights' part as in autoawq: magnitudes relative to the group's largest, mean over rows.
    relative = (w.abs() / (w.abs().amax(-1, keepdim=True) + 1e-6)).mean(0)
    size = mean_abs.view_as(relative)
    for exponent in _EXPONENTS:
        scale = size.clamp_min(_SMALLEST) ** exponent / (relative + _SMALLEST) ** (1 - exponent)
        yield _tied_mean(scale.clamp_min(_SMALLEST).log(), tied).exp()
    for power in _POWERS:
        log_s = least_noise(w, hessian.diagonal().view_as(relative), power, tied)
        for part in _PARTS:
            yield (log_s * part).exp()


def scaled_errors(w: Tensor, hessian: Tensor, s: Tensor, levels: Levels) -> tuple[Tensor, Tensor]:
    """Return the errors (N, G, group) of ``w * s`` on grids found for them, and the Hessian of the input over s."""
    scaled, by_scale = w * s, hessian / (s.flatten()[:, None] * s.flatten())
    return levels.error(scaled, *search_grids(scaled, by_scale, levels, _RANGES)), by_scale


def joined(tied: Tensor | None, count: int, group: int, device: torch.device) -> Tensor:
    """Return for each of ``count`` groups of columns the first group that it is joined to by ties, (count,) int64."""
    owner = torch.arange(count, device=device)
    if tied is None:
        return owner
    column_group = torch.arange(count * group, device=device) // group
    while True:
        firsts = torch.full((int(tied.max()) + 1,), count, device=device)
        firsts = firsts.scatter_reduce(0, tied, owner[column_group], "amin")
        found = owner.scatter_reduce(0, column_group, firsts[tied], "amin")
        if torch.equal(found, owner):
            return owner
        owner = found


def _sample(matrices: list[Tensor]) -> Tensor:
    total = sum(matrix.shape[0] for matrix in matrices)
    step = max(1.0, total / _ROWS)
    picked, start, index = [], 0, 0.0
    for matrix in matrices:
        rows = []
        while int(index) < start + matrix.shape[0]:
            rows.append(int(index) - start)
            index += step
        picked.append(matrix[torch.tensor(rows, dtype=torch.int64, device=matrix.device)].float())
        start += matrix.shape[0]
    return torch.cat(picked)


def _costs_by_group(w: Tensor, hessian: Tensor, s: Tensor, levels: Levels) -> Tensor:
    errors, by_scale = scaled_errors(w, hessian, s, levels)
    return cost(errors.transpose(0, 1), block_diagonal(by_scale, w.shape[-1])).sum((-2, -1))


def _cost_of_all(w: Tensor, hessian: Tensor, s: Tensor, levels: Levels) -> Tensor:
    errors, by_scale = scaled_errors(w, hessian, s, levels)
    return cost(errors.flatten(1), by_scale).sum()


def _tied_mean(log_s: Tensor, tied: Tensor | None) -> Tensor:
    if tied is None:
        return log_s
    size = int(tied.max()) + 1
    totals = torch.zeros(size, device=log_s.device).index_add_(0, tied, log_s.flatten())
    return (totals / torch.bincount(tied, minlength=size).clamp_min(1))[tied].view_as(log_s)


def _normalised(s: Tensor, owner: Tensor) -> Tensor:
    """Return ``s`` (G, group) over the root of its largest times its smallest, for groups that belong together.

    A common factor changes no rounding; autoawq takes the same one, over all columns.
    """
    log_s = s.log()
    high = torch.full_like(log_s[:, 0], -torch.inf).scatter_reduce(0, owner, log_s.amax(-1), "amax")[owner]
    low = torch.full_like(log_s[:, 0], torch.inf).scatter_reduce(0, owner, log_s.amin(-1), "amin")[owner]
    return (log_s - ((high + low) / 2).unsqueeze(-1)).exp()
