"""Scales, zeros and codes of integer weights as torchao chooses them, in the dtype that it computes in.

Source: torchao 0.18, ``quantization/quant_primitives.py``, ``choose_qparams_affine`` and ``quantize_affine``. The range
of a group always includes 0. Arithmetic is done in the weight's own dtype, as there: the scale of a bfloat16 weight is
a bfloat16 number, whatever it is stored as.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["codes", "scales_and_zeros"]


def scales_and_zeros(
    low: Tensor, high: Tensor, code_range: tuple[int, int], mapping: str, eps: float | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return scale and zero of groups with the least values ``low`` and the largest ``high``, of one shape and dtype.

    ``mapping``: ``"symmetric"``: absmax over half the range of codes, no zero; ``"symmetric_no_clipping_err"``: the
    least scale that clips neither end; ``"asymmetric"``: with a zero, which is a code. ``eps``: the least
    scale; None: the dtype's smallest normal number.
    """
    least, most = code_range
    floor = torch.finfo(low.dtype).smallest_normal if eps is None else eps
    low, high = low.clamp(max=0), high.clamp(min=0)
    if mapping == "asymmetric":
        scale = ((high - low) / float(most - least)).clamp(min=floor)
        return scale, (least - torch.round(low / scale)).clamp(least, most)
    if mapping == "symmetric":
        scale = torch.maximum(-low, high) / (float(most - least) / 2)
    else:
        scale = torch.maximum(low / float(least), high / float(most))
    return scale.clamp(min=floor), None


def codes(weight: Tensor, scale: Tensor, zero: Tensor | None, code_range: tuple[int, int]) -> Tensor:
    """Return whole codes for ``weight``, in a float dtype; ``scale`` and ``zero`` broadcast against it."""
    # Reciprocal and product are rounded, as in torchao: for the same codes where a weight lies between two.
    rounded = torch.round(weight * (1.0 / scale))
    return (rounded if zero is None else rounded + zero).clamp(*code_range)
