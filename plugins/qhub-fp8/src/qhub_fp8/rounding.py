"""The numbers of every float8 method: scales from the largest magnitudes, codes to nearest, scales of inputs.

Source: Micikevicius et al. 2022, "FP8 formats for deep learning", section 4; the order of the float32 operations is
that of transformers 5.23 (``Fp8Quantize._quantize_one`` of integrations/finegrained_fp8.py), so that the same codes
come out: a block's weights are multiplied by 448 / absmax, and what is stored is that number's reciprocal.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qhub.errors import LayoutError
from qhub.layouts import Float8, Layout, Lookup, Stacked
from qhub.layouts.chunks import all_finite
from qhub.layouts.float4 import quantize_float4
from qhub.layouts.powers import powers_above

__all__ = ["input_scale", "quantize", "quantize_matrix"]


def quantize(
    weight: Tensor, layout: Layout, statistics: Mapping[str, Tensor], *, powers_of_two: bool = False
) -> dict[str, Tensor]:
    """Return the parts of ``layout`` for ``weight`` (N, K) of any float dtype.

    ``statistics``: ``max_abs`` (K,) where the layout stores the scale of its inputs. ``powers_of_two``: scales are
    E8M0. Raises :class:`LayoutError` when the weight is not finite.
    """
    if not all_finite(weight):
        raise LayoutError(f"the weight of {layout.out_features}x{layout.in_features} to quantize holds NaN or infinity")
    if isinstance(layout, Stacked):
        parts: dict[str, Tensor] = {}
        top = 0
        for index, band in enumerate(layout.bands):
            rows = weight[top : top + band.out_features]
            own = quantize(rows, band, statistics, powers_of_two=powers_of_two)
            parts |= {f"{index}_{name}": part for name, part in own.items()}
            top += band.out_features
        return parts
    if isinstance(layout, Lookup):
        parts = quantize_float4(weight, layout)
    else:
        assert isinstance(layout, Float8)
        parts = quantize_matrix(weight, layout, powers_of_two=powers_of_two)
    if layout.activation.static:
        top_code = layout.activation.top or layout.activation.largest
        parts["input_scale"] = input_scale(statistics, top_code).to(weight.device)
    return parts


def quantize_matrix(weight: Tensor, layout: Float8, *, powers_of_two: bool = False) -> dict[str, Tensor]:
    """Return codes and scales of ``weight`` (N, K): the largest magnitude of each group goes to the format's."""
    top = torch.finfo(layout.dtype).max
    split = layout.grid.split(weight.float())
    absmax = split.abs().amax(layout.grid.member_dims)
    # Zeros stay zeros under any scale; the reciprocal of an absmax below 448 / 3.4e38 would be infinite.
    rate = torch.where(
        absmax > 0, top / absmax.clamp_min(torch.finfo(torch.float32).tiny * top), torch.ones_like(absmax)
    )
    scales = 1.0 / rate
    if powers_of_two:
        scales = powers_above(scales)
        rate = 1.0 / scales.float()
    scaled = (split * layout.grid.spread(rate)).clamp_(-top, top)
    codes = layout.grid.join(scaled, layout.out_features, layout.in_features).contiguous().to(layout.dtype)
    return {"qweight": codes, "scales": scales}


def input_scale(statistics: Mapping[str, Tensor], top: float) -> Tensor:
    """Return the scale () float32 under which the largest input that calibration saw gets the code ``top``.

    1 where it saw none, or zeros only: then inputs up to ``top`` are held, and floats lose little by that.
    """
    largest = statistics["max_abs"].max().float()
    if not int(statistics["tokens"]) or not float(largest) > 0:
        return torch.ones((), dtype=torch.float32)
    return (largest / top).reshape(())
