"""Chooses the kernel of a layer: filter once, keep every reason, admit only what matches the reference, take the
fastest.

The choice is made per (layout, device, dtype) and kept; at run time it is one comparison of M. ``QHUB_KERNEL=name``
forces a kernel and never falls back.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qhub.errors import KernelError, UnsupportedError
from qhub.kernels import dense_kernels, scaled_mm
from qhub.kernels.admission import disagreement
from qhub.kernels.binding import Runner
from qhub.kernels.hardware import Card, card_name, nominal
from qhub.kernels.ordering import Clock, Timing, ordered
from qhub.kernels.spec import REFERENCE, KernelSpec, Problem
from qhub.kernels.tables import Table, load, shipped_file, user_file
from qhub.layouts import Layout, Parts
from qhub.registry import registry

__all__ = [
    "REFERENCE",
    "Choice",
    "admit",
    "choose",
    "clock",
    "current",
    "forced",
    "forget",
    "kernels",
    "resolve",
    "tables",
]

SECOND_COPY = "keeps a second copy of the weight: only under QHUB_KERNEL={name}, or after qhub tune --bridges"

LinearFunction = Callable[[Tensor, Layout, Parts, "Tensor | None"], Tensor]


@dataclass
class Choice:
    """Is the answer for one layer: kernels by rising M, and why the others were refused.

    ``steps``: (largest M, kernel name, function), the last without a limit. ``refused``: {kernel name: reason}.
    ``times``: {largest M of a range: what could be taken there, the best first}.
    """

    problem: Problem
    steps: Sequence[tuple[float, str, LinearFunction]]
    refused: dict[str, str] = field(default_factory=dict)
    times: dict[float, list[Timing]] = field(default_factory=dict)

    def pick(self, m: int) -> LinearFunction:
        """Return the function for inputs of ``m`` rows."""
        for limit, _, function in self.steps:
            if m <= limit:
                return function
        return self.steps[-1][2]

    def name(self, m: int) -> str:
        """Return the name of the kernel for inputs of ``m`` rows."""
        return next(name for limit, name, _ in self.steps if m <= limit)


# Raised by forget(), and where QHUB_KERNEL is found changed: choices remembered elsewhere under an older number are
# void.
epoch = 0

_lock = threading.RLock()
_offered: dict[str, KernelSpec] | None = None
_choices: dict[tuple[Problem, str, str | None], Choice] = {}
_tables: dict[str, tuple[Table | None, Table | None]] = {}
_forced: str | None = os.environ.get("QHUB_KERNEL") or None


def kernels() -> dict[str, KernelSpec]:
    """Return every kernel of the core or of an installed plugin, by name; asked once per process.

    A name offered twice is refused the second time, with a warning.
    """
    global _offered
    with _lock:
        if _offered is None:
            # Those of the core are for GPUs; elsewhere they would only be one more reason to read.
            offered: dict[str, KernelSpec] = {scaled_mm.SPEC.name: scaled_mm.SPEC} if torch.cuda.is_available() else {}
            for plugin, specs in registry.broadcast("qhub_kernels"):
                for spec in specs:
                    if spec.name in offered or spec.name == REFERENCE:
                        warnings.warn(
                            f"the plugin {plugin!r} offers a kernel named {spec.name!r}, a name that is taken: left "
                            "out",
                            stacklevel=2,
                        )
                        continue
                    offered[spec.name] = spec
            _offered = offered
        return _offered


def forget() -> None:
    """Drop offers, choices and measurements, so that what was installed, registered or measured since is seen."""
    global _offered, epoch
    with _lock:
        _offered = None
        _choices.clear()
        _tables.clear()
        dense_kernels.forget()
        epoch += 1
        forced()


def forced() -> str | None:
    """Return the kernel that ``QHUB_KERNEL`` names, read anew; layers that have chosen look again when it changed."""
    global _forced, epoch
    wanted = os.environ.get("QHUB_KERNEL") or None
    if wanted != _forced:
        _forced = wanted
        epoch += 1
    return wanted


def current() -> str | None:
    """Return the kernel that ``QHUB_KERNEL`` named when it was last read."""
    return _forced


def tables(card: str) -> tuple[Table | None, Table | None]:
    """Return the user's measurements on a card and those shipped; None where there are none."""
    with _lock:
        if card not in _tables:
            _tables[card] = load(user_file(card)), load(shipped_file(card))
        return _tables[card]


def choose(layout: Layout, parts: Parts, dtype: torch.dtype) -> Choice:
    """Return the kernels for a layer with ``parts`` and inputs of ``dtype``; decided once, then looked up.

    Raises :class:`KernelError` when ``QHUB_KERNEL`` names a kernel that does not exist or cannot run here, and
    :class:`UnsupportedError` when inputs of ``dtype`` cannot be multiplied.
    """
    if not (dtype.is_floating_point or dtype.is_complex):
        raise UnsupportedError(
            f"the input is {str(dtype).removeprefix('torch.')}: a quantized weight stands for real numbers, cast the "
            "input to a float dtype first"
        )
    device = next(iter(parts.values())).device
    problem = Problem(layout, device.type, dtype)
    wanted = forced()
    key = (problem, card_name(device), wanted)
    with _lock:
        choice = _choices.get(key)
        if choice is None:
            choice = resolve(problem, parts, wanted)
            # A meta device decides nothing: values are missing to compare with the reference.
            if device.type != "meta":
                _choices[key] = choice
        return choice


def resolve(problem: Problem, parts: Parts, forced: str | None = None) -> Choice:
    """Filter all kernels for ``problem``, compare the rest with the reference on ``parts``, and order them by M."""
    runners, refused = admit(problem, parts, forced)
    if forced is not None and forced in refused:
        raise KernelError(f"QHUB_KERNEL={forced}: {refused[forced]} (layout {problem.layout.describe()})")
    if forced is None or forced == REFERENCE:
        runners.append(Runner(dense_kernels.reference_spec(problem, parts)))
    steps, times = ordered(runners, clock(problem, parts), forced is not None)
    return Choice(problem, steps, refused, times)


def admit(
    problem: Problem, parts: Parts, forced: str | None = None, bridges: bool = False
) -> tuple[list[Runner], dict[str, str]]:
    """Return the kernels that take ``problem`` and agree with the reference, and why the others do not.

    ``bridges``: those too that keep a second copy of the weight and that nobody asked for.
    """
    refused: dict[str, str] = {}
    admitted: list[Runner] = []
    if forced is not None and forced != REFERENCE and forced not in kernels():
        raise KernelError(f"QHUB_KERNEL={forced}: no such kernel; there are {[REFERENCE, *kernels()]}")
    own = tables(card_name(next(iter(parts.values())).device))[0]
    known = clock(problem, parts)
    for spec in kernels().values():
        if spec.role != "linear":
            continue
        if forced is not None and spec.name != forced:
            refused[spec.name] = f"QHUB_KERNEL={forced}"
            continue
        runner = None
        try:
            reason = spec.refusal(problem)
            if reason is None and spec.prepare and not (forced or bridges or known.measured(own, spec)):
                reason = SECOND_COPY.format(name=spec.name)
            if reason is None:
                runner = Runner(spec)
                for config, rows in spec.probes_of(problem, parts) if problem.device != "meta" else ():
                    run = runner.with_config(config).bind(problem.layout, parts, problem.dtype)
                    reason = disagreement(run, problem.layout, parts, problem.dtype, rows)
                    if reason is not None:
                        break
        except UnsupportedError as error:
            # What a kernel finds in the tensors, and not in the layout.
            reason = str(error)
        except Exception as error:
            reason = f"failed: {type(error).__name__}: {error}"
            if forced is None:
                warnings.warn(f"the kernel {spec.name!r} {reason}; another one is used", RuntimeWarning, stacklevel=3)
        if reason is not None:
            refused[spec.name] = reason
        elif runner is not None:
            admitted.append(runner)
    return admitted, refused


def clock(problem: Problem, parts: Parts) -> Clock:
    """Return what tells the times of kernels for a layer: the user's measurements, those shipped, guesses."""
    device = next(iter(parts.values())).device
    found = [table for table in tables(card_name(device)) if table is not None]
    card: Card = found[0].card if found else nominal(device)
    return Clock(problem, parts, card, found)
