"""The qhub plugin of the method ``awq``: quantizes, reads, runs and writes AWQ, without autoawq or gptqmodel.

Files::

    config.py      which keys and values a config may hold, and what it asks of the calibration
    awq_config.py  transformers' AwqConfig, which keeps every key of a config.json
    initialize.py  lets an AwqConfig keep its arguments, and be written without data in it
    plan.py        the layout of each layer, and which layers a format cannot hold
    words.py       the packings: nibbles in 32-bit words, and the interleaved 16-bit words
    format.py      the checkpoint entries of gemm, gemv, gemv_fast and llm-awq
    rounding.py    grids of one scale and one whole zero per group, and what rounding to them costs
    clipping.py    the search for each group's grid: what ``qhub_quantize`` does
    scaling.py     the search for input scales: what ``qhub_equalize`` does
    noise.py       a smooth estimate of rounding errors, whose minimum gives input scales to try
"""

from __future__ import annotations

import importlib.util
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
    """Describe transformers' own AwqConfig."""
    from qhub_awq.config import spec

    return spec()


@hookimpl
def qhub_plan(config: Any, weights: Sequence[WeightInfo]) -> Mapping[str, LayerPlan | Skip]:
    """Plan every linear weight that the format can hold."""
    from qhub_awq.plan import plan

    return plan(config, weights)


@hookimpl
def qhub_calibration(config: Any) -> CalibrationOptions:
    """Take data, tokenizer and lengths from the config."""
    from qhub.integrations.config_classes import calibration_of

    return calibration_of(config)


@hookimpl
def qhub_equalize(
    weights: Mapping[str, Tensor], layouts: Mapping[str, Layout], statistics: Mapping[str, Tensor], tied: Tensor | None
) -> Tensor | None:
    """Search the input scales under which rounding moves the layers' outputs least."""
    from qhub_awq.scaling import search_scales

    return search_scales(weights, layouts, statistics, tied)


@hookimpl
def qhub_quantize(weight: Tensor, layout: Layout, statistics: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Search each group's clipping range, then round to nearest."""
    from qhub_awq.clipping import quantize

    return quantize(weight, layout, statistics)


@hookimpl
def qhub_format(config: Any) -> Format:
    """Return the checkpoint entries of the config's format."""
    from qhub_awq.format import format_of

    return format_of(config)


@hookimpl
def qhub_adapter() -> AdapterPolicy:
    """Let each write choose between the grid it finds and one refitted to the new values."""
    from qhub_awq.plan import merge_policy

    return merge_policy()


@hookimpl
def qhub_doctor() -> Iterable[Finding]:
    """Say that everything works here, and which other libraries are not used."""
    from qhub.reports import Finding

    message = "quantizes, loads, runs and saves AWQ in the formats gemm, gemv, gemv_fast and llm-awq"
    others = [name for name in ("awq", "gptqmodel") if importlib.util.find_spec(name) is not None]
    if others:
        message += f"; {' and '.join(others)} installed too, qhub does not use it"
    return [Finding("ok", "awq", message)]


@hookimpl
def qhub_adopt(layouts: Mapping[str, Layout], others: Sequence[str], options: Mapping[str, Any]) -> Adoption:
    from qhub_awq.adopt import adopt

    return adopt(layouts, others, options)
