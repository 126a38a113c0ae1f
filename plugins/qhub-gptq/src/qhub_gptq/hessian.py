"""The input's second moments, made fit for solving: dead features, damping, order of features, unit factor."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qhub.errors import LayoutError

__all__ = ["Damping", "Order", "damped", "feature_order", "prepare", "unit_factor"]

Order = Literal["natural", "groups", "features"]

# Damping beyond the mean of the diagonal leaves nothing of what the data said.
_MOST_DAMPING = 1.0


def prepare(hessian: Tensor) -> Tensor:
    """Return a copy of ``hessian`` (K, K) in float32 with the diagonal of dead features filled in.

    A feature is dead when its diagonal entry is 0: no token had it, so rounding it costs nothing that can be measured.
    It gets the mean of the others' entries; being uncorrelated with all, it is then rounded to nearest and changes
    nothing else. (The authors' code and gptqmodel set such weights to 0 as well. Here they stay, for inputs that the
    calibration text did not show.) Raises :class:`LayoutError` on NaN, infinity or a negative diagonal entry.
    """
    hessian = hessian.to(torch.float32, copy=True)
    diagonal = hessian.diagonal()
    if not bool(torch.isfinite(hessian).all()) or bool((diagonal < 0).any()):
        raise LayoutError(
            f"the Hessian of {hessian.shape[0]} input features holds NaN, infinity or a negative diagonal entry: "
            "activations overflow. Calibrate in bfloat16 or float32, or look for the sample that does it"
        )
    dead = diagonal == 0
    live = (~dead).sum().clamp_min(1)
    mean = diagonal.sum() / live
    diagonal.copy_(torch.where(dead, torch.where(mean > 0, mean, torch.ones_like(mean)), diagonal))
    return hessian


def feature_order(diagonal: Tensor, group_size: int, order: Order) -> Tensor | None:
    """Return the order (K,) int64 in which features are quantized, from the ``diagonal`` (K,) of the Hessian.

    ``"features"``: by falling diagonal, called act-order or desc_act (GPTQ's published code). ``"groups"``: whole
    groups by their largest entry, and within each by falling diagonal, the shorter last group at the end; so that each
    group stays where it is in the file (group aware reordering: Gafni et al. 2025, "Dual Precision Quantization",
    as in gptqmodel 7.7, gptqmodel/quantization/gar.py). ``"natural"``: None.
    """
    if order == "natural":
        return None
    if order == "features":
        return torch.argsort(diagonal, descending=True, stable=True)
    whole = diagonal.shape[0] // group_size * group_size
    values, inner = diagonal[:whole].reshape(-1, group_size).sort(dim=1, descending=True, stable=True)
    outer = torch.argsort(values[:, 0], descending=True, stable=True)
    first = torch.arange(0, whole, group_size, device=diagonal.device)
    tail = torch.arange(whole, diagonal.shape[0], device=diagonal.device)
    return torch.cat([(inner + first[:, None])[outer].reshape(-1), tail])


@dataclass(frozen=True)
class Damping:
    """Says what is added to the diagonal: ``percent`` of its mean; ``increment``: 0 forbids to raise it on failure."""

    percent: float
    increment: float


def damped(hessian: Tensor, percent: float) -> Tensor:
    """Return ``hessian`` with ``percent`` of its mean diagonal entry added to the diagonal (GPTQ, section 3.3)."""
    result = hessian.clone()
    result.diagonal().add_(percent * hessian.diagonal().mean())
    return result


def unit_factor(hessian: Tensor, damping: Damping) -> Tensor | None:
    """Return the unit upper triangular T (K, K) float32 with (H + damping)^-1 = T^t D T; None when there is none.

    Row i of T says how the error of feature i is spread over the later ones: it is row i of the paper's factor
    Cholesky(H^-1)^t over its diagonal entry (Frantar et al. 2022, "GPTQ", algorithm 1 and section 3.3 step 3). Here H =
    R R^t with R upper triangular (a Cholesky factorization from the last feature to the first), T is the inverse of R
    with its columns scaled to a unit diagonal: one factorization and one triangular solve, no inverse of H.

    Where the factorization fails, the damping is doubled (from ``increment`` at least) up to the mean of the diagonal,
    with a warning; gptqmodel adds ``increment`` each time.
    """
    size = hessian.shape[0]
    percent, first = damping.percent, damping.percent
    while True:
        lower, info = torch.linalg.cholesky_ex(damped(hessian, percent).flip(0, 1))
        if int(info) == 0:
            upper = lower.flip(0, 1)
            unit = torch.linalg.solve_triangular(
                upper / upper.diagonal(),
                torch.eye(size, dtype=hessian.dtype, device=hessian.device),
                upper=True,
                unitriangular=True,
            )
            if bool(torch.isfinite(unit).all()):
                if percent != first:
                    warnings.warn(
                        f"the Hessian of {size} input features could be factored only with damp_percent={percent:g} "
                        f"instead of {first:g}: more or longer calibration samples make this unnecessary",
                        stacklevel=2,
                    )
                return unit
        if damping.increment <= 0 or percent >= _MOST_DAMPING:
            return None
        percent = min(max(2 * percent, damping.increment), _MOST_DAMPING)
