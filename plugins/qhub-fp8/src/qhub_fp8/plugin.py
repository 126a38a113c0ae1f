"""The qhub plugin of the method ``fp8``: 8-bit floats in blocks, per tensor or per row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qhub import hookimpl

if TYPE_CHECKING:
    from torch import Tensor

    from qhub.calibration import CalibrationOptions
    from qhub.config import ConfigSpec
    from qhub.formats import Format
    from qhub.layouts import Layout
    from qhub.merging import AdapterPolicy
    from qhub.plan import Adoption, LayerPlan, Skip, WeightInfo
    from qhub.reports import Finding


@hookimpl
def qhub_config() -> ConfigSpec:
    """Describe transformers' own FineGrainedFP8Config."""
    from qhub_fp8.config import spec

    return spec()


@hookimpl
def qhub_plan(config: Any, weights: Sequence[WeightInfo]) -> Mapping[str, LayerPlan | Skip]:
    """Plan every linear weight, fused experts included."""
    from qhub_fp8.plan import plan

    return plan(config, weights)


@hookimpl
def qhub_calibration(config: Any) -> CalibrationOptions | None:
    """Take data and tokenizer from the config, where inputs get stored scales."""
    from qhub_fp8.config import calibration
    from qhub_fp8.settings import settings_of

    return calibration(config) if settings_of(config).scheme == "static" else None


@hookimpl
def qhub_quantize(
    config: Any, weight: Tensor, layout: Layout, statistics: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    """Choose scales that put the largest magnitude on the format's, and round to nearest."""
    from qhub_fp8.rounding import quantize
    from qhub_fp8.settings import settings_of

    return quantize(weight, layout, statistics, powers_of_two=settings_of(config).powers_of_two)


@hookimpl
def qhub_format(config: Any) -> Format:
    """Return the entries of transformers' fine-grained files; per-tensor and per-row dialects are read too."""
    from qhub_fp8.format import Fp8Format
    from qhub_fp8.settings import settings_of

    return Fp8Format(settings_of(config))


@hookimpl
def qhub_adopt(layouts: Mapping[str, Layout], others: Sequence[str], options: Mapping[str, Any]) -> Adoption:
    """Hold float8 weights of any grid that one block size covers."""
    from qhub_fp8.plan import adopt

    return adopt(layouts, others, options)


@hookimpl
def qhub_adapter() -> AdapterPolicy:
    """Let each write choose between the scales it finds and refitted ones."""
    from qhub.merging import AdapterPolicy

    return AdapterPolicy(grid="best")


@hookimpl
def qhub_doctor() -> Iterable[Finding]:
    """Say where products run in 8 bits, and where they are emulated."""
    from qhub_fp8.config import findings

    return findings()
