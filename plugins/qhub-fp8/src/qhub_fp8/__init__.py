"""The qhub plugin of the method ``fp8``: 8-bit floats per tensor, per row or in blocks; and, in modules of their own,
of ``fbgemm_fp8``, ``inc``, ``mxfp4`` and ``nvfp4``.

Files::

    settings.py    what a FineGrainedFP8Config says, and the layout that follows
    config.py      which keys and values it may hold
    initialize.py  lets transformers' class keep them; config_class.py: the class that reads config.json
    plan.py        the layout of each layer, and what is adopted from other methods
    rounding.py    the numbers of every float8 method: scales, codes, scales of inputs
    format.py      the checkpoint entries of fp8's dialects
    entries.py     what the formats of this package share
    fbgemm.py      fbgemm_fp8: rows under a scale each
    inc/           Intel Neural Compressor's vocabulary and workflow
    mxfp4.py       mxfp4: blocks and scales as gpt-oss files hold them
    nvfp4.py       nvfp4: packed codes as ModelOpt files hold them
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
    """Describe transformers' own FineGrainedFP8Config."""
    from qhub_fp8.config import spec

    return spec()


@hookimpl
def qhub_plan(config: Any, weights: Sequence[WeightInfo]) -> Mapping[str, LayerPlan | Skip]:
    """Plan every linear weight, fused experts included."""
    from qhub_fp8.plan import plan

    return plan(config, weights)


@hookimpl
def qhub_calibration(config: Any) -> CalibrationOptions:
    """Take data and tokenizer from the config."""
    from qhub_fp8.config import calibration

    return calibration(config)


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
def qhub_adopt(layouts: Mapping[str, Layout], options: Mapping[str, Any]) -> Adoption:
    """Hold float8 weights of any grid that one block size covers."""
    from qhub_fp8.plan import adopt

    return adopt(layouts, options)


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
