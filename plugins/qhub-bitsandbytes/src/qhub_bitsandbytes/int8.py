"""Chooses the int8 codes of LLM.int8(): absmax per row, as bitsandbytes chooses them.

Sources: LLM.int8() (Dettmers et al. 2022), eq. 1 to 3; bitsandbytes 0.50.2, ``nn/modules.py``
(``Int8Params._quantize`` casts to float16 first) and ``backends/default/ops.py`` (``int8_vectorwise_quant``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from qhub.errors import LayoutError
from qhub.layouts.chunks import all_finite, row_chunks

__all__ = ["quantize_rows"]


def quantize_rows(weight: Tensor) -> dict[str, Tensor]:
    """Return ``qweight`` (N, K) int8 and ``scales`` (N, 1) float32, the row's absmax, for ``weight`` (N, K).

    The weight may be of any float dtype. Raises :class:`LayoutError` if a value is NaN, infinite, or beyond the
    range of float16.
    """
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    absmax = torch.empty(weight.shape[0], 1, dtype=torch.float32, device=weight.device)
    for rows in row_chunks(weight.shape[0], weight.shape[1], weight.device):
        codes[rows], absmax[rows] = _quantize(weight[rows])
    return {"qweight": codes, "scales": absmax}


def _quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    half = weight.to(torch.float16)
    if not all_finite(half):
        raise LayoutError(
            "the weight holds NaN, infinity or magnitudes above 65,504: LLM.int8() quantizes float16 weights. "
            "Leave this module out with llm_int8_skip_modules, or quantize to 4 bits"
        )
    absmax = half.abs().amax(dim=1, keepdim=True).float()
    # A row of zeros has codes 0 under a scale of 0; without the clamp they would be 0 * infinity.
    step = 127.0 / absmax.clamp_min(torch.finfo(torch.float32).tiny)
    return torch.round(half * step).to(torch.int8), absmax
