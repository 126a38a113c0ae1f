"""The qhub plugin of the method ``bitsandbytes``: LLM.int8(), FP4 and NF4, without the bitsandbytes package.

config.py            which values of transformers' BitsAndBytesConfig are offered
plan.py, layout.py   which weights get which layout
merging.py           how an update goes back onto a layout
tables.py            the value tables
blockwise.py         the numbers of FP4 and NF4, and of nested scales
int8.py              the numbers of LLM.int8()
format.py            checkpoint entries: blockwise_format.py, int8_format.py, state.py, entries.py
doctor.py            what ``qhub doctor`` says
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
    """Describe transformers' own BitsAndBytesConfig."""
    from qhub_bitsandbytes.config import spec

    return spec()


@hookimpl
def qhub_plan(config: Any, weights: Sequence[WeightInfo]) -> Mapping[str, LayerPlan | Skip]:
    """Plan every linear weight, fused experts included."""
    from qhub_bitsandbytes.plan import plan

    return plan(config, weights)


@hookimpl
def qhub_quantize(config: Any, weight: Tensor, layout: Layout) -> Mapping[str, Tensor]:
    """Choose the numbers that bitsandbytes chooses."""
    if config.load_in_8bit:
        from qhub_bitsandbytes.int8 import quantize_rows

        return quantize_rows(weight)
    from qhub_bitsandbytes.blockwise import quantize_blockwise

    return quantize_blockwise(weight, layout, config.bnb_4bit_quant_type)


@hookimpl
def qhub_format(config: Any) -> Format:
    """Return bitsandbytes' own checkpoint entries."""
    from qhub_bitsandbytes.format import checkpoint_format

    return checkpoint_format(config)


@hookimpl
def qhub_adapter(config: Any, layout: Layout) -> AdapterPolicy:
    """Say how an update goes back: on the grid that is nearer to it."""
    from qhub_bitsandbytes.merging import policy

    return policy()


@hookimpl
def qhub_doctor() -> Iterable[Finding]:
    """Say whether the bitsandbytes package is here."""
    from qhub_bitsandbytes.doctor import findings

    return findings()


@hookimpl
def qhub_adopt(layouts: Mapping[str, Layout], others: Sequence[str], options: Mapping[str, Any]) -> Adoption:
    from qhub_bitsandbytes.adopt import adopt

    return adopt(layouts, others, options)
