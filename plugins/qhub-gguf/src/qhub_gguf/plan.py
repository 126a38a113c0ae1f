"""Which weight becomes which type of block, as llama.cpp would choose for the file type."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from qhub.errors import CheckpointError, ConfigError
from qhub.layouts.blocks import Blocks
from qhub.plan import LayerPlan, Skip, WeightInfo
from qhub_gguf.imatrix import ImportanceMatrix
from qhub_gguf.names import Mapping as Names
from qhub_gguf.records import record_of
from qhub_gguf.types import TYPES

__all__ = ["importance_of", "plan_weights", "tensor_types"]


def plan_weights(config: Any, weights: Sequence[WeightInfo], model_config: Any) -> dict[str, LayerPlan | Skip]:
    """Return the plan of ``weights``: blocks of the type that the mix gives their tensor."""
    types = tensor_types(config, weights, model_config)
    if config.imatrix is not None:
        config.importance = _importance(config.imatrix, weights, model_config)
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
    """Return the name of a ggml type for each of ``weights``, by parameter: the first tensor's where several make it
    up."""
    from qhub_gguf.mixes import types_for

    by_name = {weight.name: weight for weight in weights}
    tensors = _tensor_names(weights, model_config)
    shapes = {tensor: _shape(by_name[name], len(entries)) for name, entries in tensors.items() for tensor in entries}
    chosen = types_for(config.file_type, model_config, shapes, overrides=config.tensor_types, importance=weighs(config))
    return {name: chosen[entries[0]] for name, entries in tensors.items()}


def weighs(config: Any) -> bool:
    """Return whether errors are weighted by what layers take in."""
    return config.imatrix is not None or config.calibrate


def importance_of(config: Any, name: str, expert: int | None) -> Tensor | None:
    """Return what the importance matrix of ``config`` says of a weight, (K,); None where it says nothing."""
    found = getattr(config, "importance", {}).get(name)
    return found if found is None or found.ndim == 1 else found[expert or 0]


def _importance(path: str, weights: Sequence[WeightInfo], model_config: Any) -> dict[str, Tensor]:
    matrix = ImportanceMatrix.read(path)
    tensors = _tensor_names(weights, model_config)
    found = {weight.name: matrix.of(tensors[weight.name][0], weight.in_features) for weight in weights}
    known = {name: values for name, values in found.items() if values is not None}
    if not known:
        raise CheckpointError(
            f"the importance matrix {path} names none of this model's tensors, {list(tensors.values())[:2]}"
        )
    return known


def _shape(weight: WeightInfo, parts: int) -> tuple[int, ...]:
    """Return the shape of one of ``parts`` tensors that make up a weight."""
    matrix = (weight.out_features // parts, weight.in_features)
    return matrix if weight.experts is None else (weight.experts, *matrix)


def _tensor_names(weights: Sequence[WeightInfo], model_config: Any) -> dict[str, list[str]]:
    """Return the tensors of the file that make up each parameter."""
    if model_config is None:
        # No model to ask: the names decide nothing but what they say themselves.
        return {weight.name: [weight.name] for weight in weights}
    names = Names.for_config(model_config)
    prefix = any(weight.name.startswith((names.base_prefix, "lm_head")) for weight in weights)
    found = names.of_model([weight.name for weight in weights], prefix)
    return {name: [entry.ggml for entry in entries] for name, entries in found.items()}
