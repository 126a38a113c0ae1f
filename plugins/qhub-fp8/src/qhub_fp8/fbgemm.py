"""The qhub plugin of the method ``fbgemm_fp8``: E4M3 weights with a scale a row, inputs rounded by rows.

Files of fbgemm and transformers (``FbgemmFp8Linear`` of integrations/fbgemm_fp8.py, Llama 3.1 405B FP8)::

    weight        float8_e4m3fn (N, K)
    weight_scale  float32 (N, 1): multiplies

Inputs: code = x * 448 / min(absmax of the row, activation_scale_ub), saturated. Source: ``quantize_fp8_per_row`` of
FBGEMM (fbgemm_gpu/experimental/gen_ai/src/quantize/quantize.cu).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from qhub import hookimpl
from qhub.config import ConfigSpec
from qhub.errors import ConfigError, LayoutError
from qhub.formats import Entry, Format
from qhub.layouts import Activation, Float8, Grid, Layout
from qhub.merging import AdapterPolicy
from qhub.plan import LayerPlan, Skip, WeightInfo

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FbgemmFormat", "layout_of"]

_SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check(config: Any) -> None:
    """Raise :class:`ConfigError` on a bound that is no number above zero, or a skip list that is none."""
    from qhub_fp8.config import check_names

    bound = config.activation_scale_ub
    number = isinstance(bound, (int, float)) and not isinstance(bound, bool)
    if bound is not None and not (number and math.isfinite(bound) and bound > 0):
        raise ConfigError(f"activation_scale_ub={bound!r} of an fbgemm_fp8 config: it is a number above 0, or None")
    check_names("fbgemm_fp8", "modules_to_not_convert", config.modules_to_not_convert)


def layout_of(config: Any, out_features: int, in_features: int) -> Float8:
    """Return the layout of an (out_features, in_features) matrix."""
    bound = config.activation_scale_ub
    return Float8(
        out_features=out_features,
        in_features=in_features,
        grid=Grid.along_k(in_features),
        activation=Activation(kind="float8", limit=None if bound is None else float(bound)),
    )


class FbgemmFormat(Format):
    """Translates between float8 rows and the entries of ``FbgemmFp8Linear``."""

    @property
    def markers(self) -> frozenset[str]:
        return frozenset({"weight_scale"})

    @property
    def names(self) -> frozenset[str]:
        return frozenset({"weight", "weight_scale", "input_scale_ub"})

    def entries(self, layout: Layout) -> Mapping[str, Entry]:
        return {
            "weight": Entry((layout.out_features, layout.in_features), (torch.float8_e4m3fn,)),
            "weight_scale": Entry((layout.out_features, 1), _SCALE_DTYPES),
            # Written by older versions of transformers: the config's bound once more.
            "input_scale_ub": Entry((1,), _SCALE_DTYPES, required=False),
        }

    def pack(self, layout: Layout, parts: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        return {"weight": parts["qweight"], "weight_scale": parts["scales"]}

    def unpack(self, layout: Layout, entries: Mapping[str, Tensor]) -> tuple[Layout, dict[str, Tensor]]:
        from qhub_fp8.entries import positive_scale, scalar

        self.check(layout, entries, "an fbgemm_fp8 config")
        assert isinstance(layout, Float8)
        if "input_scale_ub" in entries and layout.activation.limit is not None:
            bound = float(scalar("input_scale_ub", entries["input_scale_ub"]))
            if bound != layout.activation.limit:
                raise LayoutError(
                    f"entry 'input_scale_ub' is {bound}, the config's activation_scale_ub {layout.activation.limit}"
                )
        return layout, {
            "qweight": entries["weight"],
            "scales": positive_scale("weight_scale", entries["weight_scale"]),
        }


@hookimpl
def qhub_config() -> ConfigSpec:
    """Describe transformers' own FbgemmFp8Config."""
    return ConfigSpec(
        cls="transformers:FbgemmFp8Config",
        keys=frozenset({"quant_method"}),
        check=check,
        skip="modules_to_not_convert",
        presets={"rows": {}},
        from_options=from_options,
    )


def from_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of FbgemmFp8Config for command-line ``options``; 8 ``bits`` are understood."""
    values = dict(options)
    if values.pop("bits", 8) != 8:
        raise ConfigError(f"bits={options['bits']} of an fbgemm_fp8 config: its floats have 8")
    return values


@hookimpl
def qhub_plan(config: Any, weights: Sequence[WeightInfo]) -> Mapping[str, LayerPlan | Skip]:
    """Plan every linear weight, fused experts included."""
    return {
        weight.name: Skip("fbgemm_fp8 quantizes linear layers")
        if weight.kind == "embedding"
        else LayerPlan(layout_of(config, weight.out_features, weight.in_features), rows_independent=True)
        for weight in weights
    }


@hookimpl
def qhub_quantize(weight: Tensor, layout: Layout, statistics: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Put the largest magnitude of each row on 448, and round to nearest."""
    from qhub_fp8.rounding import quantize

    return quantize(weight, layout, statistics)


@hookimpl
def qhub_format() -> Format:
    """Return the entries of FbgemmFp8Linear."""
    return FbgemmFormat()


@hookimpl
def qhub_adapter() -> AdapterPolicy:
    """Let each write choose between the scales it finds and refitted ones."""
    return AdapterPolicy(grid="best")
