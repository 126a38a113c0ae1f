"""The qhub plugin of the method ``mxfp4``: 4-bit floats (E2M1) with a power of two for each 32 along K.

Entries, named as gpt-oss files name them (transformers 5.23, integrations/mxfp4.py): of the parameter ``weight``::

    weight_blocks  uint8 (N, K / 32, 16): codes, low nibble first
    weight_scales  uint8 (N, K / 32): exponents, 127 is 1

and of fused experts ``gate_up_proj`` in one tensor each, the experts leading: ``gate_up_proj_blocks``, ``..._scales``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from qhub import hookimpl
from qhub.config import ConfigSpec
from qhub.errors import LayoutError
from qhub.formats import Entry, Format
from qhub.layouts import Layout, Lookup
from qhub.layouts.float4 import MXFP4_GROUP, float4_table, mxfp4, quantize_float4
from qhub.merging import AdapterPolicy
from qhub.plan import LayerPlan, Skip, WeightInfo

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Mxfp4Format"]

_BYTES = MXFP4_GROUP // 2
# The exponent byte that stands for no number (OCP Microscaling Formats 1.0, section 5.4.1).
_NAN = 255


class Mxfp4Format(Format):
    """Translates between MXFP4 layouts and blocks and scales of bytes."""

    @property
    def markers(self) -> frozenset[str]:
        return frozenset({"weight_blocks"})

    @property
    def names(self) -> frozenset[str]:
        return frozenset({"weight_blocks", "weight_scales"})

    @property
    def stacks(self) -> Mapping[str, str]:
        return {"_blocks": "weight_blocks", "_scales": "weight_scales"}

    def entries(self, layout: Layout) -> Mapping[str, Entry]:
        rows, groups = layout.out_features, layout.in_features // MXFP4_GROUP
        return {
            "weight_blocks": Entry((rows, groups, _BYTES), (torch.uint8,)),
            "weight_scales": Entry((rows, groups), (torch.uint8,)),
        }

    def pack(self, layout: Layout, parts: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        rows = layout.out_features
        return {
            "weight_blocks": parts["qweight"].reshape(rows, -1, _BYTES),
            "weight_scales": parts["scales"].view(torch.uint8),
        }

    def unpack(self, layout: Layout, entries: Mapping[str, Tensor]) -> tuple[Layout, dict[str, Tensor]]:
        self.check(layout, entries, "an mxfp4 config")
        blocks, scales = entries["weight_blocks"], entries["weight_scales"]
        if scales.device.type != "meta" and bool((scales == _NAN).any()):
            raise LayoutError("entry 'weight_scales' holds 255, which stands for no number: the file is damaged")
        return layout, {
            "qweight": blocks.reshape(layout.out_features, -1).contiguous(),
            "table": float4_table(blocks.device),
            "scales": scales.view(torch.float8_e8m0fnu),
        }


@hookimpl
def qhub_config() -> ConfigSpec:
    """Describe transformers' own Mxfp4Config."""
    from qhub_fp8.float4_plan import spec

    return spec("mxfp4", "transformers:Mxfp4Config")


@hookimpl
def qhub_plan(config: Any, weights: Sequence[WeightInfo]) -> Mapping[str, LayerPlan | Skip]:
    """Plan every linear weight whose rows are whole groups, fused experts included."""
    from qhub_fp8.float4_plan import plan

    return plan("mxfp4", weights, MXFP4_GROUP, mxfp4)


@hookimpl
def qhub_quantize(weight: Tensor, layout: Layout) -> Mapping[str, Tensor]:
    """Take the exponent of each group's largest magnitude, and round to nearest."""
    assert isinstance(layout, Lookup)
    return quantize_float4(weight, layout)


@hookimpl
def qhub_format() -> Format:
    """Return blocks and scales of bytes."""
    return Mxfp4Format()


@hookimpl
def qhub_adapter() -> AdapterPolicy:
    """Let each write choose between the scales it finds and refitted ones."""
    return AdapterPolicy(grid="best")
