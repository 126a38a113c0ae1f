"""The numbers that EETQ chooses: codes and one scale for each output channel.

Source: EETQ 1.0.1, ``csrc/cutlass_kernels/cutlass_preprocessors.cc`` (``symmetric_quantize``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from qhub.errors import LayoutError
from qhub.layouts.chunks import row_chunks

__all__ = ["quantize_rows"]


def quantize_rows(weight: Tensor) -> dict[str, Tensor]:
    """Return ``qweight`` (N, K) int8 and ``scales`` (N, 1) float16 for ``weight`` (N, K) of any float dtype.

    The scale is a row's largest magnitude over 128. Codes are the quotients under the scale before it is rounded to
    float16, halves away from zero, within -128 ... 127; so the largest magnitude, if it is positive, loses a step.
    Rows whose scale is 0 in float16 get codes of 0; upstream's have 127 there, which stands for the same. Raises
    :class:`LayoutError` for a row too large for a float16 scale.
    """
    n, k = weight.shape
    qweight = torch.empty(n, k, dtype=torch.int8, device=weight.device)
    scales = torch.empty(n, 1, dtype=torch.float16, device=weight.device)
    for rows in row_chunks(n, k, weight.device):
        w = weight[rows].float()
        scale = w.abs().amax(dim=-1, keepdim=True) / 128
        scales[rows] = scale.to(torch.float16)
        nothing = scales[rows] == 0
        ratio = w / torch.where(nothing, torch.ones_like(scale), scale)
        codes = _half_away_from_zero(ratio).clamp_(-128, 127)
        qweight[rows] = codes.masked_fill_(nothing, 0).to(torch.int8)
    if not bool(torch.isfinite(scales).all()):
        raise LayoutError(
            f"a row's largest magnitude of {float(weight.abs().max()):.3g} needs a scale beyond float16, in which EETQ "
            "keeps its scales: list the module in modules_to_not_convert"
        )
    return {"qweight": qweight, "scales": scales}


def _half_away_from_zero(x: Tensor) -> Tensor:
    """Return ``x`` rounded as C's ``round`` does; torch's rounds halves to even."""
    whole = x.trunc()
    rest = x - whole
    return whole + torch.where(rest.abs() >= 0.5, rest.sign(), torch.zeros_like(rest))
