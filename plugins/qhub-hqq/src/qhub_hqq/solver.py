"""The numbers of HQQ: min/max scales, then zeros fitted by half-quadratic splitting. No calibration data.

Method: Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023): find the zeros z that
minimize ``|| W - s (Q(W) - z) ||_p^p`` with p = 0.7, by splitting off the error ``W_e`` and alternating two steps with
closed forms. Choices of detail follow hqq 0.2.8 (``hqq/core/quantize.py``, ``Quantizer.quantize``, and
``hqq/core/optimize.py``, ``optimize_weights_proximal_legacy``, its default), so that the same numbers come out: they
depend on the order of the float32 operations.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qhub.errors import LayoutError
from qhub.layouts import Affine, Layout
from qhub.layouts.chunks import all_finite, row_chunks
from qhub_hqq.settings import Settings, code_shape

__all__ = ["quantize", "shrink"]

# The paper raises beta by a factor kappa in each iteration; hqq's default optimizer has that parameter and never uses
# it.
_P, _BETA, _ITERATIONS = 0.7, 10.0, 20
# Columns that torch's sum takes at once, on the widest CPU vectors: four of sixteen float32.
_VECTOR = 64
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
    w = weight.detach().reshape(code_shape(layout))
    if not all_finite(w):
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
    """Return codes uint8 of w's shape, scales and zeros in float32, for ``w`` whose rows or columns are groups."""
    axis, pieces = settings.axis, _pieces(w, settings.axis)
    if settings.channel_wise:
        ends = [
            (one.min(axis, keepdim=True).values, one.max(axis, keepdim=True).values)
            for one in map(w.__getitem__, pieces)
        ]
        low, high = (torch.cat(end, 1 - axis).float() for end in zip(*ends, strict=True))
    else:
        low, high = w.min().float(), w.max().float()
    width = high - low
    # Steps per unit of weight: the inverse of the scale that is stored.
    rate = largest / width
    rate = torch.where(width.abs() <= _NARROW, torch.ones_like(rate), rate).clamp(max=_FINEST)
    zero = -low * rate
    if settings.round_zero:
        zero = zero.round()
    if settings.optimize and settings.channel_wise:
        zero = _fit_zeros(w, rate, zero, axis, largest)
    codes = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
    for piece in pieces:
        own = (one[piece] if one.ndim else one for one in (rate, zero))
        codes[piece] = _codes(w[piece].float(), *own, largest)
    return codes, 1.0 / rate, zero


def _pieces(w: Tensor, axis: int) -> list[tuple[slice, slice]]:
    """Return indices that cut ``w``, and what has one entry per group, into pieces of whole groups."""
    rows, columns = w.shape
    if axis == 1:
        return [(piece, slice(None)) for piece in row_chunks(rows, columns, w.device)]
    # torch sums columns side by side in vectors, and what is left over in another order: pieces end where vectors do.
    return [(slice(None), piece) for piece in row_chunks(columns, rows, w.device, _VECTOR * rows)]


def _codes(w: Tensor, rate: Tensor, zero: Tensor, largest: int) -> Tensor:
    return (w * rate).add_(zero).round_().clamp_(0, largest)


def _fit_zeros(w: Tensor, rate: Tensor, zero: Tensor, axis: int, largest: int) -> Tensor:
    """Return zeros that lower ``|| w - (q - zero) / rate ||_p``, for q the codes under them.

    One iteration: codes q and error under the present zeros; split off the large errors W_e (:func:`shrink`); the zeros
    that fit the rest are ``mean(q - (w - W_e) * rate)`` (paper, section "sub-problem 2"). Ends as soon as the mean
    absolute error of the whole matrix does not fall.
    """
    # Groups are independent but for that end. Their errors are kept for one sum over all, as hqq has it: a sum of sums
    # is rounded otherwise, and might end an iteration earlier or later.
    errors = torch.empty(w.shape, dtype=torch.float32, device=w.device)
    zero, pieces = zero.clone(), _pieces(w, axis)
    best: Tensor | None = None
    for _ in range(_ITERATIONS):
        for piece in pieces:
            own, step = w[piece].float(), rate[piece]
            q = _codes(own, step, zero[piece], largest)
            error = own - (q - zero[piece]).div_(step)
            errors[piece] = error.abs()
            kept = own - shrink(error, _BETA, _P)
            zero[piece] = q.sub_(kept.mul_(step)).mean(axis, keepdim=True)
        mean = errors.mean()
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
