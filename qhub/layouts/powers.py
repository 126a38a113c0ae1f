"""Scales that are powers of two, in E8M0: 8 bits of exponent (OCP Microscaling Formats 1.0, section 5.4.1)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["powers_above", "rounded_exponents", "shared_exponents"]


def powers_above(values: Tensor) -> Tensor:
    """Return in E8M0 the smallest powers of two that are not below ``values``, above 0: then no code saturates."""
    mantissa, exponent = torch.frexp(values.float())
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
    return torch.exp2(exponent.clamp(-127, 127).float()).to(torch.float8_e8m0fnu)


def shared_exponents(absmax: Tensor, largest: float) -> Tensor:
    """Return scales E8M0 for groups with the largest magnitudes ``absmax``, for codes up to ``largest``.

    OCP Microscaling Formats 1.0, section 6.3: the exponent of the largest magnitude less that of the format's. Groups
    of zeros get 1.
    """
    # frexp gives a mantissa from 1/2 up to 1: its exponent is floor(log2) + 1, exactly.
    exponent = torch.frexp(absmax.float()).exponent - math.frexp(largest)[1]
    scale = torch.exp2(exponent.clamp(-127, 127).float())
    return torch.where(absmax == 0, torch.ones_like(scale), scale).to(torch.float8_e8m0fnu)


def rounded_exponents(absmax: Tensor, largest: float, bits: int = 1) -> Tensor:
    """Return scales E8M0 as :func:`shared_exponents` does, one power up where ``absmax``, rounded to ``bits`` bits of
    mantissa, is one.

    Then fewer of a group's largest weights saturate. Source: compressed-tensors 0.20, ``round_to_power_2``
    (compressed_tensors/quantization/utils/mxfp_utils.py), as in AMD Quark.
    """
    mantissa, exponent = torch.frexp(absmax.float())
    exponent = exponent - math.frexp(largest)[1] + (mantissa >= 1 - 2.0 ** -(bits + 2)).to(exponent.dtype)
    scale = torch.exp2(exponent.clamp(-127, 127).float())
    return torch.where(absmax == 0, torch.ones_like(scale), scale).to(torch.float8_e8m0fnu)
