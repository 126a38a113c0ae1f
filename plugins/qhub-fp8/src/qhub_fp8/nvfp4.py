"""The qhub plugin of the method ``nvfp4``: 4-bit floats (E2M1), E4M3 scales for each 16 along K, one float32 over them.

Entries, named as NVIDIA's ModelOpt names them (modelopt/torch/quantization/qtensor/nvfp4_tensor.py, and its export)::

    weight          uint8 (N, K / 2): codes, low nibble first
    weight_scale    float8_e4m3fn (N, K / 16): multiplies
    weight_scale_2  float32 (): multiplies

transformers' own ``NVFP4Config`` quantizes on a GPU only and cannot be saved; inputs stay in 16 bits here.
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
from qhub.layouts.float4 import NVFP4_GROUP, float4_table, nvfp4, quantize_float4
from qhub.merging import AdapterPolicy
from qhub.plan import LayerPlan, Skip, WeightInfo

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Nvfp4Format"]


class Nvfp4Format(Format):
    """Translates between NVFP4 layouts and ModelOpt's entries."""

    @property
    def markers(self) -> frozenset[str]:
        return frozenset({"weight_scale_2"})

    @property
    def names(self) -> frozenset[str]:
        return frozenset({"weight", "weight_scale", "weight_scale_2"})

    def entries(self, layout: Layout) -> Mapping[str, Entry]:
        rows, columns = layout.out_features, layout.in_features
        return {
            "weight": Entry((rows, columns // 2), (torch.uint8,)),
            "weight_scale": Entry((rows, columns // NVFP4_GROUP), (torch.float8_e4m3fn,)),
            "weight_scale_2": Entry((), (torch.float32,)),
        }

    def pack(self, layout: Layout, parts: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        return {
            "weight": parts["qweight"],
            "weight_scale": parts["scales"],
            "weight_scale_2": parts["scales_super"].reshape(()),
        }

    def unpack(self, layout: Layout, entries: Mapping[str, Tensor]) -> tuple[Layout, dict[str, Tensor]]:
        from qhub_fp8.entries import scalar

        self.check(layout, entries, "an nvfp4 config")
        scales = entries["weight_scale"]
        # A scale of 0 is what some writers give to groups of zeros.
        if scales.device.type != "meta" and bool((scales.float() < 0).any()):
            raise LayoutError("entry 'weight_scale' holds negative numbers: the file is damaged")
        return layout, {
            "qweight": entries["weight"],
            "table": float4_table(scales.device),
            "scales": scales,
            "scales_super": scalar("weight_scale_2", entries["weight_scale_2"]).reshape(1),
        }


@hookimpl
def qhub_config() -> ConfigSpec:
    """Describe transformers' own NVFP4Config."""
    from qhub_fp8.float4_plan import spec

    return spec("nvfp4", "transformers:NVFP4Config")


@hookimpl
def qhub_plan(config: Any, weights: Sequence[WeightInfo]) -> Mapping[str, LayerPlan | Skip]:
    """Plan every linear weight whose rows are whole groups, fused experts included."""
    from qhub_fp8.float4_plan import plan

    return plan("nvfp4", weights, NVFP4_GROUP, lambda rows, columns: nvfp4(rows, columns, divide=False))


@hookimpl
def qhub_quantize(weight: Tensor, layout: Layout) -> Mapping[str, Tensor]:
    """Put the matrix's largest magnitude on 6 * 448 and each group's on 6, and round to nearest."""
    assert isinstance(layout, Lookup)
    return quantize_float4(weight, layout)


@hookimpl
def qhub_format() -> Format:
    """Return ModelOpt's entries."""
    return Nvfp4Format()


@hookimpl
def qhub_adapter() -> AdapterPolicy:
    """Let each write choose between the scales it finds and refitted ones."""
    return AdapterPolicy(grid="best")
