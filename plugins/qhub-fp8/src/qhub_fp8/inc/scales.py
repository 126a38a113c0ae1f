"""The arithmetic of the scale methods: from largest magnitudes to scales, on the constants of Gaudi 2 and Gaudi 3.

Source: neural-compressor 3, torch/algorithms/fp8_quant/_core/fp_utils.py (ranges, exponent biases, the searches
``mmse_scale`` and ``mmse_scale_multi``) and _core/scale_methods/{scales_method,round_scales_function}.py. Its E4M3 on
Gaudi 2 reaches 240, as in the format e4m3fnuz, and four scales cost nothing there: 2^-8, 2^-4, 1 and 2^4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qhub_fp8.inc.methods import Rule

__all__ = ["DEVICES", "Device", "full_scale", "scale_of_input", "scales_of_weight"]

Codes = str

_SMALLEST = torch.finfo(torch.bfloat16).tiny


@dataclass(frozen=True)
class Device:
    """Is what a scale method needs to know of the hardware.

    ``e4m3``: the largest E4M3 number. ``lowest``, ``highest``, ``step``: exponents of the scales that it multiplies by
    for free. Scales are searched from the highest down.
    """

    e4m3: float
    lowest: int
    highest: int
    step: int

    @property
    def scales(self) -> tuple[float, ...]:
        """Return the scales that cost nothing, largest first."""
        return tuple(2.0**exponent for exponent in range(self.highest, self.lowest - 1, -self.step))


# Exponent biases 3, 7, 11, 15 and 0 to 62, where 7 is the format's own: a bias b stands for a scale of 2^(7 - b).
DEVICES = {"GAUDI2": Device(240.0, -8, 4, 4), "GAUDI3": Device(448.0, -55, 7, 1)}


def full_scale(codes: Codes, device: Device) -> float:
    """Return the largest number of the float8 format ``codes`` on ``device``."""
    return device.e4m3 if codes == "e4m3fn" else float(torch.finfo(getattr(torch, f"float8_{codes}")).max)


def scales_of_weight(weight: Tensor, rule: Rule, codes: Codes, device: Device, dtype: torch.dtype) -> Tensor:
    """Return the scales of ``weight`` (N, K): (N, 1) or (1, 1), in ``dtype``, in which they are computed too."""
    if rule.fixed:
        return _fixed(rule, device).to(dtype).reshape(1, 1).to(weight.device)
    if rule.value == "opt" and not rule.rows:
        candidates = rule.candidates or device.scales
        return _rounded(_best(weight, candidates, codes, device), rule, device).to(dtype).reshape(1, 1)
    if rule.rows:
        absmax = weight.abs().amax(1, keepdim=True).to(dtype)
    else:
        absmax = weight.abs().amax().to(dtype).reshape(1, 1)
    scales = _rounded(_from_absmax(absmax, rule, codes, device), rule, device)
    if rule.value == "opt":
        scales = _rounded(_best_rows(weight, scales.float(), rule.candidates, codes, device), rule, device)
    return scales.to(dtype)


def scale_of_input(absmax: Tensor, rule: Rule, codes: Codes, device: Device, dtype: torch.dtype) -> Tensor:
    """Return the scale () float32 of inputs whose largest magnitude is ``absmax`` (), computed in ``dtype``."""
    if rule.fixed:
        return _fixed(rule, device)
    scale = _from_absmax(absmax.to(dtype).reshape(()), rule, codes, device)
    return _rounded(scale, rule, device).to(dtype).float()


def _fixed(rule: Rule, device: Device) -> Tensor:
    return torch.tensor(1.0 if rule.value == "unit" else device.scales[0])


def _from_absmax(absmax: Tensor, rule: Rule, codes: Codes, device: Device) -> Tensor:
    scale = absmax / (full_scale(codes, device) * rule.backoff)
    # Zeros take any scale.
    return torch.where(absmax == 0, torch.ones_like(scale), scale.clamp_min(_SMALLEST))


def _rounded(scale: Tensor, rule: Rule, device: Device) -> Tensor:
    if rule.rounding == "none":
        return scale
    mantissa, exponent = torch.frexp(scale.float())
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent).float()
    if rule.rounding == "hw":
        exponent = torch.ceil(exponent / device.step) * device.step
        exponent = exponent.clamp(device.lowest, device.highest)
    return torch.exp2(exponent)


def _rounding_error(weight: Tensor, scale: Tensor | float, codes: Codes, device: Device) -> Tensor:
    """Return the squared error (N, K) of ``weight`` under ``scale``."""
    top = full_scale(codes, device)
    found = (weight / scale).clamp(-top, top).to(getattr(torch, f"float8_{codes}")).float() * scale
    return (weight - found).square_()


def _best(weight: Tensor, candidates: tuple[float, ...], codes: Codes, device: Device) -> Tensor:
    """Return the scale () with the least error; among equals the last."""
    w = weight.float()
    best, least = candidates[0], math.inf
    for candidate in candidates:
        error = float(_rounding_error(w, candidate, codes, device).sum())
        if error <= least:
            best, least = candidate, error
    return torch.tensor(best, device=weight.device)


def _best_rows(weight: Tensor, scales: Tensor, candidates: tuple[float, ...], codes: Codes, device: Device) -> Tensor:
    """Return for each row the multiple of its ``scales`` (N, 1) with the least error; among equals the first."""
    w = weight.float()
    best, least = torch.ones_like(scales), torch.full_like(scales, math.inf)
    for candidate in candidates:
        error = _rounding_error(w, scales * candidate, codes, device).sum(1, keepdim=True)
        better = error < least
        best, least = torch.where(better, candidate, best), torch.where(better, error, least)
    return best * scales
