"""Scales and codes of float8 weights as torchao chooses them.

Source: torchao 0.18, ``_choose_scale_float8`` and ``_quantize_affine_float8`` (quantization/quant_primitives.py): the
largest magnitude of a group goes to the format's, the scale is computed in the weight's dtype and kept in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["rounded", "scales_of"]


def scales_of(absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """Return float32 scales for groups with the magnitudes ``absmax``, above 0 everywhere.

    torchao divides by 0 for a group of zeros, and by what underflowed in float16: there the scale is 1, or computed in
    float32.
    """
    top = torch.finfo(dtype).max
    scale = (absmax / top).float()
    scale = torch.where(scale == 0, absmax.float() / top, scale)
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def rounded(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the codes of ``weight`` under ``scale`` float32, which broadcasts against it."""
    top = torch.finfo(dtype).max
    return (weight.float() / scale).clamp(-top, top).to(dtype)
