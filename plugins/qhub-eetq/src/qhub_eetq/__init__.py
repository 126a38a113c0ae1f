"""The qhub plugin of the method ``eetq``: int8 weights under a scale per output channel, without EETQ's kernels.

config.py      which values of transformers' EetqConfig are offered
plan.py        which weights get the layout, and which the file format cannot hold
numbers.py     the codes and scales that EETQ chooses
interleave.py  the order of the bytes in a file
format.py      EETQ's checkpoint entries
adopting.py    what another method's numbers become here
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qhub import hookimpl

if TYPE_CHECKING:
    from torch import Tensor

    from qhub.config import ConfigSpec
    from qhub.formats import Format
    from qhub.layouts import Layout
    from qhub.plan import Adoption, LayerPlan, Skip, WeightInfo
    from qhub.reports import Finding


@hookimpl
def qhub_config() -> ConfigSpec:
    """Describe transformers' own EetqConfig."""
    from qhub_eetq.config import spec

    return spec()


@hookimpl
def qhub_plan(weights: Sequence[WeightInfo]) -> Mapping[str, LayerPlan | Skip]:
    """Plan every linear weight, fused experts included, whose shape the format can hold."""
    from qhub_eetq.plan import plan

    return plan(weights)


@hookimpl
def qhub_quantize(weight: Tensor) -> Mapping[str, Tensor]:
    """Choose the numbers that EETQ chooses."""
    from qhub_eetq.numbers import quantize_rows

    return quantize_rows(weight)


@hookimpl
def qhub_format() -> Format:
    """Return EETQ's checkpoint entries."""
    from qhub_eetq.format import EetqFormat

    return EetqFormat()


@hookimpl
def qhub_adopt(layouts: Mapping[str, Layout], others: Sequence[str], options: Mapping[str, Any]) -> Adoption:
    """Hold another method's numbers as int8 rows."""
    from qhub_eetq.adopting import adopt

    return adopt(layouts, others, options)


@hookimpl
def qhub_doctor() -> Iterable[Finding]:
    """Say that neither a GPU nor downloaded kernels are needed."""
    from qhub.reports import Finding

    message = "int8 weights are quantized, loaded, run and saved on any device, without EETQ's GPU kernels"
    if importlib.util.find_spec("EETQ") is not None:
        message += "; the EETQ package is installed too, qhub does not use it (QHUB_NATIVE=eetq hands the method back)"
    return [Finding("ok", "eetq", message)]
