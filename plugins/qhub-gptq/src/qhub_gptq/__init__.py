"""The qhub plugin of the method ``gptq``: quantizes, reads, runs and writes, without gptqmodel or optimum.

Files::

    config.py       which keys and values a config may hold, and what they ask for
    gptq_config.py  transformers' GPTQConfig, which keeps every key of a config.json
    initialize.py   how transformers' own class is made without optimum, no argument lost
    dynamic.py      gptqmodel's overrides and exclusions by module
    plan.py         the layout of each layer, and what a merge costs
    quantize.py     one weight to its layout's tensors
    hessian.py      the input's second moments: damping, order, factor
    grids.py        scales and zeros
    solver.py       GPTQ itself
    fused.py        whether a GPU has kernels for the innermost loops of solver.py and refine.py
    fused_kernels.py  those kernels, in Triton
    refine.py       the quality option's coordinate descent
    words.py        strings of bits in 32-bit words, and the zeros of format v1
    order.py        group indices (act-order) to and from permutations
    format.py       the checkpoint entries
"""

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
    """Describe transformers' own GPTQConfig."""
    from qhub_gptq.config import spec

    return spec()


@hookimpl
def qhub_plan(config: Any, weights: Sequence[WeightInfo]) -> Mapping[str, LayerPlan | Skip]:
    """Plan every linear weight that the config does not exclude."""
    from qhub_gptq.plan import plan

    return plan(config, weights)


@hookimpl
def qhub_calibration(config: Any) -> CalibrationOptions:
    """Take data, tokenizer and lengths from the config."""
    from qhub.integrations.config_classes import calibration_of

    return calibration_of(config)


@hookimpl
def qhub_quantize(
    config: Any, weight: Tensor, layout: Layout, statistics: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    """Choose codes one feature after the other, errors spread over those to come."""
    from qhub_gptq.config import solver_options
    from qhub_gptq.quantize import quantize

    return quantize(weight, layout, statistics, solver_options(config, layout))


@hookimpl
def qhub_format(config: Any) -> Format:
    """Return the checkpoint entries of format v1 or v2."""
    from qhub_gptq.format import GptqFormat

    return GptqFormat(v1=config.format == "gptq")


@hookimpl
def qhub_adapter() -> AdapterPolicy:
    """Let each write choose between the grid it finds and one refitted to the new values."""
    from qhub_gptq.plan import merge_policy

    return merge_policy()


@hookimpl
def qhub_doctor() -> Iterable[Finding]:
    """Say that everything works here, and which other libraries are not used."""
    from qhub_gptq.config import findings

    return findings()


@hookimpl
def qhub_adopt(layouts: Mapping[str, Layout], options: Mapping[str, Any]) -> Adoption:
    from qhub_gptq.adopt import adopt

    return adopt(layouts, options)
