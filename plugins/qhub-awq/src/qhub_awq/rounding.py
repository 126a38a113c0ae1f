"""Grids of one float16 scale and one whole zero per group, and what rounding to them costs.

All tensors are float32 and split into groups: weights (..., group), scales and zeros (..., 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Levels", "block_diagonal", "cost", "prepared"]

# float16's smallest number above zero: what a scale is at least, so that nothing is divided by 0.
_SMALLEST = 2.0**-24
# Share of a Hessian's mean diagonal that is added to its diagonal: features that never differed from zero would
# otherwise have no say in their own rounding.
_FLOOR = 1e-6


@dataclass(frozen=True)
class Levels:
    """Says which grids there are: codes 0 to ``top``, and ``zero`` where it is the same for all groups."""

    top: int = 15
    zero: int | None = None

    def spanning(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Return scales, as float16 holds them, and zeros of the grids from ``low`` (<= 0) to ``high`` (>= 0).

        Source: ``pseudo_quantize_tensor`` of autoawq 0.2.9 (awq/quantize/quantizer.py); there a symmetric grid spans
        the larger magnitude on both sides, here the lowest code is used too.
        """
        if self.zero is None:
            scale = self.stored((high - low) / self.top)
            return scale, (-low / scale).round().clamp(0, self.top)
        scale = self.stored(torch.maximum(high / (self.top - self.zero), -low / self.zero))
        return scale, torch.full_like(scale, self.zero)

    @staticmethod
    def stored(scale: Tensor) -> Tensor:
        """Return ``scale`` rounded to float16, and at least its smallest number."""
        return scale.half().float().clamp_min(_SMALLEST)

    def error(self, w: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Return the rounded weights less ``w``."""
        return (w / scale).add_(zero).round_().clamp_(0, self.top).sub_(zero).mul_(scale).sub_(w)


def prepared(hessian: Tensor) -> Tensor:
    """Return ``hessian`` (K, K) in float32 with a small floor on its diagonal; the identity if it is all zeros."""
    diagonal = hessian.diagonal().float()
    mean = diagonal.mean()
    if not bool(mean > 0):
        return torch.eye(hessian.shape[0], device=hessian.device)
    return hessian.float() + torch.diag(torch.full_like(diagonal, float(mean) * _FLOOR))


def block_diagonal(hessian: Tensor, group: int) -> Tensor:
    """Return the blocks (G, group, group) along the diagonal of ``hessian`` (K, K)."""
    count = hessian.shape[0] // group
    blocks = hessian.unflatten(0, (count, group)).unflatten(-1, (count, group))
    return blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


def cost(error: Tensor, hessian: Tensor) -> Tensor:
    """Return ``e H e^T`` of each row e of ``error`` (..., N, K): the mean squared change of the layer's outputs.

    With H the mean of x x^T over inputs x this is the mean of (e . x)^2, exactly. Shape (..., N, 1).
    """
    return ((error @ hessian) * error).sum(-1, keepdim=True)
