"""The qhub plugin of the method ``gptq``: reads, runs and writes GPTQ checkpoints, without gptqmodel or optimum.

Files::

    config.py       which keys and values a config may hold
    gptq_config.py  transformers' GPTQConfig, which keeps every key of a config.json
    dynamic.py      gptqmodel's overrides and exclusions by module
    plan.py         the layout of each layer, and what a merge costs
    words.py        strings of bits in 32-bit words, and the zeros of format v1
    order.py        group indices (act-order) to and from permutations
    format.py       the checkpoint entries
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
    """Describe transformers' own GPTQConfig."""
    from qhub_gptq.config import spec

    return spec()


@hookimpl
def qhub_plan(config: Any, weights: Sequence[WeightInfo]) -> Mapping[str, LayerPlan | Skip]:
    """Plan every linear weight that the config does not exclude."""
    from qhub_gptq.plan import plan

    return plan(config, weights)


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
    """Say that checkpoints load, and what does not work."""
    from qhub.reports import Finding

    message = "loads, runs and saves GPTQ checkpoints; this version does not quantize dense models"
    others = [name for name in ("gptqmodel", "auto_gptq") if importlib.util.find_spec(name) is not None]
    if others:
        message += f"; {' and '.join(others)} installed too, qhub does not use it"
    return [Finding("ok", "gptq", message)]
