"""The qhub plugin of the method ``quip``: loads and runs QuIP# checkpoints, without QuIP#'s CUDA code.

Files::

    config.py    what ``quip_params`` may say
    lattices.py  the codebooks: E8P and the 256 vectors of E8 for 3 bits
    hadamard.py  the Hadamard matrices of sizes that are no power of two
    packing.py   the order of bits in ``Qidxs``
    plan.py      the layout of each layer
    format.py    QuIP#'s checkpoint entries
    kernel.py    a product that rotates inputs instead of the weight
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qhub import hookimpl

if TYPE_CHECKING:
    from qhub.config import ConfigSpec
    from qhub.formats import Format
    from qhub.kernels import KernelSpec
    from qhub.merging import AdapterPolicy
    from qhub.plan import LayerPlan, Skip, WeightInfo
    from qhub.reports import Finding


@hookimpl
def qhub_config() -> ConfigSpec:
    """Describe QuIP#'s ``quip_params``."""
    from qhub_quip.config import spec

    return spec()


@hookimpl
def qhub_plan(config: Any, weights: Sequence[WeightInfo]) -> Mapping[str, LayerPlan | Skip]:
    """Plan every linear weight, fused experts included."""
    from qhub_quip.plan import plan

    return plan(config, weights)


@hookimpl
def qhub_format(config: Any) -> Format:
    """Return QuIP#'s own checkpoint entries."""
    from qhub_quip.format import QuipFormat

    return QuipFormat(config)


@hookimpl
def qhub_adapter() -> AdapterPolicy:
    """Let each write choose between the scale it finds and a refitted one; signs and rotations stay."""
    from qhub_quip.plan import merge_policy

    return merge_policy()


@hookimpl
def qhub_kernels() -> Iterable[KernelSpec]:
    """Offer the product that rotates inputs instead of the weight, on any device."""
    from qhub.kernels import KernelSpec

    return [
        KernelSpec(
            name="codebook-rotated",
            impl="qhub_quip.kernel:linear",
            layout="codebook",
            transforms=True,
            accepts="qhub_quip.kernel:accepts",
        )
    ]


@hookimpl
def qhub_doctor() -> Iterable[Finding]:
    """Say that checkpoints load, and what does not work."""
    from qhub.reports import Finding

    return [
        Finding(
            "ok",
            "quip",
            "loads, runs, fine-tunes and saves QuIP# checkpoints of 2, 3 and 4 bits; quantizing dense models with "
            "QuIP# is not offered",
        )
    ]
