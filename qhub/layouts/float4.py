"""4-bit floats (E2M1) under block scales: the layouts of NVFP4 and MXFP4, and how weights are rounded to them.

Both are a :class:`Lookup` into the sixteen values of E2M1. Sources: OCP Microscaling Formats 1.0, sections 5.3.3 (E2M1)
and 6.3 (shared exponents); NVIDIA, "Introducing NVFP4 for efficient and accurate low-precision inference" (2025), for
E4M3 scales of 16 weights under one float32 scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qhub.errors import LayoutError
from qhub.layouts.activations import FLOAT4, Activation, round_float4
from qhub.layouts.grid import Grid
from qhub.layouts.lookup import Lookup
from qhub.layouts.nested import Nested
from qhub.layouts.packing import pack
from qhub.layouts.powers import shared_exponents

__all__ = ["MXFP4_GROUP", "NVFP4_GROUP", "float4_codes", "float4_table", "mxfp4", "nvfp4", "quantize_float4"]

NVFP4_GROUP = 16
MXFP4_GROUP = 32

_E4M3 = torch.float8_e4m3fn


def nvfp4(
    out_features: int,
    in_features: int,
    *,
    divide: bool = True,
    group: int = NVFP4_GROUP,
    activation: Activation | None = None,
) -> Lookup:
    """Return the layout of an NVFP4 matrix: codes, E4M3 ``scales`` of ``group`` weights, one float32 ``scales_super``.

    ``divide``: ``w = e2m1 * scale / super``, as compressed-tensors stores it; False: ``w = e2m1 * scale * super``, as
    NVIDIA's ModelOpt and torchao do. ``activation``: None leaves inputs alone.
    """
    nested = Nested(dtype="float8_e4m3fn", group=0, divide=divide)
    return Lookup(
        out_features=out_features,
        in_features=in_features,
        bits=4,
        grid=Grid.along_k(group),
        scales_nested=nested,
        activation=activation or Activation(),
    )


def mxfp4(
    out_features: int, in_features: int, *, group: int = MXFP4_GROUP, activation: Activation | None = None
) -> Lookup:
    """Return the layout of an MXFP4 matrix: codes and, for each ``group`` weights, a power of two.

    The part ``scales`` is ``torch.float8_e8m0fnu`` as :func:`quantize_float4` makes it. ``activation``: None leaves
    inputs alone.
    """
    return Lookup(
        out_features=out_features,
        in_features=in_features,
        bits=4,
        grid=Grid.along_k(group),
        activation=activation or Activation(),
    )


def float4_table(device: torch.device | str | None = None) -> Tensor:
    """Return the part ``table``: the values (16,) float32 of E2M1's codes, the sign in bit 3."""
    magnitudes = torch.tensor(FLOAT4, dtype=torch.float32, device=device)
    return torch.cat([magnitudes, -magnitudes])


def float4_codes(values: Tensor) -> Tensor:
    """Return E2M1's codes uint8 nearest to ``values`` of any float dtype: ties to the even code, beyond 6 saturated."""
    rounded = round_float4(values.float())
    magnitudes = torch.tensor(FLOAT4, dtype=torch.float32, device=values.device)
    code = torch.bucketize(rounded.abs().contiguous(), magnitudes, out_int32=True).to(torch.uint8)
    # A negative number that rounds to 0 keeps its sign, as a cast does.
    return code | (torch.signbit(rounded).to(torch.uint8) << 3)


def quantize_float4(weight: Tensor, layout: Lookup, *, super_scale: Tensor | None = None) -> dict[str, Tensor]:
    """Return the parts of ``layout``, one of :func:`nvfp4` or :func:`mxfp4`, for ``weight`` (..., N, K) of floats.

    NVFP4: the matrix's largest magnitude is put on 6 * 448 (``super_scale``, a scalar, overrules that), a group's on 6.
    MXFP4: a group's exponent is that of its largest magnitude less E2M1's 2 (OCP Microscaling Formats 1.0, section
    6.3); what then lies above 6 saturates. Raises :class:`LayoutError` on NaN or infinity.
    """
    w = weight.detach().float()
    if not bool(torch.isfinite(w).all()):
        raise LayoutError(f"the weight of {layout.out_features}x{layout.in_features} to quantize holds NaN or infinity")
    split = layout.grid.split(w)
    absmax = split.abs().amax(layout.grid.member_dims)
    parts: dict[str, Tensor] = {"table": float4_table(w.device)}
    if layout.scales_nested is None:
        scales = shared_exponents(absmax, FLOAT4[-1])
        parts["scales"], used = scales, scales.float()
    else:
        parts |= _nested_scales(absmax, layout.scales_nested, super_scale, w.shape[:-2])
        used = layout.scales(parts)
    ratio = layout.grid.join(split / layout.grid.spread(used), layout.out_features, layout.in_features)
    return {"qweight": pack(float4_codes(ratio), layout.bits), **parts}


def _nested_scales(
    absmax: Tensor, nested: Nested, super_scale: Tensor | None, batch: tuple[int, ...]
) -> dict[str, Tensor]:
    """Return E4M3 scales for the largest magnitudes ``absmax`` (*batch, N, K / group), and the scale over them."""
    top = FLOAT4[-1] * torch.finfo(_E4M3).max
    if super_scale is None:
        largest = absmax.flatten(len(batch)).amax(-1, keepdim=True)
        largest = torch.where(largest == 0, torch.ones_like(largest), largest)
        over = top / largest if nested.divide else largest / top
    else:
        over = super_scale.float().reshape(*(1 for _ in batch), 1).expand(*batch, 1).contiguous()
    second = over.unsqueeze(-1)
    local = absmax / FLOAT4[-1]
    local = local * second if nested.divide else local / second
    # The smallest code above 0 beats 0: a group of small weights keeps what it can, and no scale is 0.
    local = local.clamp(2.0**-9, torch.finfo(_E4M3).max)
    return {"scales": local.to(_E4M3), "scales_super": over}
