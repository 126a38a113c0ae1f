"""Scales and zeros by half-quadratic splitting, as torchao's configs offer them.

Sources: Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models", eqs. 2 to 4, as set up in
torchao 0.18, ``_choose_qparams_and_quantize_affine_hqq`` and ``_choose_qparams_and_quantize_scale_only_hqq``
(quantization/quant_primitives.py). Everything in float32 (torchao computes the former in float16 on a GPU).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["scale_and_zero", "scale_only"]

_SWEEPS = 20
_NORM, _BETA, _KAPPA = 0.7, 10.0, 1.01


def scale_and_zero(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes 0 to 15, scales and zeros for ``groups`` (..., G, size), with w = scale * (q - 8) + zero."""
    w = groups.float()
    low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    steps = (15 / (high - low)).clamp(max=2e4)
    zero = torch.round(-low * steps)
    beta, best = _BETA, 1e4
    for _ in range(_SWEEPS):
        q = torch.round(w * steps + zero).clamp(0, 15)
        off = w - (q - zero) / steps
        shrunk = torch.sign(off) * torch.relu(off.abs() - off.abs().pow(_NORM - 1) / beta)
        zero = torch.mean(q - (w - shrunk) * steps, dim=-1, keepdim=True)
        beta *= _KAPPA
        error = float(off.abs().mean())
        if error >= best:
            break
        best = error
    q = torch.round(w * steps + zero).clamp(0, 15)
    scale = 1.0 / steps
    return q, scale.squeeze(-1), ((8 - zero) * scale).squeeze(-1)


def scale_only(groups: Tensor, code_range: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return codes and scales for ``groups`` (..., G, size), with w = scale * q: codes and least squares in turn."""
    low, high = code_range
    eps = torch.finfo(torch.float32).eps
    w = groups.float()
    scale = (w.abs().amax(-1) / max(abs(low), abs(high))).clamp_min(eps)
    before = scale
    for _ in range(_SWEEPS):
        q = (w / scale.unsqueeze(-1)).round().clamp(low, high)
        norm = (q * q).sum(-1)
        scale = torch.where(norm > 0, (w * q).sum(-1) / norm, before).clamp_min(eps)
        if float(((scale - before).abs() / before.clamp_min(eps)).max()) < 1e-5:
            break
        before = scale
    return (w / scale.unsqueeze(-1)).round().clamp(low, high), scale
