"""A smooth estimate of what rounding costs under input scales s, and the scales that minimise it.

Rounding to nearest is noise of variance step^2 / 12, the same for all weights of a group; behind the scales its share
of the output is H_jj / s_j^2 for column j. The step follows the group's range, for which the p-norm of its scaled
weights stands. So the cost of a group is proportional to

    (mean over rows of ||w * s||_p^2) * (sum over its columns of H_jj / s_j^2)

which Lin et al. 2023, "AWQ", section 3.2 argue with for one column. Where its derivative by log s_j vanishes, column j
has the same share A_j of the first sum (weighted by row) and B_j of the second one. A_j grows like s_j^p and B_j falls
like s_j^-2, so the step (log B_j - log A_j) / (p + 2) of log s_j leads there.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["least_noise", "noise"]

_STEPS = 30
# Smallest share of a group's mean of H_jj that a column counts with: keeps scales of idle columns finite.
_FLOOR = 1e-4
_TINY = 1e-30


def least_noise(w: Tensor, diagonal: Tensor, power: float, tied: Tensor | None) -> Tensor:
    """Return log s (G, group) with the least :func:`noise`, of mean 0 over each group's columns.

    ``w`` (N, G, group) float32; ``diagonal`` (G, group): of the Hessian, not negative; ``power``: p, the larger the
    more the largest weight of a group decides; ``tied``: (G * group,) int64, columns with equal numbers get equal
    scales.
    """
    size = w / w.abs().amax(-1, keepdim=True).clamp_min(_TINY)
    heights = w.abs().amax(-1)
    weight = _floored(diagonal)
    log_s = torch.zeros_like(weight)
    for _ in range(_STEPS):
        range_share, error_share = _shares(size, heights, weight, log_s, power)
        range_share, error_share = _summed(range_share, tied), _summed(error_share, tied)
        step = (error_share.clamp_min(_TINY).log() - range_share.clamp_min(_TINY).log()) / (power + 2)
        log_s = log_s + step.clamp(-1, 1)
        if tied is None:
            log_s = log_s - log_s.mean(-1, keepdim=True)
    return log_s - log_s.mean(-1, keepdim=True) if tied is None else log_s - log_s.mean()


def noise(w: Tensor, diagonal: Tensor, log_s: Tensor, power: float) -> Tensor:
    """Return the estimate (G,) that :func:`least_noise` minimises."""
    reach = (w.abs() * log_s.exp()).pow(power).sum(-1).pow(2 / power).mean(0)
    return reach * (_floored(diagonal) * (-2 * log_s).exp()).sum(-1)


def _floored(diagonal: Tensor) -> Tensor:
    return torch.maximum(diagonal, _FLOOR * diagonal.mean(-1, keepdim=True)).clamp_min(_TINY)


def _shares(size: Tensor, heights: Tensor, weight: Tensor, log_s: Tensor, power: float) -> tuple[Tensor, Tensor]:
    """Return A and B (G, group), each of sum 1 over a group; ``size``: weights over their group's ``heights``."""
    powers = (size.abs() * (log_s - log_s.amax(-1, keepdim=True)).exp()).pow(power)
    reach = powers.sum(-1, keepdim=True).clamp_min(_TINY)
    by_column = (powers * (reach.pow(2 / power - 1) * heights.unsqueeze(-1).square())).sum(0)
    errors = weight * (-2 * (log_s - log_s.amin(-1, keepdim=True))).exp()
    return tuple(part / part.sum(-1, keepdim=True).clamp_min(_TINY) for part in (by_column, errors))  # type: ignore[return-value]


def _summed(shares: Tensor, tied: Tensor | None) -> Tensor:
    if tied is None:
        return shares
    totals = torch.zeros(int(tied.max()) + 1, device=shares.device).index_add_(0, tied, shares.flatten())
    return totals[tied].view_as(shares)
