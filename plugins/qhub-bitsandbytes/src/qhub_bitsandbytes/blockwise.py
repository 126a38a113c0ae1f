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
from qhub.layouts.chunks import all_finite, row_chunks
from qhub.layouts.packing import pack, packed_length
from qhub_bitsandbytes.tables import QuantType, dynamic_map, value_table

__all__ = ["quantize_blockwise", "quantize_scales"]

# Upstream's CPU code finds a nested code in a table of this many equal steps over [-1, 1].
_STEPS = 1 << 16


def quantize_blockwise(weight: Tensor, layout: Lookup, quant_type: QuantType) -> dict[str, Tensor]:
    """Return the parts of ``layout`` for ``weight`` (N, K) float32, float16 or bfloat16.

    ``quant_type``: ``"nf4"`` or ``"fp4"``. Codes are the nearest table entries of w / absmax of the block; a value
    halfway between two entries takes the smaller one. Raises :class:`LayoutError` if the weight holds NaN or
    infinity.
    """
    n, k, group = layout.out_features, layout.in_features, layout.grid.cols
    table = value_table(quant_type).to(weight.device)
    ordered, order = torch.sort(table, stable=True)
    order, middles = order.to(torch.uint8), (ordered[:-1] + ordered[1:]) / 2
    qweight = torch.empty(n, packed_length(k, 4), dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(-(-n * k // group), dtype=torch.float32, device=weight.device)
    # Upstream quantizes what is stored row by row, so a block of the flattened matrix may cross rows, but no chunk.
    for rows in row_chunks(n, k, weight.device, group):
        places, largest = _quantize_run(weight[rows].float().reshape(-1), group, middles)
        qweight[rows] = pack(order[places].reshape(-1, k), 4)
        first = rows.start * k // group
        absmax[first : first + largest.shape[0]] = largest
    parts = {"qweight": qweight, "table": table.clone()}
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
    if not all_finite(flat):
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
    return torch.bucketize(scaled.clamp_(-1.0, 1.0), middles, out_int32=True), absmax


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
    pieces = row_chunks(blocks.shape[0], group, blocks.device)
    codes = torch.cat([_scale_codes(blocks[piece], supers[piece]) for piece in pieces])
    return codes.reshape(-1)[: absmax.shape[0]].contiguous(), supers, offset


def _scale_codes(blocks: Tensor, supers: Tensor) -> Tensor:
    """Return codes (count, group) uint8 for ``blocks`` (count, group) float32 under ``supers`` (count,)."""
    # The clamp keeps 0/0 out of the lookup; upstream stores code 0 for a block of zeros.
    normal = (blocks * (1.0 / supers.clamp_min(torch.finfo(torch.float32).tiny)).unsqueeze(-1)).clamp_(-1.0, 1.0)
    if blocks.device.type == "cpu":
        steps = (normal + 1.0) * 0.5 * (_STEPS - 1) + 0.5
        codes = _step_codes()[steps.to(torch.int32)]
    else:
        table = dynamic_map().to(blocks.device)
        codes = torch.bucketize(normal, (table[:-1] + table[1:]) / 2, out_int32=True).to(torch.uint8)
    return codes.masked_fill_((supers == 0).unsqueeze(-1), 0)


@cache
def _step_codes() -> Tensor:
    """Return the dynamic map's nearest code for each of the 65,536 equal steps from -1 to 1: (65536,) uint8."""
    table = dynamic_map()
    steps = -1.0 + (2.0 * torch.arange(_STEPS, dtype=torch.float32, device="cpu")) / (_STEPS - 1)
    return torch.bucketize(steps, 0.5 * (table[:-1] + table[1:])).to(torch.uint8)
