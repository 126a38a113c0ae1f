"""What competes for one layer while kernels are measured: every kernel that takes it and is right, and its configs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qhub.kernels import dense_kernels, dispatch, reference
from qhub.kernels.admission import TOLERANCE
from qhub.kernels.binding import Runner
from qhub.kernels.signature import signature
from qhub.kernels.spec import Problem
from qhub.kernels.tables import Entry, Shape, Table, packages_of
from qhub.kernels.timing import Contestant, copies_for, measure
from qhub.layouts import Parts, nbytes

__all__ = ["Contest", "Task", "warmed"]

# A config must beat the kernel's own choice by so much; less is noise.
_GAIN = 0.97
_CONTROL = "(control)"


@dataclass(frozen=True)
class Task:
    """Is one thing to measure: a problem, tensors to measure it on, and the weights of the model it stands for."""

    problem: Problem
    parts: Parts
    weights: tuple[str, ...] = ()

    @property
    def shape(self) -> Shape:
        layout = self.problem.layout
        return Shape(layout.out_features, layout.in_features, str(self.problem.dtype).removeprefix("torch."))


def warmed(task: Task, rows: Sequence[int]) -> None:
    """Run everything that :func:`measured` would run once, so that what is compiled on first use is in its caches."""
    problem, layout = task.problem, task.problem.layout
    device = next(iter(task.parts.values())).device
    specs = [spec for spec in dispatch.kernels().values() if spec.role == "linear" and spec.prepare is None]
    runners = [Runner(spec) for spec in specs if spec.refusal(problem) is None]
    with torch.no_grad():
        for m in rows:
            x = torch.ones(m, layout.in_features, dtype=problem.dtype, device=device)
            for runner, _ in _entries(runners, task, m):
                # What fails fails again, and is reported, where it is measured.
                with contextlib.suppress(Exception):
                    runner.bind(layout, task.parts, problem.dtype)(x, None)


def _entries(runners: Sequence[Runner], task: Task, m: int) -> Iterator[tuple[Runner, str | None]]:
    """Yield what competes for ``m`` rows: each kernel as it chooses itself (None), and with each of its configs."""
    for runner in runners:
        spec = runner.spec
        if spec.max_m is not None and m > spec.max_m:
            continue
        yield runner, None
        if spec.tunables is not None:
            configs: dict[str, dict[str, Any]] = spec.load(spec.tunables)(task.problem, task.parts, m)
            for name, config in configs.items():
                yield runner.with_config(config), name


class Contest:
    """Is what competes for one task. ``dropped``: {kernel: reason} of what failed or was wrong."""

    def __init__(self, task: Task, bridges: bool) -> None:
        self.task = task
        problem, parts = task.problem, task.parts
        self.device = next(iter(parts.values())).device
        self.before = dispatch.choose(problem.layout, parts, problem.dtype)
        with torch.no_grad():
            runners, refused = dispatch.admit(problem, parts, bridges=bridges)
        self.dropped = {name: reason for name, reason in refused.items() if "differs" in reason or "failed" in reason}
        self.runners = [*runners, Runner(dense_kernels.reference_spec(problem, parts))]
        count = copies_for(self.device, nbytes(parts))
        self.copies: list[Parts] = [parts]
        self.copies += [{name: part.clone() for name, part in parts.items()} for _ in range(count - 1)]
        self.times: dict[str, dict[int, Entry]] = {}
        self.configs: dict[str, dict[str, dict[str, Any]]] = {}

    def measure(self, m: int) -> tuple[dict[str, float], float]:
        """Return the seconds that each kernel takes for ``m`` rows, with the best of its configs; and how many times as
        long the first of them takes when it is entered twice."""
        problem, layout = self.task.problem, self.task.problem.layout
        generator = torch.Generator().manual_seed(m)
        x = torch.randn(m, layout.in_features, generator=generator).to(self.device, problem.dtype)
        contestants: dict[str, Contestant] = {}
        entered: dict[str, tuple[Runner, str | None]] = {}
        with torch.no_grad():
            wanted = reference.linear(x, layout, self.task.parts)
            for runner, config in _entries(self.runners, self.task, m):
                name = runner.spec.name
                label = name if config is None else f"{name}/{config}"
                calls = self._calls(runner, x, label, wanted)
                if calls is not None:
                    contestants[label] = Contestant(calls, None if config is None else name)
                    entered[label] = runner, config
            del wanted
            first = next(iter(contestants))
            contestants[_CONTROL] = Contestant(contestants[first].calls)
            seconds = measure(contestants, self.device, len(self.copies))
        control = seconds.pop(_CONTROL) / seconds[first]
        best: dict[str, float] = {}
        for label, (runner, config) in entered.items():
            if label not in seconds:
                continue
            spec, took = runner.spec, seconds[label]
            kept = self.times.setdefault(spec.key, {}).get(m)
            if kept is None or took < kept.seconds * (_GAIN if kept.config is None else 1.0):
                self.times[spec.key][m] = Entry(took, config)
                if config is not None:
                    self.configs.setdefault(spec.key, {})[config] = runner.config or {}
            best[spec.name] = self.times[spec.key][m].seconds
        return best, control

    def store(self, table: Table) -> None:
        """Put the times into the table, beside those of other numbers of rows."""
        for runner in self.runners:
            key, packages = runner.spec.key, packages_of(runner.spec)
            if key in self.times:
                if table.packages.get(key, packages) != packages:
                    # What was measured with other versions would pass for new.
                    table.drop(key)
                table.put(signature(self.task.problem.layout), self.task.shape, key, self.times[key])
                table.packages[key] = packages
                table.configs.setdefault(key, {}).update(self.configs.get(key, {}))

    def _calls(
        self, runner: Runner, x: Tensor, label: str, wanted: Tensor
    ) -> Callable[[int], list[Callable[[], Any]]] | None:
        """Return a function that gives calls on copies of the weight; None, with a note, where it fails or is wrong."""
        layout, dtype = self.task.problem.layout, self.task.problem.dtype
        runs: list[Callable[[Tensor, Tensor | None], Tensor]] = []

        def calls(count: int) -> list[Callable[[], Any]]:
            for parts in self.copies[len(runs) : count]:
                run = runner.bind(layout, parts, dtype)
                run(x, None)
                runs.append(run)
            return [lambda run=run: run(x, None) for run in runs[:count]]  # type: ignore[misc]

        try:
            found = calls(1)[0]()
            error = float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30))
        except Exception as error_:
            self.dropped[label] = f"failed at M={x.shape[0]}: {type(error_).__name__}: {error_}"
            return None
        if not error <= TOLERANCE.get(dtype, 1e-4):
            self.dropped[label] = f"differs from the reference by {error:.2e} at M={x.shape[0]}"
            return None
        return calls
