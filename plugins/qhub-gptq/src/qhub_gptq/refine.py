"""Codes and scales fitted to each other after GPTQ, under the whole Hessian. Nothing of it shows in the file's format.

GPTQ fixes a code once and for all when its turn comes, knowing nothing of what the later ones will be. Coordinate
descent goes over them again: with all others fixed, the best code of feature k is the grid's nearest to ``q_k + G_k /
H_kk``, with ``G = (W - Q) H`` the gradient (Behdin et al. 2023, "QuantEase", section 3; there each feature is
taken over all rows at once too). Before a group's codes, its scale: with q = s m and all else fixed, the error is
quadratic in s, and its minimum lies at ``s + (m . G) / (m H_gg m)``. Rounding that to float16 keeps the error from
growing, as the nearest float16 is at least as near to the minimum as the scale before. So no step raises
``tr((W - Q) H (W - Q)^t)`` beyond rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qhub_gptq.fused import fused_kernels
from qhub_gptq.grids import stored

__all__ = ["refine"]

_LEAF = 32
# Below it a group's codes are all at its zero and any scale fits.
_TINY = 1e-30


def refine(
    target: Tensor,
    hessian: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    group_size: int,
    largest: int,
    sweeps: int,
) -> None:
    """Change ``codes`` less zero (K, N) and ``scales`` (G, N), float32 on float16's grid, to lower the error in place.

    ``target``: (K, N), what is to be reached; ``hessian``: (K, K) damped; ``zeros``: (G, N), kept. Features lie as in
    the groups: group g is features ``g * group_size`` and on.
    """
    spread = torch.arange(target.shape[0], device=target.device) // group_size
    gradient = hessian @ (target - codes * scales[spread])
    for _ in range(sweeps):
        for group, start in enumerate(range(0, target.shape[0], group_size)):
            stop = min(start + group_size, target.shape[0])
            moved = _group(
                hessian[start:stop, start:stop], gradient[start:stop].clone(), codes[start:stop],
                scales[group], zeros[group], largest,
            )  # fmt: skip
            gradient.addmm_(hessian[:, start:stop], moved, alpha=-1)


def _group(hessian: Tensor, gradient: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, largest: int) -> Tensor:
    """Improve one group: ``codes`` (g, N) and ``scale`` (N,) in place; return the change of its weights (g, N)."""
    before = codes * scale
    curved = hessian @ codes
    step = (codes * gradient).sum(0) / (codes * curved).sum(0).clamp_min(_TINY)
    wanted = scale + step
    fitted = torch.where((wanted > 0) & (codes != 0).any(0), stored(wanted), scale)
    gradient -= (fitted - scale) * curved
    scale.copy_(fitted)
    inverse, low, high = 1 / scale, -zero, largest - zero
    kernels = fused_kernels(scale.device, scale.dtype)
    leaf = _leaf if kernels is None else kernels.descent
    for first in range(0, codes.shape[0], _LEAF):
        last = min(first + _LEAF, codes.shape[0])
        moved = torch.empty_like(codes[first:last])
        leaf(
            gradient[first:last], hessian[first:last, first:last], codes[first:last], moved,
            scale, inverse, low, high,
        )  # fmt: skip
        if last < codes.shape[0]:
            gradient[last:].addmm_(hessian[last:, first:last], moved, alpha=-1)
    return codes * scale - before


def _leaf(
    gradient: Tensor, hessian: Tensor, codes: Tensor, moved: Tensor,
    scale: Tensor, inverse: Tensor, low: Tensor, high: Tensor,
) -> None:  # fmt: skip
    """Improve the ``codes`` (features, rows) of a few features in place; ``moved``: the change of their weights."""
    rates = (1 / hessian.diagonal()).tolist()
    code = torch.empty_like(scale)
    for k, rate in enumerate(rates):
        slope = gradient[k]
        if k:
            torch.addmv(slope, moved[:k].t(), hessian[k, :k], alpha=-1, out=slope)
        torch.addcmul(codes[k], slope, inverse, value=rate, out=code).round_()
        torch.clamp(code, low, high, out=code)
        torch.sub(code, codes[k], out=moved[k]).mul_(scale)
        codes[k] = code
