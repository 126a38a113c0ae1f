"""The qhub plugin of the method ``torchao``: int8, intx, int4 and float8 weights, without the torchao package.

words.py       torchao's JSON: what its config objects are written as
kinds.py       the kinds of config that are offered, with their fields
strings.py     the old strings ("int4_weight_only") as configs
initialize.py  transformers' TorchAoConfig, made without torchao (torchao_config.py, config.py)
settings.py    what a config says of one weight, and the layout that follows (reading.py: from the JSON)
plan.py        which weight gets which settings
integers.py, int4.py, hqq.py, float8.py, quantize.py   the numbers
tiles.py       the order in which tinygemm's tiles hold 4-bit codes
format.py      checkpoint entries (plain.py, packed.py), header.py: what the file's header says of them
adopt.py       other methods' numbers as torchao's tensors
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
    """Describe transformers' own TorchAoConfig."""
    from qhub_torchao.config import spec

    return spec()


@hookimpl
def qhub_plan(config: Any, weights: Sequence[WeightInfo]) -> Mapping[str, LayerPlan | Skip]:
    """Plan every linear weight, and embeddings where the config asks for them."""
    from qhub_torchao.plan import plan

    return plan(config, weights)


@hookimpl
def qhub_quantize(config: Any, weight: Tensor, layout: Layout) -> Mapping[str, Tensor]:
    """Choose the numbers that torchao chooses."""
    from qhub_torchao.quantize import quantize

    return quantize(weight, layout, config)


@hookimpl
def qhub_format(config: Any) -> Format:
    """Return the entries of torchao's flattened tensors."""
    from qhub_torchao.format import TorchAoFormat

    return TorchAoFormat(config)


@hookimpl
def qhub_adapter() -> AdapterPolicy:
    """Let each write choose between the grid it finds and one refitted to the new values."""
    from qhub.merging import AdapterPolicy

    return AdapterPolicy(grid="best")


@hookimpl
def qhub_adopt(layouts: Mapping[str, Layout], others: Sequence[str], options: Mapping[str, Any]) -> Adoption:
    """Hold integers with whole zeros and float8 weights in torchao's tensors."""
    from qhub_torchao.adopt import adopt

    return adopt(layouts, others, options)


@hookimpl
def qhub_doctor() -> Iterable[Finding]:
    """Say whether the torchao package is here."""
    from qhub_torchao.config import findings

    return findings()
