"""Quantizes the weights of one block: groups layers by their inputs, collects statistics, asks the method, goes on with
the quantized weights."""

from __future__ import annotations

import copy
import logging
import time
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qhub.calibration import sharing
from qhub.calibration.collecting import Collector, Enough, Stage, matrices_of
from qhub.calibration.memory import ProductMemory, budget
from qhub.calibration.options import CalibrationOptions
from qhub.calibration.products import Key, Products, common_inputs, keys_of
from qhub.calibration.report import CalibrationReport, LayerReport
from qhub.calibration.stacks import Call
from qhub.calibration.statistics import needs_float_stream, rescaled
from qhub.errors import CheckpointError, QhubError
from qhub.layouts import Layout
from qhub.layouts.chunks import all_finite
from qhub.layouts.transforms import with_input_scale
from qhub.plan import LayerPlan, WeightInfo
from qhub.quantizing import Quantization
from qhub.tensor import QuantizedTensor

__all__ = ["BlockWork"]

logger = logging.getLogger("qhub")

Calls = Callable[[], Iterator[tuple[int, Call, Call | None]]]


@dataclass
class BlockWork:
    """Does one block. ``prefix``: its name in the model, empty for weights that lie in no block.

    ``run(call)`` runs it. ``weights``: {parameter: tensor} of every matrix in it, quantized or not. ``infos``,
    ``plans``: of those that will be quantized. ``calls()`` yields (batch, call, call of the unquantized model or None).
    After :meth:`quantize`, ``parts`` has {matrix: (layout, parts)}, and the dense weights are the quantized ones'.
    """

    prefix: str
    module: nn.Module
    run: Callable[[nn.Module, Call], Any]
    infos: Mapping[str, WeightInfo]
    plans: Mapping[str, LayerPlan]
    calls: Calls
    quantization: Quantization
    options: CalibrationOptions
    report: CalibrationReport
    parts: dict[Key, tuple[Layout, dict[str, Tensor]]] = field(default_factory=dict)
    scales: dict[Key, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.weights = matrices_of(self.module, self.prefix)
        self.names = {name for plan in self.plans.values() for name in plan.statistics}
        self._collector = Collector(self)
        self.memory = ProductMemory(0)

    # -- what runs when ----------------------------------------------------------------------------------------------

    def stages(self) -> list[Stage]:
        """Return the groups to quantize in the order in which the block computes them.

        Weights that the calibration never reaches come last, each on its own.
        """
        seen: list[tuple[Key, Tensor]] = []
        for _, call, _ in self.calls():
            self.observe(call, lambda key, x: seen.append((key, x)))
            if seen:
                break
        uses = Counter(key for key, _ in seen)
        self._collector.repeats = any(count > 1 for count in uses.values())
        stages: list[Stage] = []
        by_parameter: dict[str, Stage] = {}
        for group in common_inputs(seen):
            if not any(key.name in self.plans for key in group):
                continue
            if group[0].expert is None:
                stages.append(Stage([group]))
            elif group[0].name not in by_parameter:
                # Which experts a batch reaches is chance: the stage has all of them.
                name = group[0].name
                by_parameter[name] = Stage([[key] for key in self._keys(name)], experts=True)
                stages.append(by_parameter[name])
        listed = {key for stage in stages for group in stage.groups for key in group}
        missing = [key for name in self.plans for key in self._keys(name) if key not in listed]
        stages += [Stage([[key]], experts=key.expert is not None) for key in missing]
        # Processes see other samples and must add up the same sums.
        return sharing.from_first(stages)

    def quantize(self, equalize: bool) -> None:
        """Quantize every planned weight; ``equalize``: whether the method chooses input scales first."""
        with self.report.timing("capture", self.device):
            stages = self.stages()
        if needs_float_stream(self.names):
            self._collector.original = copy.deepcopy(self.module)
        statistics: list[dict[int, dict[str, Tensor]]] | None = None
        if equalize or self.options.sequential == "block":
            statistics = self._collect(stages)
        if equalize:
            assert statistics is not None
            with self.report.timing("equalizing", self.device):
                for stage, found in zip(stages, statistics, strict=True):
                    self._equalize(stage, found)
        # From here on weights only become final, one group after the other.
        self.memory = ProductMemory(budget(self.device))
        for number, stage in enumerate(stages):
            if statistics is not None and self.options.sequential == "block":
                found = statistics[number]
            else:
                found = self._collect([stage])[0]
            with self.report.timing("quantizing", self.device):
                for index, group in enumerate(stage.groups):
                    self._quantize_group(group, found[index])
                    self.memory.finished.update(group)
        self._collector.original = None

    def _collect(self, stages: Sequence[Stage]) -> list[dict[int, dict[str, Tensor]]]:
        with self.report.timing("statistics", self.device):
            return self._collector.collect(stages)

    def tensors(self) -> dict[str, QuantizedTensor]:
        """Return the quantized parameters by name."""
        result = {}
        for name, info in self.infos.items():
            plan = self.plans[name]

            def built(expert: int | None, name: str = name, plan: LayerPlan = plan) -> QuantizedTensor:
                layout, parts = self.parts[Key(name, expert)]
                return self.quantization.build(layout, parts, self.infos[name].dtype, plan.compute_dtype)

            result[name] = self.quantization.assemble(info, built)
        return result

    # -- input scales ------------------------------------------------------------------------------------------------

    def _equalize(self, stage: Stage, found: dict[int, dict[str, Tensor]]) -> None:
        from qhub.calibration.equalizing import equalize_group

        for index, group in enumerate(stage.groups):
            planned = [key for key in group if key.name in self.plans]
            if int(found[index]["tokens"]) == 0 or not planned:
                continue
            scales = equalize_group(self, group, planned, found[index])
            if scales is not None:
                found[index] = rescaled(found[index], 1 / scales)

    # -- numbers -----------------------------------------------------------------------------------------------------

    def _quantize_group(self, group: Sequence[Key], statistics: Mapping[str, Tensor]) -> None:
        together: dict[Any, list[Key]] = {}
        for key in group:
            plan = self.plans.get(key.name)
            if plan is None:
                continue
            # A tall matrix of one row stands for the layout of them all.
            tall = plan.rows_independent and self._input_scale(key) is None
            together.setdefault((plan.layout.with_rows(1), self.weights[key.name].dtype) if tall else key, []).append(
                key
            )
        for keys in together.values():
            self._quantize_together(keys, statistics)

    def _quantize_together(self, keys: Sequence[Key], statistics: Mapping[str, Tensor]) -> None:
        start = time.perf_counter()
        weights = [self.matrix(key) for key in keys]
        for key, weight in zip(keys, weights, strict=True):
            if not all_finite(weight):
                raise CheckpointError(f"{key} holds NaN or infinity and cannot be quantized: the checkpoint is damaged")
        scale = self._input_scale(keys[0])
        stored = weights if scale is None else [weight * scale for weight in weights]
        given = statistics if scale is None or not len(statistics) else rescaled(statistics, 1 / scale)
        layout = self.plans[keys[0].name].layout
        if len(keys) > 1:
            layout = layout.with_rows(sum(weight.shape[0] for weight in weights))
        names = ", ".join(map(str, keys))
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                parts = self.quantization.parts(torch.cat(stored) if len(keys) > 1 else stored[0], layout, given)
            layout.validate(parts)
        except QhubError as error:
            raise type(error)(f"{names}: {error}") from error
        for warning in said:
            self.warn(f"{names}: {warning.message}")
        if scale is not None:
            # The input is scaled before anything else happens to it.
            layout, parts = with_input_scale(layout), {**parts, "in_scale": 1 / scale}
        seconds = (time.perf_counter() - start) / len(keys)
        row = 0
        for key, weight in zip(keys, weights, strict=True):
            own, mine = layout, dict(parts)
            if len(keys) > 1:
                cut = layout.select_rows(parts, row, row + weight.shape[0])
                if cut is None:
                    raise QhubError(
                        f"{key}: its rows cannot be taken out of {layout.kind} again; this is a bug of qhub"
                    )
                row += weight.shape[0]
                own, mine = cut[0], {name: part.clone() for name, part in cut[1].items()}
            self.parts[key] = own, {name: part.contiguous() for name, part in mine.items()}
            dense = own.dequantize(mine)
            loss = _relative_error(weight, dense, given, scale)
            self.report.layers.append(LayerReport(str(key), loss, int(given["tokens"]), seconds))
            logger.info("%s: relative output error %s, %d tokens", key, loss, int(given["tokens"]))
            self.matrix(key).copy_(dense)

    def _input_scale(self, key: Key) -> Tensor | None:
        """Return the input scale that the layout of ``key`` carries: if one expert of a parameter has one, all have."""
        scale = self.scales.get(key)
        if scale is None and key.expert is not None and any(other.name == key.name for other in self.scales):
            matrix = self.matrix(key)
            return torch.ones(matrix.shape[1], device=matrix.device)
        return scale

    def matrix(self, key: Key) -> Tensor:
        """Return the dense weight of ``key`` as (N, K): a view that can be written into."""
        weight = self.weights[key.name].data
        if key.expert is not None:
            weight = weight[key.expert]
        info = self.infos.get(key.name)
        return weight.t() if info is not None and (info.kind == "conv1d" or info.transposed) else weight

    @property
    def storage_dtype(self) -> torch.dtype:
        """Return the dtype that the block's unquantized parameters are kept in."""
        return next(iter(self.infos.values())).dtype

    # -- small -------------------------------------------------------------------------------------------------------

    def _keys(self, name: str) -> list[Key]:
        return keys_of(name, self.infos[name].experts)

    def features(self, group: Sequence[Key]) -> int:
        return next(self.infos[key.name].in_features for key in group if key.name in self.infos)

    @property
    def device(self) -> torch.device:
        return next(iter(self.weights.values())).device

    def observe(
        self,
        call: Call,
        seen: Callable[[Key, Tensor], None],
        number: int | None = None,
        idle: Collection[Key] = (),
    ) -> Any:
        """Run the block and report its products; return what it returns, None if ``seen`` ended the run.

        ``number``: of the batch, where finished layers' products may be taken from an earlier run of it. ``idle``:
        matrices whose products are of no use in this run.
        """
        memory = None if number is None else self.memory.run(number)
        try:
            with Products(self.weights, seen, memory, idle):
                return self.run(self.module, call)
        except Enough:
            return None

    def output(self, call: Call, number: int) -> Any:
        """Return what the block, quantized, returns for one batch."""
        return self.observe(call, lambda key, x: None, number)

    def forget(self) -> None:
        """Drop the products that were remembered."""
        self.memory = ProductMemory(0)

    def warn(self, message: str) -> None:
        self.report.warnings.append(message)
        logger.warning(message)


def _relative_error(
    weight: Tensor, dense: Tensor, statistics: Mapping[str, Tensor], scale: Tensor | None
) -> float | None:
    """Return tr(D H D^T) / tr(W H W^T), D the difference; H is of the scaled input where there is a ``scale``."""
    hessian = statistics.get("hessian")
    if hessian is None or int(statistics["tokens"]) == 0:
        return None
    original, change = weight.float(), dense.float() - weight.float()
    if scale is not None:
        original, change = original * scale, change * scale
    power = ((original @ hessian) * original).sum()
    return float(((change @ hessian) * change).sum() / power) if float(power) > 0 else 0.0
