"""The qhub plugin of the method ``aqlm``: loads and runs additive quantization, without the aqlm package.

Files::

    config.py  which values of transformers' AqlmConfig are offered
    plan.py    the layout of each layer, and what a merge costs
    format.py  aqlm's checkpoint entries
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qhub import hookimpl

if TYPE_CHECKING:
    from qhub.config import ConfigSpec
    from qhub.formats import Format
    from qhub.merging import AdapterPolicy
    from qhub.plan import LayerPlan, Skip, WeightInfo
    from qhub.reports import Finding


@hookimpl
def qhub_config() -> ConfigSpec:
    """Describe transformers' own AqlmConfig."""
    from qhub_aqlm.config import spec

    return spec()


@hookimpl
def qhub_plan(config: Any, weights: Sequence[WeightInfo]) -> Mapping[str, LayerPlan | Skip]:
    """Plan every linear weight that the config does not list."""
    from qhub_aqlm.plan import plan

    return plan(config, weights)


@hookimpl
def qhub_format() -> Format:
    """Return aqlm's own checkpoint entries."""
    from qhub_aqlm.format import AqlmFormat

    return AqlmFormat()


@hookimpl
def qhub_adapter() -> AdapterPolicy:
    """Let each write choose between the scales it finds and refitted ones; the codebooks stay."""
    from qhub_aqlm.plan import merge_policy

    return merge_policy()


@hookimpl
def qhub_doctor() -> Iterable[Finding]:
    """Say that checkpoints load, and what does not work."""
    from qhub.reports import Finding

    message = "loads, runs and saves AQLM checkpoints; quantizing dense models with AQLM is not offered"
    if importlib.util.find_spec("aqlm") is not None:
        message += "; the aqlm package is installed too, qhub does not use it"
    return [Finding("ok", "aqlm", message)]
