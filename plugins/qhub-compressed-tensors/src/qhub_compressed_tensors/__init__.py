"""The qhub plugin of the method ``compressed-tensors``: what vLLM and SGLang read, without the library of that name.

Files::

    config.py      which keys and values a config may hold
    ct_config.py   transformers' CompressedTensorsConfig as plain data
    initialize.py  how transformers' own class is made without the library
    presets.py     the schemes that have a name
    scheme.py      what a config says of numbers
    matching.py    which group a module belongs to
    layout.py      from a scheme to a layout
    plan.py        the layout of each layer
    quantize.py    one weight to its layout's tensors, rounded to nearest
    format.py      the checkpoint entries
    inputs.py      those that say how inputs are rounded
    words.py       strings of bits in 32-bit words
    order.py       group indices (act-order) to and from permutations
    adopt.py       another method's layouts as schemes of this one
    targets.py     few and exact expressions for many names
    record.py      what a config has to say of a file that is being written
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
    """Describe transformers' own CompressedTensorsConfig."""
    from qhub_compressed_tensors.config import spec

    return spec()


@hookimpl
def qhub_plan(config: Any, weights: Sequence[WeightInfo]) -> Mapping[str, LayerPlan | Skip]:
    """Plan every linear weight that a group of the config targets."""
    from qhub_compressed_tensors.plan import plan

    return plan(config, weights)


@hookimpl
def qhub_quantize(weight: Tensor, layout: Layout, statistics: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Round to nearest."""
    from qhub_compressed_tensors.quantize import quantize

    return quantize(weight, layout, statistics)


@hookimpl
def qhub_format(config: Any) -> Format:
    """Return the checkpoint entries; the layout of each weight tells which format it has."""
    from qhub_compressed_tensors.format import CompressedTensorsFormat

    return CompressedTensorsFormat(dense=config.format == "dense")


@hookimpl
def qhub_adopt(layouts: Mapping[str, Layout], others: Sequence[str], options: Mapping[str, Any]) -> Adoption:
    """Choose a scheme for each kind of layout."""
    from qhub_compressed_tensors.adopt import adopt

    return adopt(layouts, others, options)


@hookimpl
def qhub_adapter() -> AdapterPolicy:
    """Let each write choose between the grid it finds and one refitted to the new values."""
    from qhub_compressed_tensors.plan import merge_policy

    return merge_policy()


@hookimpl
def qhub_doctor() -> Iterable[Finding]:
    """Say that everything works here, and that the library is not used."""
    from qhub_compressed_tensors.config import findings

    return findings()
