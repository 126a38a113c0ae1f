"""The qhub plugin of the method ``hqq``: half-quadratic quantization, without the hqq package.

Files::

    settings.py  what a config says of one layer, and the layout that follows
    config.py    transformers' HqqConfig: what it may hold (initialize.py, hqq_config.py: made without the hqq package)
    plan.py      which layer gets which settings
    solver.py    the numbers
    slabs.py     hqq's packing
    format.py    hqq's checkpoint entries
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qhub import hookimpl

if TYPE_CHECKING:
    from torch import Tensor

    from qhub.config import ConfigSpec
    from qhub.formats import Format
    from qhub.layouts import Layout
    from qhub.merging import AdapterPolicy
    from qhub.plan import Adoption, LayerPlan, Skip, WeightInfo
    from qhub.reports import Finding


@hookimpl
def qhub_config() -> ConfigSpec:
    """Describe transformers' own HqqConfig."""
    from qhub_hqq.config import spec

    return spec()


@hookimpl
def qhub_plan(config: Any, weights: Sequence[WeightInfo]) -> Mapping[str, LayerPlan | Skip]:
    """Plan every linear weight, fused experts included."""
    from qhub_hqq.plan import plan

    return plan(config, weights)


@hookimpl
def qhub_quantize(config: Any, weight: Tensor, layout: Layout) -> Mapping[str, Tensor]:
    """Choose the numbers that hqq chooses on a CPU."""
    from qhub_hqq.settings import settings_of, settings_on
    from qhub_hqq.solver import quantize

    return quantize(weight, layout, settings_on(layout, settings_of(config)))


@hookimpl
def qhub_format(config: Any) -> Format:
    """Return hqq's own checkpoint entries."""
    from qhub_hqq.format import HqqFormat
    from qhub_hqq.settings import settings_of

    return HqqFormat(settings_of(config))


@hookimpl
def qhub_adapter() -> AdapterPolicy:
    """Let each write choose between the grid it finds and one refitted to the new values."""
    from qhub_hqq.plan import merge_policy

    return merge_policy()


@hookimpl
def qhub_doctor() -> Iterable[Finding]:
    """Say whether the hqq package is here."""
    from qhub_hqq.config import findings

    return findings()


@hookimpl
def qhub_adopt(layouts: Mapping[str, Layout], options: Mapping[str, Any]) -> Adoption:
    from qhub_hqq.adopt import adopt

    return adopt(layouts, options)
