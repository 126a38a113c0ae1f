"""The loop over a model's blocks: what enters them, their statistics and numbers, what leaves them quantized."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qhub.calibration import sharing
from qhub.calibration.activations import Activations, moved
from qhub.calibration.block import BlockWork
from qhub.calibration.options import CalibrationOptions
from qhub.calibration.report import CalibrationReport
from qhub.calibration.stacks import Call, Stack, entering, find_stacks, first_reached, loose_weights, through
from qhub.calibration.statistics import check_names, needs_float_stream
from qhub.errors import ConfigError
from qhub.plan import LayerPlan, WeightInfo
from qhub.quantizing import Quantization
from qhub.registry import registry
from qhub.tensor import QuantizedTensor

__all__ = ["Calibration", "Progress", "Workshop"]

logger = logging.getLogger("qhub")

# (finished, of how many, what is worked on)
Progress = Callable[[int, int, str], None]


class Workshop(Protocol):
    """Brings the blocks of a model in and takes their quantized weights away; hosts have their own."""

    def open(self, name: str, module: nn.Module, device: torch.device, dtype: torch.dtype | None) -> None:
        """Make the parameters of a block dense, on ``device`` and in ``dtype`` (None: their own)."""

    def finish(self, name: str, module: nn.Module, tensors: Mapping[str, QuantizedTensor], work: BlockWork) -> None:
        """Take the quantized weights of a block over; its parameters are not needed any more."""

    def restore(self, name: str, module: nn.Module, work: BlockWork) -> bool:
        """Put the quantized values of a block that an earlier run finished into its dense parameters, and its numbers
        into ``work.parts``; False if there are none."""


class Calibration:
    """Quantizes a model with statistics of its layers' inputs.

    ``infos``, ``plans``: {parameter: ...} of the weights to quantize. ``model``: is called with each sample as keyword
    arguments; outside its blocks it runs where and as it is.
    """

    def __init__(
        self,
        model: nn.Module,
        infos: Mapping[str, WeightInfo],
        plans: Mapping[str, LayerPlan],
        quantization: Quantization,
        options: CalibrationOptions,
        workshop: Workshop,
        progress: Progress | None = None,
    ) -> None:
        for plan in plans.values():
            check_names(plan.statistics)
        self.model = model
        self.infos = infos
        self.plans = plans
        self.quantization = quantization
        self.options = options
        self.workshop = workshop
        self.report = CalibrationReport(processes=sharing.processes())
        self._progress = progress or (lambda done, total, text: None)
        self._device = options.compute_device()
        self._dtype = options.dtype or (torch.float32 if self._device.type == "cpu" else None)
        self._float = any(needs_float_stream(plan.statistics) for plan in plans.values())
        self._equalize = registry.has(quantization.method, "qhub_equalize")
        self._done: list[tuple[Stack, Activations, Activations | None]] = []

    def run(self, samples: Sequence[Mapping[str, Any]]) -> CalibrationReport:
        """Quantize everything that is planned with ``samples``: keyword arguments of the model, batch dimension first.

        Every process of a group gets the same list and takes its share. Raises :class:`ConfigError` without samples.
        """
        if len(samples) < sharing.processes():
            raise ConfigError(
                f"{len(samples)} calibration samples for {sharing.processes()} processes: each needs at least one"
            )
        batches = _batches(sharing.share(samples), self.options)
        stacks = find_stacks(self.model, self.plans)
        loose = loose_weights(stacks, self.plans)
        total = sum(len(stack.blocks) for stack in stacks) + bool(loose)
        waiting, done = list(stacks), 0
        try:
            while waiting:
                stack = self._next(batches, waiting)
                waiting.remove(stack)
                done = self._stack(stack, batches, done, total)
            if loose:
                self._progress(done, total, "layers outside the blocks")
                self._loose(loose, batches)
                done += 1
            self._progress(done, total, "")
        finally:
            for _, outputs, floats in self._done:
                _close(outputs, floats)
        return self.report

    # -- stacks ------------------------------------------------------------------------------------------------------

    def _next(self, batches: Sequence[Mapping[str, Any]], waiting: Sequence[Stack]) -> Stack:
        for number, batch in enumerate(batches):
            found = first_reached(self.model, self._sample(batch), self._finished(number), waiting)
            if sharing.processes() > 1:
                # The first process decides: a stack that its samples do not reach is done when all others are.
                return waiting[sharing.from_first(0 if found is None else waiting.index(found))]
            if found is not None:
                return found
        return waiting[0]

    def _stack(self, stack: Stack, batches: Sequence[Mapping[str, Any]], done: int, total: int) -> int:
        previous = Activations(self.options.place, self.options.scratch)
        floats = Activations(self.options.place, self.options.scratch) if self._float else None
        try:
            for index, (name, module) in enumerate(stack.blocks.items()):
                self._progress(done, total, name)
                previous, floats = self._block(stack, index, name, module, batches, previous, floats)
                done += 1
        except BaseException:
            _close(previous, floats)
            raise
        self._done.append((stack, previous, floats))
        return done

    def _block(
        self,
        stack: Stack,
        index: int,
        name: str,
        module: nn.Module,
        batches: Sequence[Mapping[str, Any]],
        previous: Activations,
        floats: Activations | None,
    ) -> tuple[Activations, Activations | None]:
        with self.report.timing("reading", self._device):
            self.workshop.open(name, module, self._device, self._dtype)
        cache: dict[int, tuple[Call | None, Call | None]] = {}

        def entry(number: int) -> tuple[Call | None, Call | None]:
            if number in cache:
                return cache[number]
            with self.report.timing("capture", self._device):
                call = self._entering(stack, index, number, batches[number], previous.get(number), False)
                other = None
                if floats is not None:
                    other = self._entering(stack, index, number, batches[number], floats.get(number), True)
            if self.options.place == "device":
                cache[number] = call, other
            return call, other

        def calls() -> Iterator[tuple[int, Call, Call | None]]:
            for number in range(len(batches)):
                call, other = entry(number)
                if call is not None:
                    yield number, call, other

        # The unquantized model's outputs have to be there before the weights change.
        float_outputs = None
        if floats is not None:
            float_outputs = self._outputs((n, _call(module, other)) for n, _, other in calls() if other is not None)
        lead = f"{name}."
        work = self._work(name, module, [weight for weight in self.plans if weight.startswith(lead)], calls, _call)
        if work.plans and not self.workshop.restore(name, module, work):
            work.quantize(self._equalize)
        with self.report.timing("outputs", self._device):
            outputs = self._outputs((number, work.output(call, number)) for number, call, _ in calls())
        # Not when the collector of cycles comes by: the next block needs the room.
        work.forget()
        cache.clear()
        with self.report.timing("writing", self._device):
            self.workshop.finish(name, module, work.tensors(), work)
        _close(previous, floats)
        return outputs, float_outputs

    def _work(self, name: str, module: nn.Module, weights: Sequence[str], calls: Any, run: Any) -> BlockWork:
        return BlockWork(
            prefix=name,
            module=module,
            run=run,
            infos={weight: self.infos[weight] for weight in weights},
            plans={weight: self.plans[weight] for weight in weights},
            calls=calls,
            quantization=self.quantization,
            options=self.options,
            report=self.report,
        )

    def _outputs(self, values: Iterable[tuple[int, Any]]) -> Activations:
        outputs = Activations(self.options.place, self.options.scratch)
        for number, value in values:
            outputs[number] = value
        return outputs

    # -- what enters -------------------------------------------------------------------------------------------------

    def _sample(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        device = _outer_device(self.model)
        return {name: moved(value, device) for name, value in batch.items()}

    def _finished(self, number: int, floats: bool = False) -> list[tuple[Stack, Any]]:
        result = []
        for stack, outputs, others in self._done:
            chosen = others if floats and others is not None else outputs
            result.append((stack, self._for_outside(chosen.get(number))[0]))
        return result

    def _entering(
        self, stack: Stack, index: int, number: int, batch: Mapping[str, Any], previous: Any, floats: bool
    ) -> Call | None:
        handed, precise = self._for_outside(previous)
        call = entering(self.model, self._sample(batch), self._finished(number, floats), stack, index, handed)
        if call is None:
            return None

        def one(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            # What the model hands on untouched is taken as the block before returned it, not rounded for the model.
            leaf = precise.get(id(leaf), leaf)
            dtype = self._dtype if self._dtype is not None and leaf.is_floating_point() else leaf.dtype
            return leaf.to(self._device, dtype)

        args, kwargs = pytree.tree_map(one, call)
        return args, kwargs

    def _for_outside(self, value: Any) -> tuple[Any, dict[int, Tensor]]:
        """Return ``value`` as the model outside the blocks takes it, and the original of each of its tensors by id."""
        device, dtype = _outer_device(self.model), _outer_dtype(self.model)
        precise: dict[int, Tensor] = {}

        def one(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            handed = leaf.to(device, dtype if leaf.is_floating_point() else leaf.dtype)
            precise[id(handed)] = leaf
            return handed

        return pytree.tree_map(one, value), precise

    # -- outside the blocks ------------------------------------------------------------------------------------------

    def _loose(self, names: Sequence[str], batches: Sequence[Mapping[str, Any]]) -> None:
        self.workshop.open("", self.model, _outer_device(self.model), None)

        def calls() -> Iterator[tuple[int, Call, Call | None]]:
            for number, batch in enumerate(batches):
                yield number, ((number,), self._sample(batch)), None

        def run(model: nn.Module, call: Call) -> None:
            through(model, call[1], self._finished(call[0][0]))

        work = self._work("", self.model, names, calls, run)
        if not self.workshop.restore("", self.model, work):
            work.quantize(self._equalize)
        self.workshop.finish("", self.model, work.tensors(), work)


def _close(*kept: Activations | None) -> None:
    for one in kept:
        if one is not None:
            one.close()


def _call(module: nn.Module, call: Call) -> Any:
    with torch.no_grad():
        return module(*call[0], **call[1])


def _batches(samples: Sequence[Mapping[str, Any]], options: CalibrationOptions) -> list[dict[str, Any]]:
    """Join neighbours that have the same names and shapes."""
    batches: list[list[Mapping[str, Any]]] = []
    for sample in samples:
        fits = batches and _alike(batches[-1][0], sample)
        if fits and len(batches[-1]) < options.batch(sample["input_ids"].shape[-1]):
            batches[-1].append(sample)
        else:
            batches.append([sample])
    return [_joined(batch) for batch in batches]


def _alike(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    # Only plain token sequences: what images and sounds do with the batch dimension is each model's own.
    return set(a) == set(b) == {"input_ids"} and a["input_ids"].shape == b["input_ids"].shape


def _joined(batch: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    if len(batch) == 1:
        return dict(batch[0])
    return {"input_ids": torch.cat([one["input_ids"] for one in batch])}


def _outer_device(model: Any) -> torch.device:
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    if embedding is not None and embedding.weight.device.type != "meta":
        return embedding.weight.device
    return next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))


def _outer_dtype(model: Any) -> torch.dtype:
    dtype = getattr(model, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else next(model.parameters()).dtype
