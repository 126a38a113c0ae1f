"""Measures every kernel that could multiply a model's layers, and remembers what is fastest on this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qhub.errors import UnsupportedError
from qhub.kernels import dispatch
from qhub.kernels.contest import Contest, Task
from qhub.kernels.hardware import card_name
from qhub.kernels.signature import signature
from qhub.kernels.spec import Problem
from qhub.kernels.tables import BUCKETS, Shape, Table, user_file
from qhub.kernels.timing import measured_card
from qhub.layouts import Parts
from qhub.tensor import QuantizedTensor

__all__ = ["Change", "Tuning", "measured", "tasks", "tune"]


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
        contest = Contest(task, bridges)
        for m in rows:
            if progress is not None:
                progress(done, everything, f"{signature(task.problem.layout)} {task.shape} M {m}")
            seconds, control = contest.measure(m)
            after = min(seconds, key=lambda name: seconds[name])
            layout = signature(task.problem.layout)
            result.changes.append(Change(layout, task.shape, m, contest.before.name(m), after, seconds, control))
            done += 1
        # After each layer: what was measured is kept when the rest is interrupted.
        contest.store(table)
        result.dropped |= contest.dropped
        table.write(target)
    dispatch.forget()
    result.path = target
    if progress is not None:
        progress(done, everything, "")
    return result
