"""The numbers of HQQ: min/max scales, then zeros fitted by half-quadratic splitting. No calibration data.

Method: Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023): find the zeros z that
minimize ``|| W - s (Q(W) - z) ||_p^p`` with p = 0.7, by splitting off the error ``W_e`` and alternating two steps with
closed forms. Choices of detail follow hqq 0.2.8 (``hqq/core/quantize.py``, ``Quantizer.quantize``, and
``hqq/core/optimize.py``, ``optimize_weights_proximal_legacy``, its default), so that the same numbers come out: they
depend on the order of the float32 operations.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qhub.errors import LayoutError
from qhub.layouts import Affine, Layout
from qhub_hqq.settings import Settings, code_shape

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["quantize", "shrink"]

# The paper raises beta by a factor kappa in each iteration; hqq's default optimizer has that parameter and never uses
# it.
_P, _BETA, _ITERATIONS = 0.7, 10.0, 20
# Groups narrower than this get the scale 1, and no step is finer than 1 / 2e4: float16 could not hold their zeros.
_NARROW, _FINEST = 1e-4, 2e4


def quantize(weight: Tensor, layout: Layout, settings: Settings) -> Mapping[str, Tensor]:
    """Return the parts ``qweight``, ``scales`` and ``zeros`` of ``layout`` for ``weight`` (N, K) of any float dtype.

    Computed in float32 on every device (hqq itself uses float16 on CUDA); scales and zeros are then rounded to the
    weight's dtype, hqq's ``compute_dtype``. Raises :class:`LayoutError` when the weight, or a zero in that dtype, is
    not finite.
    """
    assert isinstance(layout, Affine)
    dtype = weight.dtype if weight.dtype in (torch.float16, torch.bfloat16) else torch.float32
    w = weight.detach().float().reshape(code_shape(layout))
    if not bool(torch.isfinite(w).all()):
        raise LayoutError(f"the weight of {layout.out_features}x{layout.in_features} to quantize holds NaN or infinity")
    with torch.no_grad():
        codes, scale, zero = _numbers(w, settings, 2**layout.bits - 1)
    scale, zero = scale.to(dtype), zero.to(dtype)
    if not bool(torch.isfinite(zero).all()):
        raise LayoutError(
            f"a zero point of the {layout.out_features}x{layout.in_features} weight exceeds {dtype}: its groups are "
            "narrow and far from 0. Load the model in bfloat16 or float32, or list the module in skip_modules"
        )
    shape = layout.scale_shape
    return {
        "qweight": layout.pack_codes(codes.reshape(layout.out_features, layout.in_features)),
        "scales": scale.reshape(shape).contiguous(),
        "zeros": zero.reshape(shape).contiguous(),
    }


def _numbers(w: Tensor, settings: Settings, largest: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes of w's shape, scales and zeros, in float32, for ``w`` whose rows or columns are groups."""
    axis = settings.axis
    if settings.channel_wise:
        low, high = w.min(axis, keepdim=True).values, w.max(axis, keepdim=True).values
    else:
        low, high = w.min(), w.max()
    width = high - low
    # Steps per unit of weight: the inverse of the scale that is stored.
    rate = largest / width
    rate = torch.where(width.abs() <= _NARROW, torch.ones_like(rate), rate).clamp(max=_FINEST)
    zero = -low * rate
    if settings.round_zero:
        zero = zero.round()
    if settings.optimize and settings.channel_wise:
        zero = _fit_zeros(w, rate, zero, axis, lambda z: _codes(w, rate, z, largest))
    return _codes(w, rate, zero, largest), 1.0 / rate, zero


def _codes(w: Tensor, rate: Tensor, zero: Tensor, largest: int) -> Tensor:
    return (w * rate).add_(zero).round_().clamp_(0, largest)


def _fit_zeros(w: Tensor, rate: Tensor, zero: Tensor, axis: int, codes: Callable[[Tensor], Tensor]) -> Tensor:
    """Return zeros that lower ``|| w - (q - zero) / rate ||_p``, for q the codes under them.

    One iteration: codes q and error under the present zeros; split off the large errors W_e (:func:`shrink`); the zeros
    that fit the rest are ``mean(q - (w - W_e) * rate)`` (paper, section "sub-problem 2"). Ends as soon as the mean
    absolute error of the whole matrix does not fall.
    """
    best: Tensor | None = None
    for _ in range(_ITERATIONS):
        q = codes(zero)
        error = w - (q - zero).div_(rate)
        mean = error.abs().mean()
        kept = w - shrink(error, _BETA, _P)
        zero = q.sub_(kept.mul_(rate)).mean(axis, keepdim=True)
        if best is not None and not bool(mean < best):
            break
        best = mean
    return zero


def shrink(x: Tensor, beta: float, p: float) -> Tensor:
    """Return the generalized soft threshold ``sign(x) * relu(|x| - |x|**(p-1) / beta)``.

    Source: Badri and Shaji 2023, "sub-problem 1", after Badri and Yahia, "A Non-Local Low-Rank Approach to Enforce
    Integrability" (2016); ``shrink_lp_op`` in hqq/core/optimize.py. 0 stays 0: its power is infinite.
    """
    out = x.abs()
    out.sub_(out.pow(p - 1).mul_(1.0 / beta)).clamp_min_(0.0)
    return out.mul_(x.sign())
