"""Which weight becomes which type of block, as llama.cpp would choose for the file type."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qhub.errors import ConfigError
from qhub.layouts.blocks import Blocks
from qhub.plan import LayerPlan, Skip, WeightInfo
from qhub_gguf.names import Mapping as Names
from qhub_gguf.records import record_of
from qhub_gguf.types import TYPES

__all__ = ["plan_weights", "tensor_types"]


def plan_weights(config: Any, weights: Sequence[WeightInfo], model_config: Any) -> dict[str, LayerPlan | Skip]:
    """Return the plan of ``weights``: blocks of the type that the mix gives their tensor."""
    types = tensor_types(config, weights, model_config)
    statistics = ("mean_square",) if config.calibrate else ()
    plan: dict[str, LayerPlan | Skip] = {}
    for weight in weights:
        kind = TYPES[types[weight.name]]
        if kind.dtype is not None:
            plan[weight.name] = Skip(f"{config.file_type} keeps it in {kind.name}")
            continue
        if weight.in_features % kind.count:
            raise ConfigError(
                f"gguf: {kind.name} holds runs of {kind.count} weights, which do not divide the {weight.in_features} "
                f"input features of {weight.name}: give it another type in tensor_types"
            )
        layout = Blocks(out_features=weight.out_features, in_features=weight.in_features, record=record_of(kind.name))
        own = statistics if weight.kind != "embedding" else ()
        plan[weight.name] = LayerPlan(layout, statistics=own, rows_independent=True)
    return plan


def tensor_types(config: Any, weights: Sequence[WeightInfo], model_config: Any) -> dict[str, str]:
    """Return the name of a ggml type for each of ``weights``, by parameter."""
    from qhub_gguf.mixes import types_for

    shapes = {weight.name: _shape(weight) for weight in weights}
    tensors = _tensor_names(weights, model_config)
    by_tensor = {tensor: shapes[name] for name, tensor in tensors.items()}
    chosen = types_for(config.file_type, model_config, by_tensor, overrides=config.tensor_types)
    return {name: chosen[tensor] for name, tensor in tensors.items()}


def _shape(weight: WeightInfo) -> tuple[int, ...]:
    matrix = (weight.out_features, weight.in_features)
    return matrix if weight.experts is None else (weight.experts, *matrix)


def _tensor_names(weights: Sequence[WeightInfo], model_config: Any) -> dict[str, str]:
    """Return one tensor of the file for each parameter: the first, where several make it up."""
    if model_config is None:
        # No model to ask: the names decide nothing but what they say themselves.
        return {weight.name: weight.name for weight in weights}
    names = Names.for_config(model_config)
    prefix = any(weight.name.startswith((names.base_prefix, "lm_head")) for weight in weights)
    found = names.of_model([weight.name for weight in weights], prefix)
    return {name: entries[0].ggml for name, entries in found.items()}
