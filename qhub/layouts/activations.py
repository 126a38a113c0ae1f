"""How a layer's input is rounded before the product: int8, float8 and 4-bit floats, dynamic or with a stored scale.

``x^ = scale * code``, one scale for all, for each row (token), or for each group of neighbours in a row. Sources:
LLM.int8() (Dettmers et al. 2022, eq. 8) for int8 rows; Micikevicius et al. 2022, "FP8 formats for deep learning",
section 4, for float8 under a scale that puts the largest magnitude on the format's; DeepSeek-V3 (2024), section 3.3.2,
for groups of 128; NVFP4 for 4-bit floats in groups of 16 whose scales are E4M3 under one float32 scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from qhub.errors import LayoutError
from qhub.layouts.powers import powers_above, rounded_exponents, shared_exponents

if TYPE_CHECKING:
    from qhub.layouts.base import PartSpec

__all__ = ["FLOAT4", "Activation", "float8_input", "round_float4", "rounded_input"]

# E2M1, the values of 4-bit floats (OCP Microscaling Formats 1.0, table 5): code 0 to 7; 8 to 15 are their negatives.
FLOAT4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class Activation:
    """Says how a layer's input is rounded before the product.

    ``kind``: ``"none"``, ``"int8"`` (integers of ``bits`` bits), ``"float8"`` (``format``) or ``"float4"`` (E2M1).
    ``granularity``: what shares a scale: a ``"row"`` of x (M, K), the whole ``"tensor"``, or a ``"group"`` of ``group``
    neighbours in a row. ``static``: the scale is the part ``input_scale`` (), found by calibration; False: it is the
    largest magnitude over ``top``. ``symmetric``: False for integers with a zero, the part ``input_zero`` () where
    static. ``top``: the code that the largest magnitude gets; None: the format's largest. ``limit``: magnitudes above
    it saturate instead of widening a dynamic scale; None: none do. ``scale_format``: the scales of groups are rounded
    to it, those of rows and tensors too: ``"e8m0fnu"`` as in OCP's formats, ``"e8m0even"`` after its mantissa
    was rounded to one bit (compressed-tensors), ``"ue8m0"`` up to a power of two
    (DeepSeek-V3.1, INC); for ``"e4m3fn"`` under the part ``input_global_scale`` (), which divides: scale = e4m3(absmax
    / top * global) / global. ``threshold``: input columns holding a magnitude at or above it stay in 16 or 32 bits; 0
    turns that off (LLM.int8(), Dettmers et al. 2022, section 3; int8 rows only).
    """

    kind: Literal["none", "int8", "float8", "float4"] = "none"
    threshold: float = 0.0
    granularity: Literal["row", "tensor", "group"] = "row"
    group: int = 0
    static: bool = False
    symmetric: bool = True
    bits: int = 8
    format: Literal["e4m3fn", "e5m2", "e4m3fnuz", "e5m2fnuz"] = "e4m3fn"
    top: float | None = None
    limit: float | None = None
    scale_format: Literal["float32", "e4m3fn", "e8m0fnu", "e8m0even", "ue8m0"] = "float32"

    def __post_init__(self) -> None:
        if (self.granularity == "group") != (self.group > 0):
            raise LayoutError(f"a group of {self.group} inputs does not go with one scale per {self.granularity}")
        if self.static and self.granularity != "tensor":
            raise LayoutError(f"a stored input scale is one for the whole tensor, asked for one per {self.granularity}")
        if not 2 <= self.bits <= 8:
            raise LayoutError(f"inputs are rounded to integers of 2 to 8 bits, asked for {self.bits}")
        if self.threshold and (self.kind, self.granularity, self.static) != ("int8", "row", False):
            raise LayoutError("columns with outliers are kept aside for inputs rounded to int8 per row only")

    @property
    def scheme(self) -> str:
        """Return the scheme's name, which kernels declare: the kind alone for what it usually means (dynamic, per row),
        what differs from that after it."""
        if self.kind == "none":
            return "none"
        usual = Activation(kind=self.kind, threshold=self.threshold)
        words: list[str] = [self.kind]
        if self.granularity != usual.granularity:
            words.append(f"{self.granularity}{self.group or ''}")
        words += [word for word, said in (("static", self.static), ("asymmetric", not self.symmetric)) if said]
        for name in ("bits", "format", "top", "limit", "scale_format"):
            if getattr(self, name) != getattr(usual, name):
                words.append(f"{name}={getattr(self, name)}")
        return " ".join(words)

    def part_specs(self) -> dict[str, PartSpec]:
        """Return the tensors that the scheme needs."""
        from qhub.layouts.base import PartSpec

        names = []
        if self.static:
            names += ["input_scale"] if self.symmetric else ["input_scale", "input_zero"]
        if self.scale_format == "e4m3fn":
            names.append("input_global_scale")
        return {name: PartSpec((), (torch.float32,)) for name in names}

    def check_values(self, parts: Mapping[str, Tensor]) -> None:
        """Raise :class:`LayoutError` if a stored scale cannot be used."""
        for name in self.part_specs():
            if name != "input_zero" and bool((parts[name] <= 0).any()):
                raise LayoutError(f"tensor {name!r} holds {float(parts[name].min())}: a scale is above zero")

    @property
    def largest(self) -> float:
        """Return the largest magnitude that a code stands for, before its scale."""
        if self.kind == "float8":
            return torch.finfo(getattr(torch, f"float8_{self.format}")).max
        return FLOAT4[-1] if self.kind == "float4" else float(2 ** (self.bits - 1) - 1)


def rounded_input(x: Tensor, activation: Activation, parts: Mapping[str, Tensor]) -> Tensor:
    """Return ``x`` (M, K) rounded as ``activation`` says, in float32; outlier columns are not looked at."""
    if activation.kind == "none":
        return x.float()
    m, k = x.shape
    x = x.float()
    if activation.granularity == "group":
        padded = torch.nn.functional.pad(x, (0, -k % activation.group))
        return _rounded(padded.reshape(m, -1, activation.group), activation, parts).reshape(m, -1)[:, :k]
    if activation.granularity == "row":
        return _rounded(x, activation, parts)
    return _rounded(x.reshape(1, -1), activation, parts).reshape(m, k)


def float8_input(x: Tensor, activation: Activation, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return float8 codes (M, K) of ``x`` (M, K) and their scales float32, (M, 1) or, one for all, (1, 1).

    Codes times scales are :func:`rounded_input`. For float8 schemes by rows and tensors.
    """
    x = x.float()
    if activation.static:
        scale = parts["input_scale"].float().reshape(1, 1)
    elif activation.granularity == "row":
        scale = _scale(x, activation, parts)
    else:
        scale = _scale(x.reshape(1, -1), activation, parts)
    ratio = x / torch.where(scale == 0, torch.ones_like(scale), scale)
    dtype = getattr(torch, f"float8_{activation.format}")
    return ratio.clamp_(-activation.largest, activation.largest).to(dtype), scale


def _rounded(x: Tensor, activation: Activation, parts: Mapping[str, Tensor]) -> Tensor:
    """Round ``x`` with one scale for each vector along its last dimension."""
    if not activation.symmetric:
        return _asymmetric(x, activation, parts)
    scale = parts["input_scale"].float() if activation.static else _scale(x, activation, parts)
    ratio = x / torch.where(scale == 0, torch.ones_like(scale), scale)
    return _nearest(ratio, activation) * scale


def _scale(x: Tensor, activation: Activation, parts: Mapping[str, Tensor]) -> Tensor:
    absmax = x.abs().amax(dim=-1, keepdim=True)
    if activation.limit is not None:
        absmax = absmax.clamp_max(activation.limit)
    scale = absmax / (activation.top or activation.largest)
    if activation.scale_format == "e8m0fnu":
        scale = shared_exponents(absmax, activation.largest).float()
    elif activation.scale_format == "e8m0even":
        scale = rounded_exponents(absmax, activation.largest).float()
    elif activation.scale_format == "ue8m0":
        scale = torch.where(absmax == 0, torch.ones_like(scale), powers_above(scale).float())
    elif activation.scale_format == "e4m3fn":
        over = parts["input_global_scale"].float()
        scale = (scale * over).clamp_max(torch.finfo(torch.float8_e4m3fn).max).to(torch.float8_e4m3fn).float() / over
    return scale


def _nearest(ratio: Tensor, activation: Activation) -> Tensor:
    if activation.kind == "int8":
        return ratio.round().clamp_(-activation.largest - 1, activation.largest)
    if activation.kind == "float4":
        return round_float4(ratio)
    dtype = getattr(torch, f"float8_{activation.format}")
    return ratio.clamp(-activation.largest, activation.largest).to(dtype).float()


def _asymmetric(x: Tensor, activation: Activation, parts: Mapping[str, Tensor]) -> Tensor:
    low, high = -activation.largest - 1, activation.largest
    if activation.static:
        scale, zero = parts["input_scale"].float(), parts["input_zero"].float()
    else:
        least, most = x.amin(-1, keepdim=True).clamp_max(0), x.amax(-1, keepdim=True).clamp_min(0)
        scale = (most - least) / (high - low)
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        zero = (low - least / scale).round().clamp(low, high)
    return ((x / scale).round().add_(zero).clamp_(low, high) - zero) * scale


def round_float4(x: Tensor) -> Tensor:
    """Return the E2M1 value nearest to each of ``x`` float32, ties to the even code; beyond 6 saturates."""
    magnitude = x.abs().clamp_max(FLOAT4[-1])
    # The spacing of E2M1 is 1/2 up to 2, 1 up to 4, 2 above; rounding is half to even, as is torch.round.
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    return torch.copysign((magnitude / step).round() * step, x)
