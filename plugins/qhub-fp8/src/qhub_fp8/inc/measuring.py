"""Measures the inputs of layers while a model runs, and keeps what was measured in JSON files.

The files are those of Intel Neural Compressor's maxabs observer (``save_measurements_files`` of
_core/save_measure/save_files.py), without the pickled copy beside them: ``{dump_stats_path}_hooks_{observer}.json``
with ``{"Mode": "DynamicRange", "Nodes": {module: {"inputs": [[[max]]], "params": {"weight": [[max]]}}}}``.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qhub.calibration import sharing
from qhub.calibration.products import Key, Products, features_of, keys_of
from qhub.calibration.statistics import Sums
from qhub.errors import CheckpointError, ConfigError
from qhub.plan import WeightInfo
from qhub_fp8.inc.config import FP8Config
from qhub_fp8.inc.plan import plain_name

__all__ = ["Observers", "read_measurements", "stats_file", "write_measurements"]

Statistics = Mapping[str, Mapping[str, Tensor]]


def node_name(key: Key) -> str:
    """Return the name that a matrix has in a file: its module's, experts counted behind it."""
    module = plain_name(key.name.removesuffix(".weight"))
    return module if key.expert is None else f"{module}.{key.expert}"


class Observers:
    """Watches the inputs of the weights ``infos`` of ``model`` until it is removed."""

    def __init__(self, model: nn.Module, infos: Mapping[str, WeightInfo]) -> None:
        self.sums: dict[Key, Sums] = {}
        self.largest: dict[Key, float] = {}
        self._handles: list[Any] = []
        modules: dict[str, dict[str, Tensor]] = {}
        for name, info in infos.items():
            parameter = model.get_parameter(name)
            for key in keys_of(name, info.experts):
                self.sums[key] = Sums(["max_abs"], info.in_features, parameter.device)
                matrix = parameter.detach() if key.expert is None else parameter.detach()[key.expert]
                self.largest[key] = float(matrix.abs().max())
            modules.setdefault(name.rpartition(".")[0], {})[name] = parameter
        for prefix, parameters in modules.items():
            self._watch(model.get_submodule(prefix), parameters)

    def _watch(self, module: nn.Module, parameters: dict[str, Tensor]) -> None:
        # Experts call their matrices one by one inside the module, a linear layer its only one: all are products.
        running: list[Products] = []

        def before(_: nn.Module, args: Any) -> None:
            running.append(Products({name: p.detach() for name, p in parameters.items()}, self._seen))
            running[-1].__enter__()

        def after(_: nn.Module, args: Any, output: Any) -> None:
            running.pop().__exit__(None, None, None)

        self._handles.append(module.register_forward_pre_hook(before))
        self._handles.append(module.register_forward_hook(after, always_call=True))

    @torch.no_grad()
    def _seen(self, key: Key, x: Tensor) -> None:
        if key in self.sums:
            self.sums[key].add(features_of(x.detach()))

    def remove(self) -> None:
        """Let the model run unwatched."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def statistics(self) -> dict[str, dict[str, Tensor]]:
        """Return {node: {"max_abs": (K,), "tokens": ()}} over all processes, of what saw any input."""
        for one in self.sums.values():
            sharing.reduce_sums(one)
        found = {node_name(key): one.means() for key, one in self.sums.items() if one.tokens}
        bad = [name for name, values in found.items() if not bool(torch.isfinite(values["max_abs"]).all())]
        if bad:
            raise CheckpointError(f"{bad[0]}: its input held NaN or infinity while it was measured")
        return found

    def weights(self) -> dict[str, float]:
        """Return the largest magnitude of each weight, by node."""
        return {node_name(key): value for key, value in self.largest.items()}


def stats_file(config: FP8Config) -> Path:
    """Return the file that measurements are kept in."""
    return Path(f"{config.dump_stats_path}_hooks_{config.observer}.json")


def write_measurements(config: FP8Config, statistics: Statistics, weights: Mapping[str, float]) -> Path:
    """Write what was measured, and the list of modules beside it; return the file."""
    nodes: dict[str, Any] = {}
    for name, values in statistics.items():
        largest = values["max_abs"].float().cpu()
        by_feature = config.observer == "maxabs_per_channel"
        measured = [[one] for one in largest.tolist()] if by_feature else [[float(largest.max())]]
        nodes[name] = {"inputs": [measured], "params": {"weight": [[weights[name]]]}}
    file = stats_file(config)
    file.parent.mkdir(parents=True, exist_ok=True)
    described = {"GlobalRank": None, "LocalRank": None, "Mode": "DynamicRange", "Nodes": nodes}
    _replace(file, described)
    _replace(file.with_name(file.stem + "_mod_list.json"), sorted(nodes))
    return file


def read_measurements(config: FP8Config) -> dict[str, dict[str, Tensor]]:
    """Return what a file holds, as :meth:`Observers.statistics` does; the widths are not known.

    Raises :class:`ConfigError` when there is no such file, :class:`CheckpointError` when it is damaged.
    """
    file = stats_file(config)
    if not file.is_file():
        raise ConfigError(
            f"there are no measurements in {file}: run prepare, some text and finalize_calibration first with the "
            f"same dump_stats_path ({config.dump_stats_path!r}) and observer"
        )
    try:
        nodes = json.loads(file.read_text(encoding="utf-8"))["Nodes"]
        found = {str(name): _node(values) for name, values in nodes.items()}
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{file} holds no measurements: {type(error).__name__}: {error}") from error
    for name, values in found.items():
        measured = values["max_abs"]
        if not bool(torch.isfinite(measured).all()) or bool((measured < 0).any()):
            raise CheckpointError(f"{file}: what was measured for {name} is no magnitude")
    return found


def _node(values: Mapping[str, Any]) -> dict[str, Tensor]:
    inputs = values["inputs"] if "inputs" in values else values["input"]
    measured = torch.tensor(inputs[0], dtype=torch.float32).reshape(-1)
    if not measured.numel():
        raise ValueError("an empty list of measurements")
    return {"max_abs": measured, "tokens": torch.tensor(1)}


def _replace(file: Path, value: Any) -> None:
    """Write ``value`` as JSON in one step."""
    handle, name = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
    with os.fdopen(handle, "w", encoding="utf-8") as opened:
        json.dump(value, opened, indent=1)
    Path(name).replace(file)
