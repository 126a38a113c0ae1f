"""Chooses the numbers of FP4 and NF4: codes, absmax per block, and the absmax quantized in turn. Those of bitsandbytes.

Sources: QLoRA (Dettmers et al. 2023), sections 2 and 3; bitsandbytes 0.50.2, ``functional.quantize_4bit``,
``backends/default/ops.py`` (``quantize_4bit``) and ``csrc/cpu_ops.cpp`` (``quantize_cpu_impl``).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from qhub.errors import LayoutError
from qhub.layouts import Lookup
from qhub.layouts.packing import pack
from qhub_bitsandbytes.tables import QuantType, dynamic_map, value_table

__all__ = ["quantize_blockwise", "quantize_scales"]

# Weights converted to float32 at a time: a multiple of every block size, so that chunks hold whole blocks.
_CHUNK = 1 << 22

# Upstream's CPU code finds a nested code in a table of this many equal steps over [-1, 1].
_STEPS = 1 << 16


def quantize_blockwise(weight: Tensor, layout: Lookup, quant_type: QuantType) -> dict[str, Tensor]:
    """Return the parts of ``layout`` for ``weight`` (N, K) float32, float16 or bfloat16.

    ``quant_type``: ``"nf4"`` or ``"fp4"``. Codes are the nearest table entries of w / absmax of the block; a value
    halfway between two entries takes the smaller one. Raises :class:`LayoutError` if the weight holds NaN or
    infinity.
    """
    # Upstream quantizes what is stored row by row, so a run of the flattened matrix may cross rows.
    flat = weight.contiguous().reshape(-1)
    table = value_table(quant_type).to(weight.device)
    ordered, order = torch.sort(table, stable=True)
    middles = (ordered[:-1] + ordered[1:]) / 2
    runs = [_quantize_run(run.float(), layout.grid.cols, middles) for run in flat.split(_CHUNK)]
    places = torch.cat([places for places, _ in runs])
    absmax = torch.cat([absmax for _, absmax in runs])
    codes = order.to(torch.uint8)[places].reshape(layout.out_features, layout.in_features)
    parts = {"qweight": pack(codes, 4), "table": table.clone()}
    if layout.scales_nested is None:
        return parts | {"scales": absmax.reshape(layout.scale_shape)}
    scales, supers, offset = quantize_scales(absmax, layout.scales_nested.group)
    return parts | {
        "scales": scales.reshape(layout.scale_shape),
        "scales_super": supers,
        "scales_table": dynamic_map().to(weight.device, copy=True),
        "scales_offset": offset,
    }


def _quantize_run(flat: Tensor, group: int, middles: Tensor) -> tuple[Tensor, Tensor]:
    """Return places in the sorted table (int32) and absmax of the blocks of ``flat`` (count,) float32."""
    if not bool(torch.isfinite(flat).all()):
        raise LayoutError(
            "the weight holds NaN or infinity, which no 4-bit block can store: check the checkpoint it came from"
        )
    whole = flat.shape[0] - flat.shape[0] % group
    blocks = flat[:whole].reshape(-1, group)
    absmax = blocks.abs().amax(-1)
    scaled = (blocks * (1.0 / absmax.clamp_min(1e-38)).unsqueeze(-1)).reshape(-1)
    if whole < flat.shape[0]:
        # Upstream divides the last, shorter block, instead of multiplying by a reciprocal; its absmax is never 0.
        rest = flat[whole:]
        last = rest.abs().amax().clamp_min(1e-38)
        absmax = torch.cat([absmax, last.unsqueeze(0)])
        scaled = torch.cat([scaled, rest / last])
    return torch.bucketize(scaled.clamp(-1.0, 1.0), middles, out_int32=True), absmax


def quantize_scales(absmax: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize ``absmax`` (count,) float32 in turn, to codes, second-level absmax and offset.

    Returns codes (count,) uint8, absmax (ceil(count/group),) float32 and the offset () float32. The mean is taken
    off first (the offset); ``dynamic_map()[code] * absmax[i // group] + offset`` restores a value. On a CPU the
    codes are those of bitsandbytes' CPU library, which rounds to a grid of 65,536 steps before it looks up the
    nearest entry; on other devices they are the nearest entries, as its own torch code chooses them
    (``backends/default/ops.py``, ``quantize_blockwise``).
    """
    offset = absmax.mean()
    centred = absmax - offset
    missing = -centred.shape[0] % group
    blocks = torch.nn.functional.pad(centred, (0, missing)).reshape(-1, group)
    supers = blocks.abs().amax(-1)
    # The clamp keeps 0/0 out of the lookup; upstream stores code 0 for a block of zeros.
    normal = (blocks * (1.0 / supers.clamp_min(torch.finfo(torch.float32).tiny)).unsqueeze(-1)).clamp(-1.0, 1.0)
    if absmax.device.type == "cpu":
        steps = (normal + 1.0) * 0.5 * (_STEPS - 1) + 0.5
        codes = _step_codes()[steps.to(torch.int64)]
    else:
        table = dynamic_map().to(absmax.device)
        codes = torch.bucketize(normal, (table[:-1] + table[1:]) / 2).to(torch.uint8)
    codes = codes.masked_fill((supers == 0).unsqueeze(-1), 0)
    return codes.reshape(-1)[: absmax.shape[0]].contiguous(), supers, offset


@cache
def _step_codes() -> Tensor:
    """Return the dynamic map's nearest code for each of the 65,536 equal steps from -1 to 1: (65536,) uint8."""
    table = dynamic_map()
    steps = -1.0 + (2.0 * torch.arange(_STEPS, dtype=torch.float32, device="cpu")) / (_STEPS - 1)
    return torch.bucketize(steps, 0.5 * (table[:-1] + table[1:])).to(torch.uint8)
