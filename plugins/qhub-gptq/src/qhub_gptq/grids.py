"""The scale and zero of each group: the range of its weights, or what costs least under the Hessian's diagonal.

Weights are held transposed, (features, rows), so that one feature of all rows lies side by side in memory. Scales are
rounded to float16, the dtype of the file, before any code is chosen.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Codes", "ranged", "searched", "stored"]

# The smallest and largest positive float16.
_SMALLEST, _LARGEST = 2.0**-24, 65504.0

# Fractions of a group's range that the search tries as the grid's width: 40, evenly spaced. Above 1, because a grid a
# little wider than the range can lie better.
_WIDEST, _NARROWEST, _STEPS = 1.05, 0.3, 40
# Rounded weights that a GPU holds at a time, 300 MB: all 40 widths of most groups together, as small pieces leave it
# idle. A CPU takes one width after the other, which stays in its caches.
_GPU_PIECE = 40 * 128 * 14336


@dataclass(frozen=True)
class Codes:
    """Says which codes there are: ``bits`` 1 to 8; ``symmetric``: the zero is 2^(bits-1) in every group."""

    bits: int
    symmetric: bool

    @property
    def largest(self) -> int:
        """Return the largest code."""
        return 2**self.bits - 1

    @property
    def middle(self) -> float:
        """Return the zero of symmetric groups."""
        return float(2 ** (self.bits - 1))


def stored(scale: Tensor) -> Tensor:
    """Return positive float32 scales as the file will hold them: rounded to float16, above 0."""
    return scale.clamp(_SMALLEST, _LARGEST).half().float()


def ranged(weight: Tensor, codes: Codes) -> tuple[Tensor, Tensor]:
    """Return scale and zero, (rows,) float32 each, that span one group ``weight`` (features, rows) and 0.

    Source: ``Quantizer.find_params`` of the authors' code and of gptqmodel 7.7 (gptqmodel/quantization/quantizer.py).
    """
    low, high = weight.amin(0).clamp_max(0), weight.amax(0).clamp_min(0)
    if codes.symmetric:
        # Twice the larger side, unless no weight is negative.
        width = torch.maximum(high, -low) * torch.where(low < 0, 2.0, 1.0)
    else:
        width = high - low
    scale = stored(_nonzero(width) / codes.largest)
    if codes.symmetric:
        return scale, torch.full_like(scale, codes.middle)
    return scale, (-low / scale).round().clamp(0, codes.largest)


def searched(weight: Tensor, importance: Tensor, codes: Codes) -> tuple[Tensor, Tensor]:
    """Return scale and zero, (rows,) float32 each, of one group ``weight`` (features, rows).

    They are those with the least ``sum_k importance_k (w_k - rounded w_k)^2`` among 40 widths of the grid, each, where
    the zero is free, with the two zeros that put its middle next to that of the weights. ``importance`` (features,):
    the diagonal of the Hessian, so the sum is the layer's output error but for the features' correlations (as the
    search for clipping ranges in Lin et al. 2023, "AWQ", section 3.2 and its published code, without the products).
    """
    low, high = weight.amin(0).clamp_max(0), weight.amax(0).clamp_min(0)
    widest = 2 * torch.maximum(high, -low) if codes.symmetric else high - low
    widest = _nonzero(widest) / codes.largest
    middle = (low + high) / 2
    shares = _shares(weight.device, weight.dtype)
    scale = zero = torch.zeros_like(widest)
    least = torch.full_like(widest, torch.inf)
    at_once = _widths_at_once(weight)
    if at_once > 1:
        shares, weight = shares.view(-1, at_once, 1), weight[:, None].expand(-1, at_once, -1)
    rounded, error = (torch.empty(weight.shape, dtype=weight.dtype, device=weight.device) for _ in range(2))
    for some in shares:
        tried = stored(widest * some)
        inverse = 1 / tried
        if codes.symmetric:
            zeros = [torch.full_like(tried, codes.middle)]
        else:
            ideal = codes.largest / 2 - middle * inverse
            zeros = [one.clamp(0, codes.largest) for one in (ideal.floor(), ideal.ceil())]
        for one in zeros:
            torch.mul(weight, inverse, out=rounded).round_()
            torch.clamp(rounded, -one, codes.largest - one, out=rounded)
            torch.addcmul(weight, rounded, tried, value=-1, out=error).square_()
            cost = (importance @ error.flatten(1)).view_as(tried)
            kept, centre = tried, one
            if at_once > 1:
                # Of equal costs the first, which one width after the other would find too.
                first = cost.argmin(0, keepdim=True)
                cost, kept, centre = (value.gather(0, first)[0] for value in (cost, tried, one))
            better = cost < least
            least = torch.where(better, cost, least)
            scale, zero = torch.where(better, kept, scale), torch.where(better, centre, zero)
    return scale, zero


@functools.cache
def _shares(device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the fractions (steps,) that are tried; made once, as a GPU would wait for each copy."""
    shares = [_WIDEST - (_WIDEST - _NARROWEST) * step / (_STEPS - 1) for step in range(_STEPS)]
    return torch.tensor(shares, device=device, dtype=dtype)


def _widths_at_once(weight: Tensor) -> int:
    """Return how many widths are tried at a time, a divisor of their number."""
    if weight.device.type == "cpu":
        return 1
    return max((n for n in range(1, _STEPS + 1) if _STEPS % n == 0 and n * weight.numel() <= _GPU_PIECE), default=1)


def _nonzero(width: Tensor) -> Tensor:
    """Return ``width`` with 2 for 0: a group of zeros takes any scale."""
    return torch.where(width == 0, 2.0, width)
