"""One weight to its layout's tensors: rounded to nearest, as llm-compressor's QuantizationModifier does without data.

Scales put the largest magnitude of a group on half the range of integers (7.5 for 4 bits), on E4M3's 448, or, for
4-bit floats, on 6 under E4M3 scales. They are rounded to the weight's dtype before codes are chosen, in float32.
Sources: compressed-tensors 0.20, ``calculate_qparams`` and ``generate_gparam`` (compressed_tensors/quantization/utils/
helpers.py); for powers of two ``generate_mx_scales`` (mxfp_utils.py).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qhub.errors import ConfigError
from qhub.layouts import Activation, Affine, Float8, Layout, Lookup
from qhub.layouts.activations import FLOAT4
from qhub.layouts.float4 import float4_codes, float4_table, quantize_float4
from qhub.layouts.packing import pack
from qhub.layouts.powers import rounded_exponents
from qhub_compressed_tensors.format import float6_table

__all__ = ["input_parts", "quantize"]

_E2M3_MAX = 7.5
_FLOAT4_TOP = 448.0 * 6.0
# Under it scales of groups end at 448 for a largest weight of 21, and lose places for groups below 0.0007.
_COMMON, _COMMON_RANGE = 128.0, (2.0**-6, _FLOAT4_TOP / 128.0)


def quantize(weight: Tensor, layout: Layout, statistics: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the parts of ``layout`` for ``weight`` (N, K) of a float dtype.

    ``statistics``: ``max_abs``, the largest magnitude of the layer's input, where its scale is stored. Raises
    :class:`ConfigError` for stored zeros of inputs, which that does not tell.
    """
    inputs = input_parts(layout.activation, statistics, weight)
    w = weight.float()
    if isinstance(layout, Lookup):
        nested = layout.scales_nested is not None
        core = quantize_float4(weight, layout, super_scale=_common_scale(w)) if nested else _powers(w, layout)
    elif isinstance(layout, Float8) and layout.grid.rows == 1 and layout.grid.cols == 32:
        absmax = layout.grid.split(w).abs().amax(layout.grid.member_dims)
        scales = rounded_exponents(absmax, torch.finfo(layout.dtype).max)
        core = _with_codes(layout, w, {"scales": scales})
    else:
        assert isinstance(layout, Affine | Float8)
        core = _with_codes(layout, w, _scales(layout, w, weight.dtype))
    return {**core, **inputs}


def input_parts(activation: Activation, statistics: Mapping[str, Tensor], weight: Tensor) -> dict[str, Tensor]:
    """Return the stored scales of inputs, rounded to the dtype of ``weight`` as files hold them."""
    if not activation.part_specs():
        return {}
    if not activation.symmetric:
        raise ConfigError(
            "input_activations with symmetric=False and dynamic=False: a largest magnitude tells no zero point. Choose "
            "symmetric=True, or dynamic=True"
        )
    largest = statistics["max_abs"].float().max()
    if activation.scale_format == "e4m3fn":
        # As for weights: the largest magnitude is put on the largest scale times the largest code.
        over = torch.where(largest > 0, _FLOAT4_TOP / largest, torch.ones_like(largest))
        return {"input_global_scale": over.nan_to_num(1.0, 1.0, 1.0)}
    top = activation.largest + (0.5 if activation.kind == "int8" else 0.0)
    return {"input_scale": _above_zero((largest / top).to(weight.dtype)).float()}


def _common_scale(w: Tensor) -> Tensor | None:
    """Return the global scale of NVFP4 for ``w`` (N, K); None where it has to be the matrix' own.

    Loaders fuse layers (q, k, v; gate and up) and take one global scale for all of them, so it is the same for all
    matrices with magnitudes as trained layers have them. E4M3 has the same relative steps for the scales of groups
    wherever they lie in its normal range, so nothing is lost: of normal matrices the squared error grows by less than
    1 %.
    """
    least, most = _COMMON_RANGE
    return torch.tensor(_COMMON, device=w.device) if least <= float(w.abs().max()) <= most else None


def _above_zero(scale: Tensor) -> Tensor:
    """Return ``scale`` with the dtype's epsilon for 0, as upstream does: all codes are 0 then, and nothing is divided
    by 0."""
    return torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale)


def _scales(layout: Affine | Float8, w: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    groups, dims = layout.grid.split(w), layout.grid.member_dims
    if isinstance(layout, Float8):
        scale = groups.abs().amax(dims) / torch.finfo(layout.dtype).max
        return {"scales": _stored(scale, dtype)}
    steps = 2**layout.bits - 1
    if layout.zero == "constant":
        return {"scales": _stored(groups.abs().amax(dims) / (steps / 2), dtype)}
    low, high = groups.amin(dims).clamp_max(0), groups.amax(dims).clamp_min(0)
    scale = _stored((high - low) / steps, dtype)
    least, most = layout.code_range
    zero = (least - low / scale.float()).round().clamp(least, most)
    return {"scales": scale, "zeros": zero.to(torch.int8 if layout.signed else torch.uint8)}


def _stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    return _above_zero(scale.clamp_max(torch.finfo(dtype).max).to(dtype))


def _with_codes(layout: Layout, w: Tensor, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    if layout.transforms:
        # Nothing says in which order: features stay where they are.
        parts["in_perm"] = torch.arange(layout.in_features, dtype=torch.int32, device=w.device)
    if not isinstance(layout, Affine):
        return {**parts, **layout.nearest(w, parts)}
    # Rounded about zero, as files hold them: beside 128 a float32 has fewer places left.
    middle = 0 if layout.signed else 2 ** (layout.bits - 1)
    codes = layout.grid.split(w) / layout.grid.spread(parts["scales"].float())
    if "zeros" in parts:
        codes = codes + layout.grid.spread(parts["zeros"].float() - middle)
    low, high = layout.code_range
    codes = codes.round().clamp(low - middle, high - middle) + middle
    return {**parts, "qweight": layout.pack_codes(layout.grid.join(codes, layout.out_features, layout.in_features))}


def _powers(w: Tensor, layout: Lookup) -> dict[str, Tensor]:
    """Return codes of 4 or 6 bits under powers of two."""
    absmax = layout.grid.split(w).abs().amax(layout.grid.member_dims)
    four = layout.bits == 4
    scales = rounded_exponents(absmax, FLOAT4[-1]) if four else rounded_exponents(absmax, _E2M3_MAX, bits=3)
    table = float4_table(w.device) if four else float6_table(w.device)
    ratio = layout.grid.split(w) / layout.grid.spread(scales.float())
    if four:
        codes = float4_codes(layout.grid.join(ratio, layout.out_features, layout.in_features))
        return {"qweight": pack(codes, 4), "table": table, "scales": scales}
    parts = {"table": table, "scales": scales}
    return {**parts, **layout.nearest(w, parts)}
