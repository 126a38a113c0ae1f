"""Loads quantized weights: matches a checkpoint with a model and feeds it through transformers' own loop.

transformers loads by matching checkpoint keys with conversions. :class:`Router` is one more conversion that knows, for
every entry of a quantized matrix, which parameter it belongs to; it builds the quantized matrices and runs
transformers' own operations for the model (merging experts, joining gate and up) on them.
"""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import core_model_loading as host

from qhub.errors import CheckpointError, LayoutError, QhubError
from qhub.formats import Format
from qhub.integrations.transformers.checkpoint import (
    FileTensor,
    StoredWeight,
    check_entries,
    read_metadata,
    sort_entries,
)
from qhub.integrations.transformers.conversions import ExactConversion
from qhub.layouts import Layout
from qhub.merging import AdapterPolicy
from qhub.plan import LayerPlan, WeightInfo
from qhub.tensor import QuantizedTensor

__all__ = ["Route", "Router", "Source", "find_routes", "missing_names", "report"]

_SHOWN = 6


@dataclass
class Source:
    """Is one stored matrix on its way into a parameter. ``pattern``: of the host's conversion; None when it goes in as
    it is."""

    weight: StoredWeight
    info: WeightInfo
    pattern: str | None = None
    plan: LayerPlan | None = None


@dataclass
class Route:
    """Says how one parameter is made from stored matrices.

    ``stacked``: they are the experts of a fused parameter, saved one by one under its name. ``converter``: the host's
    conversion that joins them; None when there is none.
    """

    target: WeightInfo
    sources: list[Source]
    stacked: bool = False
    converter: Any = None


def report(title: str, problems: list[str]) -> CheckpointError:
    """Return one error that names the first problems and counts the rest."""
    shown = "; ".join(problems[:_SHOWN])
    more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    return CheckpointError(f"{title}: {shown}{more}. No model was loaded")


def find_routes(
    model: Any,
    weights: Mapping[str, WeightInfo],
    headers: dict[str, FileTensor],
    conversions: list[Any],
    fmt: Format,
) -> list[Route]:
    """Match the tensors of a checkpoint with the parameters of ``model``.

    Raises :class:`CheckpointError` for tensors that are missing, surplus, or of the wrong shape or kind. Heads that the
    checkpoint's own architecture does not have may be missing, as everywhere in transformers.
    """
    stored, dense = sort_entries(headers, fmt)
    names = _Names(model, conversions)
    routes: dict[str, Route] = {}
    problems: list[str] = []
    for prefix in sorted(stored, key=host.dot_natural_key):
        places = (names.of_matrix(name, weights) for name in (prefix, *fmt.aliases(prefix)))
        found = next((place for place in places if place is not None), None)
        if found is None:
            if names.must_exist(prefix):
                problems.append(f"{prefix} is stored quantized, but the model has no such weight to quantize")
            continue
        target, pattern, converter, stacked = found
        info = weights[target]
        route = routes.setdefault(target, Route(info, [], stacked, converter))
        rows = info.out_features
        if converter is not None and any(isinstance(op, host.Concatenate) for op in converter.operations):
            rows //= len(converter.source_patterns)
        if stored[prefix].stacked and (info.experts is None or converter is not None):
            problems.append(f"{prefix} is stored as the experts of a mixture, {target} of the model is none")
            continue
        whole = (info.experts is None and converter is None) or stored[prefix].stacked
        single = replace(info, name=target if whole else f"{prefix}.weight")
        single = replace(single, out_features=rows, experts=None, transposed=False, stored=prefix)
        route.sources.append(Source(stored[prefix], single, pattern))
    for route in routes.values():
        wanted = _matrices(route)
        if len(route.sources) != wanted:
            have = [source.weight.prefix for source in route.sources[:2]]
            problems.append(
                f"{route.target.name} is made of {wanted} matrices, found {len(route.sources)} ({', '.join(have)}, ...)"
            )
    dense = {key: tensor for key, tensor in dense.items() if not _adds_nothing(tensor, stored, names)}
    problems += names.compare(set(routes), dense)
    if problems:
        raise report("the checkpoint does not fit the model", problems)
    return list(routes.values())


def _adds_nothing(tensor: FileTensor, stored: Mapping[str, StoredWeight], names: _Names) -> bool:
    """Return whether ``tensor`` is a bias of zeros beside a quantized weight whose layer has none in the model.

    Some quantizers' layers always had a bias, so their checkpoints hold one for every layer.
    """
    prefix, _, local = tensor.key.rpartition(".")
    if local != "bias" or prefix not in stored or len(tensor.shape) != 1 or names.of(tensor.key)[0] in names.meta:
        return False
    if tensor.file.suffix != ".safetensors":
        return False
    return not bool(_read_later(tensor)().any())


def _matrices(route: Route) -> int:
    if any(source.weight.stacked for source in route.sources):
        return 1
    experts = route.target.experts or 1
    return experts * (len(route.converter.source_patterns) if route.converter is not None else 1)


class _Names:
    """Knows where transformers would put a checkpoint key."""

    def __init__(self, model: Any, conversions: list[Any]) -> None:
        self.model = model
        self.renamings = [c for c in conversions if isinstance(c, host.WeightRenaming)]
        self.converters = [c for c in conversions if isinstance(c, host.WeightConverter)]
        self.by_pattern = {pattern: c for c in self.converters for pattern in c.source_patterns}
        self.meta = model.state_dict()
        self.same_class = _same_class(model)

    def of(self, key: str) -> tuple[str, str | None]:
        """Return the parameter that ``key`` goes to, and the pattern of the conversion on the way (None without
        one)."""
        renamed, pattern = host.rename_source_key(
            key, self.renamings, self.converters, self.model.base_model_prefix, self.meta
        )
        if renamed not in self.meta and key in self.meta:
            return key, None
        return renamed, pattern

    def of_matrix(self, prefix: str, weights: Mapping[str, WeightInfo]) -> tuple[str, str | None, Any, bool] | None:
        """Return (parameter, pattern, converter, stacked) for the stored matrix ``prefix``; None when it has no
        place."""
        for key in (f"{prefix}.weight", prefix):
            target, pattern = self.of(key)
            if target in weights:
                return target, pattern, self.by_pattern.get(pattern) if pattern else None, False
        parent, _, last = prefix.rpartition(".")
        if last.isdigit():
            target, pattern = self.of(parent)
            if target in weights and pattern is None and weights[target].experts is not None:
                return target, None, None, True
        return None

    def must_exist(self, key: str) -> bool:
        """Return whether a tensor of the checkpoint must have a place: always, unless the model lacks the file's
        head."""
        prefix = self.model.base_model_prefix
        if self.same_class:
            return True
        has_base = hasattr(self.model, prefix) if prefix else False
        return has_base and key.startswith(f"{prefix}.")

    def compare(self, quantized: set[str], dense: dict[str, FileTensor]) -> list[str]:
        """Return what is wrong with the tensors that are not quantized."""
        problems: list[str] = []
        covered = set(quantized)
        ignored = _expressions(self.model, "_keys_to_ignore_on_load_unexpected")
        for key, tensor in dense.items():
            target, pattern = self.of(key)
            if target not in self.meta:
                harmless = any(re.search(e, key) for e in ignored) or key.endswith(
                    ("rotary_emb.inv_freq", "position_ids")
                )
                if not harmless and self.must_exist(key):
                    problems.append(f"{key} in {tensor.file.name} has no place in the model")
                continue
            covered.add(target)
            expected = self.meta[target]
            if pattern is None and tensor.shape != tuple(expected.shape):
                problems.append(
                    f"{key} in {tensor.file.name} has shape {tensor.shape}, expected {tuple(expected.shape)}"
                )
            elif (
                tensor.dtype is None
                or tensor.dtype.is_floating_point != expected.dtype.is_floating_point
                # Floats of 8 bits mean nothing without their scales.
                or (tensor.dtype.itemsize == 1 and expected.dtype.itemsize > 1)
            ):
                problems.append(
                    f"{key} in {tensor.file.name} has dtype {tensor.dtype}, expected {expected.dtype} (or its scales "
                    "are missing)"
                )
        return problems + [f"{name} is missing" for name in missing_names(self.model, covered)]


def _same_class(model: Any) -> bool:
    """Return whether the checkpoint was written by the class of ``model``, for all that its config says."""
    architectures = model.config.architectures or []
    return not architectures or type(model).__name__ in architectures


def missing_names(model: Any, covered: set[str]) -> list[str]:
    """Return the parameters and buffers of ``model`` that a checkpoint should have, and has not with those
    ``covered``."""
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    excused = _expressions(model, "_keys_to_ignore_on_load_missing")
    prefix = model.base_model_prefix
    same_class = _same_class(model)
    missing = []
    for name in model.state_dict():
        partners = {tied.get(name, name), *(key for key, value in tied.items() if value == name)}
        if name in covered or partners & covered or any(re.search(e, name) for e in excused):
            continue
        in_base = not prefix or not hasattr(model, prefix) or name.startswith(f"{prefix}.")
        if same_class or in_base:
            missing.append(name)
    return missing


def _expressions(model: Any, attribute: str) -> list[str]:
    return list(getattr(model, attribute, None) or [])


class Router(ExactConversion):
    """Is the conversion that builds quantized parameters from their stored entries.

    One instance knows all routes; transformers copies it once per parameter, so a copy shares the tables and holds only
    the tensors collected for its parameter.
    """

    def __init__(self, routes: list[Route], renamings: list[Any], build: Any) -> None:
        table: dict[str, tuple[str, str]] = {}
        for route in routes:
            for source in route.sources:
                for tensor in source.weight.entries.values():
                    key = tensor.key
                    for renaming in renamings:
                        key, _ = renaming.rename_source_key(key)
                    table[key] = (route.target.name, tensor.key)
        super().__init__(table)
        self.routes = {route.target.name: route for route in routes}
        self.build = build

    def add_tensor(self, target_key: str, source_key: str, source_pattern: str, future: Any) -> None:
        tensor = next(
            t for s in self.routes[target_key].sources for t in s.weight.entries.values() if t.key == source_key
        )
        safe = tensor.file.suffix == ".safetensors"
        if safe and source_key == target_key and tensor.dtype is not None and tensor.dtype.is_floating_point:
            # transformers 5.17 casts a float tensor whose key is a parameter's own name to that parameter's dtype; here
            # it may hold packed bytes, so it is read again as it is.
            if isinstance(future, Future):
                future.cancel()
            future = _read_later(tensor)
        super().add_tensor(target_key, source_key, source_pattern, future)

    def convert(
        self, layer_name: str, model: Any = None, config: Any = None, hf_quantizer: Any = None, loading_info: Any = None
    ) -> dict[str, nn.Parameter]:
        # Raised errors end the loading: transformers would note them, fill in random weights and go on.
        collected = {key: tensors[0] for key, tensors in self.materialized().items()}
        route = self.routes[layer_name]
        dtype = model.get_parameter_or_buffer(layer_name).dtype
        devices = {tensor.device for tensor in collected.values()}
        matrices: dict[str | None, list[Any]] = defaultdict(list)
        for source in route.sources:
            entries = {name: collected[t.key] for name, t in source.weight.entries.items()}
            if len(devices) > 1:
                entries = {name: entry.to(next(iter(devices))) for name, entry in entries.items()}
            matrices[source.pattern].append(self.build(source, entries, dtype))
        value = self._join(route, matrices, layer_name, model, config)
        return {layer_name: nn.Parameter(value, requires_grad=False)}

    def _join(self, route: Route, matrices: dict[str | None, list[Any]], name: str, model: Any, config: Any) -> Any:
        if route.converter is None:
            (column,) = matrices.values()
            one_by_one = route.target.experts is not None and not route.sources[0].weight.stacked
            value = torch.stack(column) if one_by_one else column[0]
            return value.transpose(-1, -2) if route.target.transposed else value
        steps: Any = {pattern: matrices[pattern] for pattern in route.converter.source_patterns}
        for operation in route.converter.operations:
            steps = operation.convert(
                steps,
                source_patterns=route.converter.source_patterns,
                target_patterns=route.converter.target_patterns,
                full_layer_name=name,
                model=model,
                config=config,
                missing_keys=None,
            )
        (value,) = steps.values()
        value = value[0] if isinstance(value, list) else value
        if not isinstance(value, QuantizedTensor):
            warnings.warn(
                f"{name}: the matrices that the checkpoint stores for it are laid out differently and cannot be kept "
                "in one quantized tensor; this weight is held dense",
                RuntimeWarning,
                stacklevel=2,
            )
        return value


def _read_later(tensor: FileTensor) -> Any:
    def read() -> Tensor:
        with safe_open(tensor.file, framework="pt") as opened:
            return opened.get_tensor(tensor.key)

    return read


def plan_sources(routes: list[Route], plan: Mapping[str, Any], fmt: Format, method: str) -> None:
    """Attach the plugin's ``plan`` to every source and check the files' headers against it.

    Raises :class:`CheckpointError` naming tensors that are missing, surplus, or of another shape or dtype.
    """
    problems: list[str] = []
    layouts: dict[str, Layout] = {}
    for route in routes:
        for source in route.sources:
            planned = plan.get(source.info.name)
            if not isinstance(planned, LayerPlan):
                reason = getattr(planned, "reason", "its config plans no layout for it")
                problems.append(f"{source.weight.prefix} is stored quantized, but {method} leaves it alone: {reason}")
                continue
            source.plan = planned
            layouts[source.info.name] = planned.layout
            expected = dict(fmt.entries(planned.layout))
            if source.weight.stacked:
                count = (route.target.experts or 1,)
                expected = {
                    name: entry if entry.shape is None else replace(entry, shape=count + entry.shape)
                    for name, entry in expected.items()
                }
            problems += check_entries(source.weight, expected, method)
    files = {tensor.file for route in routes for source in route.sources for tensor in source.weight.entries.values()}
    problems += fmt.check_metadata(read_metadata(sorted(files)), layouts)
    if problems:
        raise report(f"the checkpoint is not the {method} checkpoint that its config describes", problems)


def build_weight(
    source: Source, entries: dict[str, Tensor], dtype: torch.dtype, fmt: Format, policy: AdapterPolicy | None
) -> QuantizedTensor:
    """Return the quantized matrix, or the stack of them, that the file ``entries`` of ``source`` hold.

    Raises :class:`CheckpointError` naming the weight and its file when values are impossible.
    """
    assert source.plan is not None
    if source.weight.stacked:
        alone = replace(source, weight=replace(source.weight, stacked=False))
        experts = [
            build_weight(alone, dict(zip(entries, own, strict=True)), dtype, fmt, policy)
            for own in zip(*(entry.unbind() for entry in entries.values()), strict=True)
        ]
        return torch.stack(experts)  # type: ignore[arg-type, return-value]
    try:
        layout, parts = fmt.unpack(source.plan.layout, entries)
        weight = QuantizedTensor.build(layout, parts, dtype, compute_dtype=source.plan.compute_dtype, policy=policy)
        layout.check_values(weight.parts)
    except (LayoutError, QhubError) as error:
        file = next(iter(source.weight.entries.values())).file
        raise CheckpointError(f"{source.weight.prefix} in {file}: {error}. No model was loaded") from error
    return weight
