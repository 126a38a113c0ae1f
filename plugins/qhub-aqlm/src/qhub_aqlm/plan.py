"""The layout of each layer: one for all, whatever the config does not list; and what a merge costs on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qhub.errors import ConfigError
from qhub.layouts import Codebook, Grid
from qhub.merging import AdapterPolicy
from qhub.plan import LayerPlan, Skip, WeightInfo, matches

__all__ = ["layout_of", "merge_policy", "plan"]


def plan(config: Any, weights: Sequence[WeightInfo]) -> Mapping[str, LayerPlan | Skip]:
    """Return the layout of each weight; raises :class:`ConfigError` naming the module that the groups do not divide.

    ``linear_weights_not_to_quantize`` names parameters (``lm_head.weight``) in published configs, and modules
    (``lm_head``) in those that transformers 5 understands; both are taken.
    """
    dense = [name.removesuffix(".weight") for name in config.linear_weights_not_to_quantize or ()]
    plans: dict[str, LayerPlan | Skip] = {}
    for weight in weights:
        if weight.kind == "embedding":
            plans[weight.name] = Skip("aqlm quantizes linear layers")
        elif matches(weight.module, dense) is not None:
            plans[weight.name] = Skip("listed in linear_weights_not_to_quantize")
        else:
            plans[weight.name] = LayerPlan(layout_of(config, weight))
    return plans


def layout_of(config: Any, weight: WeightInfo) -> Codebook:
    """Return the layout of ``weight``: sums of one vector from each codebook, one scale for ``out_group_size`` rows.

    Source: Egiazarian et al. 2024, "Extreme Compression of Large Language Models via Additive Quantization", eq. 3, and
    ``QuantizedLinear`` in aqlm 1.1.7 (aqlm/inference.py).
    """
    n, k = weight.out_features, weight.in_features
    out_group, in_group = config.out_group_size, config.in_group_size
    if n % out_group or k % in_group:
        raise ConfigError(
            f"groups of {out_group}x{in_group} weights (out_group_size, in_group_size) do not divide {weight.module}, "
            f"which is {n}x{k}: list it in linear_weights_not_to_quantize if the checkpoint stores it dense"
        )
    return Codebook(
        out_features=n,
        in_features=k,
        nbits=(config.nbits_per_codebook,) * config.num_codebooks,
        out_group=out_group,
        in_group=in_group,
        grid=Grid("block", out_group, k),
    )


def merge_policy() -> AdapterPolicy:
    """Return how an update is written: nearest vectors of the codebooks that are there, scales kept or refitted.

    The codebooks were fitted to the old weight, so little of an update arrives. Measured on a 2x8 model (7 layers of a
    tiny Llama, random rank-8 updates), what is lost as relative error of the weight with the update in it::

        update    1 %    3 %    10 %   30 %
        lost      1.0    3.0    9.7    22.4 %

    Rounded to nearest, as by ``weight.copy_``, an update of some percent, which is what fine-tuning gives, is lost
    altogether. Adapters that are merged through PEFT have their rounding errors spread by the layer's inputs
    (:mod:`qhub.merging.rounding`).
    """
    return AdapterPolicy(grid="best")
