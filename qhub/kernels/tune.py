"""Measures every kernel that could multiply a model's layers, and remembers what is fastest on this machine."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qhub.errors import UnsupportedError
from qhub.kernels import dense_kernels, dispatch, reference
from qhub.kernels.admission import TOLERANCE
from qhub.kernels.binding import Runner
from qhub.kernels.hardware import card_name
from qhub.kernels.signature import signature
from qhub.kernels.spec import Problem
from qhub.kernels.tables import BUCKETS, Entry, Shape, Table, packages_of, user_file
from qhub.kernels.timing import Contestant, copies_for, measure, measured_card
from qhub.layouts import Parts, nbytes
from qhub.tensor import QuantizedTensor

__all__ = ["Change", "Task", "Tuning", "entries", "measured", "tasks", "tune", "warmed"]

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


@dataclass(frozen=True)
class Change:
    """Says what a measurement at M changed. ``seconds``: {kernel: time} of all that were measured, ``before`` and
    ``after``: the kernel taken. ``control``: how much the same kernel measured twice differs (1: not at all)."""

    signature: str
    shape: Shape
    m: int
    before: str
    after: str
    seconds: dict[str, float]
    control: float


@dataclass
class Tuning:
    """Is what :func:`tune` found. ``path``: the file that was written, None if none. ``dropped``: {kernel: reason} of
    those that failed or were wrong while they were measured."""

    card: str
    changes: list[Change] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)
    path: Path | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        changes = [{**vars(change), "shape": str(change.shape)} for change in self.changes]
        return {"card": self.card, "changes": changes, "dropped": self.dropped, "path": self.path}

    def __str__(self) -> str:
        lines = [self.card]
        last: tuple[str, Shape] | None = None
        for change in self.changes:
            if last != (change.signature, change.shape):
                last = (change.signature, change.shape)
                lines.append(f"{change.signature} {change.shape}")
            taken = change.seconds[change.after]
            text = f"    M {change.m}: {change.after} {taken * 1e6:.1f} us"
            others = sorted((s, name) for name, s in change.seconds.items() if name != change.after)
            if others:
                text += f", next {others[0][1]} {others[0][0] * 1e6:.1f} us"
            if change.before != change.after:
                was = change.seconds.get(change.before)
                text += f" (before: {change.before}" + (f" {was * 1e6:.1f} us)" if was else ")")
            lines.append(text)
        lines += [f"    dropped {name}: {reason}" for name, reason in self.dropped.items()]
        if self.changes:
            worst = max((abs(change.control - 1) for change in self.changes), default=0.0)
            moved = sum(change.before != change.after for change in self.changes)
            lines.append(
                f"{len(self.changes)} cells measured, {moved} take another kernel than before; the same kernel "
                f"measured twice differs by up to {worst:.1%}"
            )
        if self.path is not None:
            lines.append(f"written to {self.path}")
        return "\n".join(lines)


def tune(
    model: torch.nn.Module,
    *,
    rows: Sequence[int] = BUCKETS,
    dtype: torch.dtype | None = None,
    bridges: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
    path: Path | None = None,
) -> Tuning:
    """Measure every kernel for every kind and size of quantized layer of ``model``, and remember the fastest.

    ``rows``: numbers of input rows (M) to measure. ``dtype``: of the layers' inputs; None for each weight's own.
    ``bridges``: measure kernels too that keep a second copy of each weight, other libraries' above all; where they win
    they are used from then on. ``progress``: called with (done, all, what is measured now). ``path``: of the file to
    write; None: the user's own (in ``$QHUB_CACHE`` or the platform's cache folder). Times found before on other layers
    stay. Raises :class:`UnsupportedError` when the model has no quantized weight, or one that is not in memory.
    """
    found = list(tasks(model, dtype))
    if not found:
        raise UnsupportedError("the model has no quantized weight, so there are no kernels to measure")
    return measured(found, rows=rows, bridges=bridges, progress=progress, path=path)


def tasks(model: torch.nn.Module, dtype: torch.dtype | None = None) -> Iterator[Task]:
    """Yield what there is to measure in ``model``: each layout with its size, device and input dtype once."""
    weights: dict[tuple[Problem, torch.device], tuple[Parts, list[str]]] = {}
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, QuantizedTensor):
            continue
        if parameter.device.type == "meta":
            raise UnsupportedError(f"{name} is on the meta device: load the model's weights before measuring")
        matrix: Any = parameter[(0,) * (parameter.ndim - 2)] if parameter.ndim > 2 else parameter
        problem = Problem(matrix.quant_layout, matrix.device.type, matrix.compute_dtype or dtype or matrix.dtype)
        weights.setdefault((problem, matrix.device), (matrix.parts, []))[1].append(name)
    for (problem, _), (parts, names) in weights.items():
        yield Task(problem, parts, tuple(names))


def measured(
    found: Sequence[Task],
    *,
    rows: Sequence[int] = BUCKETS,
    bridges: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
    path: Path | None = None,
) -> Tuning:
    """Measure ``found``, all on cards of one name, and write the table; see :func:`tune`."""
    device = next(iter(found[0].parts.values())).device
    name = card_name(device)
    target = path or user_file(name)
    old = dispatch.load(target)
    table = old if old is not None and old.card.name == name else Table(measured_card(device))
    result = Tuning(name)
    done, everything = 0, len(found) * len(rows)
    for task in found:
        if card_name(next(iter(task.parts.values())).device) != name:
            raise UnsupportedError(
                f"the model lies on several kinds of devices ({name} and others): measure one at a time"
            )
        contest = _Contest(task, bridges, table, result)
        for m in rows:
            if progress is not None:
                progress(done, everything, f"{signature(task.problem.layout)} {task.shape} M {m}")
            contest.measure(m)
            done += 1
        # After each layer: what was measured is kept when the rest is interrupted.
        contest.store()
        table.write(target)
    dispatch.forget()
    result.path = target
    if progress is not None:
        progress(done, everything, "")
    return result


def warmed(task: Task, rows: Sequence[int]) -> None:
    """Run everything that :func:`measured` would run once, so that what is compiled on first use is in its caches."""
    problem, layout = task.problem, task.problem.layout
    device = next(iter(task.parts.values())).device
    runners = []
    for spec in dispatch.kernels().values():
        if spec.role == "linear" and spec.prepare is None and spec.refusal(problem) is None:
            runners.append(Runner(spec))
    with torch.no_grad():
        for m in rows:
            x = torch.ones(m, layout.in_features, dtype=problem.dtype, device=device)
            for runner, _ in entries(runners, task, m):
                # What fails fails again, and is reported, where it is measured.
                with contextlib.suppress(Exception):
                    runner.bind(layout, task.parts, problem.dtype)(x, None)


def entries(runners: Sequence[Runner], task: Task, m: int) -> Iterator[tuple[Runner, str | None]]:
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


class _Contest:
    """Is what competes for one task."""

    def __init__(self, task: Task, bridges: bool, table: Table, result: Tuning) -> None:
        self.task, self.table, self.result = task, table, result
        problem, parts = task.problem, task.parts
        self.device = next(iter(parts.values())).device
        self.before = dispatch.choose(problem.layout, parts, problem.dtype)
        with torch.no_grad():
            runners, refused = dispatch.admit(problem, parts, bridges=bridges)
        result.dropped |= {
            name: reason for name, reason in refused.items() if "differs" in reason or "failed" in reason
        }
        self.runners = [*runners, Runner(dense_kernels.reference_spec(problem, parts))]
        count = copies_for(self.device, nbytes(parts))
        self.copies: list[Parts] = [parts]
        self.copies += [{name: part.clone() for name, part in parts.items()} for _ in range(count - 1)]
        self.times: dict[str, dict[int, Entry]] = {}
        self.configs: dict[str, dict[str, dict[str, Any]]] = {}

    def measure(self, m: int) -> None:
        """Time everything that takes ``m`` rows."""
        problem, layout = self.task.problem, self.task.problem.layout
        generator = torch.Generator().manual_seed(m)
        x = torch.randn(m, layout.in_features, generator=generator).to(self.device, problem.dtype)
        contestants: dict[str, Contestant] = {}
        entered: dict[str, tuple[Runner, str | None]] = {}
        with torch.no_grad():
            wanted = reference.linear(x, layout, self.task.parts)
            for runner, config in entries(self.runners, self.task, m):
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
        after = min(best, key=lambda name: best[name])
        self.result.changes.append(
            Change(signature(self.task.problem.layout), self.task.shape, m, self.before.name(m), after, best, control)
        )

    def store(self) -> None:
        """Put the times into the table, beside those of other numbers of rows."""
        for runner in self.runners:
            key, packages = runner.spec.key, packages_of(runner.spec)
            if key in self.times:
                if self.table.packages.get(key, packages) != packages:
                    # What was measured with other versions would pass for new.
                    self.table.drop(key)
                self.table.put(signature(self.task.problem.layout), self.task.shape, key, self.times[key])
                self.table.packages[key] = packages
                self.table.configs.setdefault(key, {}).update(self.configs.get(key, {}))

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
            self.result.dropped[label] = f"failed at M={x.shape[0]}: {type(error_).__name__}: {error_}"
            return None
        if not error <= TOLERANCE.get(dtype, 1e-4):
            self.result.dropped[label] = f"differs from the reference by {error:.2e} at M={x.shape[0]}"
            return None
        return calls
