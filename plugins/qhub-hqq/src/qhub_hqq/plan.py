"""Which layer gets which settings: by the layer tags that transformers made up for HQQ."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from qhub.errors import ConfigError
from qhub.merging import AdapterPolicy
from qhub.plan import LayerPlan, Skip, WeightInfo
from qhub_hqq.settings import Settings, code_shape, settings_of

__all__ = ["layer_tag", "merge_policy", "plan"]


def layer_tag(module: str) -> str:
    """Return the tag of a module: its name without the parts "model", "layers" and the numbers.

    ``model.layers.31.self_attn.k_proj`` is tagged ``self_attn.k_proj``. Source: transformers 5.23,
    ``integrations/hqq.py``, ``name_to_linear_tag``.
    """
    return ".".join(part for part in module.split(".") if part not in ("model", "layers") and not part.isnumeric())


def plan(config: Any, weights: Sequence[WeightInfo]) -> Mapping[str, LayerPlan | Skip]:
    """Return the layout of each weight; raises :class:`ConfigError` naming the module that a group size does not fit.

    With one dictionary per layer tag, layers without an entry stay dense, as in transformers
    (``integrations/hqq.py``, ``prepare_for_hqq_linear``).
    """
    settings = settings_of(config)
    per_layer = None not in settings
    if (
        per_layer
        and weights
        and not any(layer_tag(one.module) in settings or _is_stored_expert(one) for one in weights)
    ):
        known = sorted({layer_tag(weight.module) for weight in weights})
        raise ConfigError(
            f"none of the layer tags {sorted(map(str, settings))} of this hqq config is in the model, whose tags are "
            f"{known}: write the keys of dynamic_config as these"
        )
    skipped = frozenset(config.skip_modules or ())
    plans: dict[str, LayerPlan | Skip] = {}
    for weight in weights:
        tag = layer_tag(weight.module)
        one = settings.get(tag if per_layer else None)
        if one is None and _is_stored_expert(weight):
            one = next(iter(settings.values()))
        if weight.kind == "embedding":
            plans[weight.name] = Skip("hqq quantizes linear layers")
        elif tag in skipped:
            plans[weight.name] = Skip(f"its tag {tag!r} is in skip_modules")
        elif one is None:
            plans[weight.name] = Skip(f"dynamic_config has no entry for its tag {tag!r}")
        else:
            plans[weight.name] = _plan_one(weight, one)
    return plans


def _is_stored_expert(weight: WeightInfo) -> bool:
    """Return whether ``weight`` is one expert in a file: its tag is not that of the fused weight that was quantized.

    Any of the settings will do for it, because a file says itself how a layer is stored (see :class:`HqqFormat`).
    """
    return weight.kind == "experts" and weight.experts is None


def _plan_one(weight: WeightInfo, settings: Settings) -> LayerPlan:
    layout = settings.layout(weight.out_features, weight.in_features, weight.module)
    # torch refuses to view bytes under a wider dtype where a row is no whole number of elements; 3-bit codes fill int32
    # words.
    row_bytes = code_shape(layout)[1] * (4 if settings.nbits == 3 else 1)
    if settings.view_as_float and math.gcd(row_bytes, weight.dtype.itemsize) != weight.dtype.itemsize:
        raise ConfigError(
            f"view_as_float: the rows of the packed codes of {weight.module} are {row_bytes} bytes, which is no whole "
            f"number of {weight.dtype} elements: choose another group size or axis, or view_as_float=False"
        )
    return LayerPlan(layout)


def merge_policy() -> AdapterPolicy:
    """Return how an update is written: on the old grid or on a refitted one, whichever is nearer to the new values.

    What is lost, as relative error of the weight with the update in it, mean over three matrices of a language model
    (doclm-26m), random rank-8 updates, groups of 64, axis 1::

        bits  quantizing cost   update of 1 %: old grid / refitted / hqq anew   update of 10 %: old / refitted / anew
        4     8.8 %             1.00 / 2.09 / 1.83 %                            7.81 / 7.60 / 7.74 %
        3     18.6 %            1.00 / 1.04 / 1.09 %                            9.78 / 9.64 / 10.11 %

    So an update far below the grid's own step (1 %) is lost: the nearest codes stay what they were, and a new grid adds
    more noise than the update is large. Solving the half-quadratic problem again is no better than a refit.

    That is rounding to nearest, all that ``weight.copy_`` can do. Adapters that are merged through PEFT have their
    rounding errors spread by the layer's inputs (:mod:`qhub.merging.rounding`), which keeps most of them.
    """
    return AdapterPolicy(grid="best")
