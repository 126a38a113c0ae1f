"""The 4-bit weights with float zeros: ``w = scale * (q - 8) + zero`` with q from 0 to 15.

Sources: torchao 0.18, ``_choose_qparams_affine_tinygemm`` and ``_quantize_affine_tinygemm``
(quantization/quant_primitives.py) for tinygemm's tiles; FBGEMM's ``int4_row_quantize_zp`` and ``int4_row_quantize``
(fbgemm_gpu/experimental/gen_ai/quantize.py), which mslk took over, for the plain ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["plain", "plain_symmetric", "tinygemm"]

_LEAST = 1e-6


def plain(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes, scales and zeros (float32) for ``groups`` (..., G, size): the range of each group, in float32."""
    groups = groups.float()
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = (high - low).clamp(min=_LEAST) / 15
    q = ((groups - low) / scale).round().clamp(0, 15)
    return q, scale.squeeze(-1), (low + scale * 8).squeeze(-1)


def plain_symmetric(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes, scales and zeros of 0 for ``groups``: absmax becomes code -8 or, clipped, 7. For float8 inputs."""
    groups = groups.float()
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=_LEAST) / 8
    q = (groups / scale).round().clamp(-8, 7) + 8
    return q, scale.squeeze(-1), torch.zeros_like(scale).squeeze(-1)


def tinygemm(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes, scales and zeros for ``groups`` bfloat16 (..., G, size), all computed in bfloat16."""
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = ((high - low) / 15.0).clamp(min=torch.finfo(groups.dtype).smallest_normal)
    zero = low + scale * 8.0
    q = torch.round((groups - (zero - scale * 8.0)) / scale).clamp(0, 15)
    return q, scale.squeeze(-1), zero.squeeze(-1)
